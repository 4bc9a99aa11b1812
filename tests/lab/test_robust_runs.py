"""Whole runs with [robust] on a tiny model, with and without participants who lie."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from dp_federated_lora import plan_run, train
from dp_federated_lora.audit import Transcript
from dp_federated_lora.errors import AuditError, ConfigError, RunInterrupted
from dp_federated_lora.federated import Exchange, Purpose, Request, RoundReport, Server
from dp_federated_lora.lab.attackers import MESSAGES, POISONS, Attackers, prepared_bench, scores_under_attack
from dp_federated_lora.lab.attestation import Attestation
from dp_federated_lora.lab.config import Config, load_config, parse_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import Run, TrainResult
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import BoundedSum, Ledger, Permit, Released, SecureRandom
from dp_federated_lora.runtime import Simulator
from saved import adapter, same

Raw = dict[str, dict[str, object]]
MEDIAN: dict[str, object] = {"rule": "median", "byzantine": 2, "groups": 5}


@pytest.fixture
def ten(raw_config: Raw) -> Raw:
    """Ten participants, two rounds."""
    raw_config["federation"] = {"clients": 10}
    raw_config["privacy"]["rounds"] = 2
    return raw_config


def robust(raw: Raw, **section: object) -> Config:
    raw["robust"] = section
    return parse_config(raw, where="test")


@dataclass
class Liars:
    """Some participants send NaN: through the clip where the server adds the noise, else in a report of their own making."""

    inner: Exchange
    liars: Sequence[str]

    @property
    def names(self) -> Sequence[str]:
        return self.inner.names

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        return self.inner(request, clients, rng)

    def reports(self, request: Request, sites: Mapping[str, tuple[Permit, SecureRandom]], *, size: int) -> Iterator[Released]:
        for name, each in zip(self.names, self.inner.reports(request, sites, size=size), strict=True):
            yield replace(each, value=each.value * math.nan) if name in self.liars else each


def run_with_nan(config: Config, out: Path) -> TrainResult:
    names = ["client-0", "client-1"]

    def instrument(exchange: Exchange, server: Server) -> tuple[Exchange, Server]:
        lying, server = Attackers(names, "not_finite").wrap(exchange, server)
        return Liars(lying, names), server

    with RunDirectory.create(out, config) as directory:
        run = Run(directory, instrument=instrument)
        run.train()
        return run.write_results()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trust", "section"),
    [
        ("central", None),
        ("central", {"clip_around_aggregate": True}),
        ("central", {**MEDIAN, "before": ["nnm"], "clip_around_aggregate": True}),
        ("local", None),
        ("local", {"rule": "caf", "byzantine": 2}),
    ],
)
def test_two_of_ten_that_send_nan_poison_no_run(ten: Raw, tmp_path: Path, trust: str, section: dict[str, object] | None):
    ten["privacy"]["trust"] = trust
    if trust == "local" and section is None:
        ten["evaluation"] = {"epsilon": 1.0, "every": 2, "holdout": 0.2}
    config = parse_config(ten, where="t") if section is None else robust(ten, **section)
    result = run_with_nan(config, tmp_path / "run")
    assert result.rounds == 2
    assert all(tensor.isfinite().all() for tensor in adapter(result.path).values())
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["update_norm"]) for line in lines)
    assert all(math.isfinite(score) for score in lines[-1]["private_metrics"].values())


def test_groups_change_neither_noise_nor_charge_and_their_price_is_said_wherever_a_user_looks(ten: Raw, tmp_path: Path):
    plain = parse_config(ten, where="t")
    config = robust(ten, **MEDIAN, clip_around_aggregate=True)
    assert privacy_plan(config) == privacy_plan(plain)
    planned, before = plan_run(config).as_json(), plan_run(plain).as_json()
    assert planned["groups"] == 5
    assert planned["noise_norm"] == pytest.approx(math.sqrt(5) * before["noise_norm"])
    seen: list[RoundReport] = []
    result = train(config, on_round=seen.append)
    assert [row.epsilon for row in result.statement] == [row["epsilon"] for row in before["statement"]]
    assert Ledger.read(result.path / "ledger.sqlite").spent().charges == 2
    assert seen[-1].noise_norm == pytest.approx(planned["noise_norm"])
    for rows in (result.statement, Attestation.of(result.path).statement):
        assert any("sqrt(groups) = 2.236 times" in text for text in rows[0].assumptions)
        assert any("median) sees noised values alone" in text for text in rows[0].assumptions)
    assert json.loads((result.path / "privacy.json").read_text())["groups"] == 5
    page = (result.path / "report.html").read_text()
    assert "median over 5 groups, noise x 2.236; at most 2 lie; clips around the last aggregate" in page
    assert load_config(result.path / "config.toml").robust == config.robust


def test_an_interrupted_robust_run_resumes_to_the_same_adapter(ten: Raw, tmp_path: Path):
    def stop(done: RoundReport) -> None:
        if done.round == 1:
            os.kill(os.getpid(), signal.SIGINT)

    ten["run"]["insecure_seed"] = 3
    config = robust(
        ten, rule="median", byzantine=0, groups=5, before=["bucketing"], parameters={"bucket": 2}, clip_around_aggregate=True
    )
    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(RunInterrupted):
        train(config, out=tmp_path / "stopped", on_round=stop)
    resumed = train(resume=tmp_path / "stopped")
    assert same(adapter(whole.path), adapter(resumed.path))


def test_groups_of_clients_and_correlated_noise_and_an_adaptive_clip_around_the_aggregate_work_together(
    client_config: Raw, tmp_path: Path
):
    raw = client_config
    section = raw["robust"] = {"rule": "trimmed_mean", "byzantine": 0, "groups": 2}
    assert train(parse_config(raw, where="t"), out=tmp_path / "coins").rounds == 3
    raw["privacy"] |= {"sampling_rate": 1.0, "rounds": 4, "correlated": {"bands": 2, "separation": 2}}
    seen: list[RoundReport] = []
    result = train(parse_config(raw, where="t"), out=tmp_path / "turns", on_round=seen.append)
    del raw["robust"]
    single = plan_run(parse_config(raw, where="t")).noise_norm
    assert seen[-1].noise_norm == pytest.approx(math.sqrt(2) * single)
    assert result.epsilon <= 8.0
    del raw["privacy"]["correlated"]
    raw["federation"] |= {"partition": "iid", "columns": []}
    raw["federation"]["clients"] = 20
    raw["privacy"] |= {"clip_quantile": 0.5, "rounds": 2}
    norms: list[RoundReport] = []
    train(robust(raw, clip_around_aggregate=True), out=tmp_path / "adaptive", on_round=norms.append)
    assert norms[0].clip_norm != norms[1].clip_norm
    with pytest.raises(ConfigError, match="the count of bits would have the noise of each group"):
        robust(raw, **section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "give a rule, clip_around_aggregate = true, or both"),
        ({"byzantine": 1, "clip_around_aggregate": True}, "belong to a rule"),
        ({"rule": "median"}, "needs their number"),
        ({**MEDIAN, "groups": 4}, r"must divide federation.clients = 10"),
        ({**MEDIAN, "byzantine": 3}, "median needs 2 f < n, but f = 3 of n = 5 .* f of at most 2"),
        ({"rule": "median", "groups": 5, "parameters": {"tau": 1.0}}, r"takes the parameters \[\], got \['tau'\]"),
        ({"rule": "krumm", "groups": 5}, "no rule called 'krumm'; choose from mean, median"),
        ({"rule": "median", "groups": 5, "byzantin": 1}, "robust.byzantin: unknown key"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(ten: Raw, section: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        robust(ten, **section)


def test_groups_under_local_trust_and_methods_without_a_fixed_gauge_are_refused(ten: Raw):
    ten["method"] = {"name": "fedavg"}
    with pytest.raises(ConfigError, match=r"'fedavg' sends both factors: \(c B, A / c\) is the same adapter .* as 'ffa' does"):
        robust(ten, **MEDIAN)
    assert robust(ten, clip_around_aggregate=True).robust is not None
    ten["method"] = {"name": "ffa"}
    ten["federation"]["ranks"] = [{"clients": 10, "rank": ten["lora"]["rank"]}]
    with pytest.raises(ConfigError, match="nothing beyond its rank, which is no difference from the last aggregate"):
        robust(ten, clip_around_aggregate=True)
    del ten["federation"]["ranks"]
    ten["privacy"]["trust"] = "local"
    with pytest.raises(ConfigError, match='with "local" it sees the reports of participants'):
        robust(ten, **MEDIAN)


# --- attacks --------------------------------------------------------------------------------------


@dataclass
class Engine:
    """Ten participants of a tiny model, and the request of a first round whose clip norm nothing reaches."""

    simulator: Simulator
    server: Server
    request: Request
    rng: SecureRandom

    def sums(self, exchange: Exchange, **changes: object) -> list[BoundedSum]:
        return list(exchange(replace(self.request, **changes), range(10), self.rng))


@pytest.fixture
def engine(ten: Raw) -> Engine:
    ten["privacy"]["clip_norm"] = 1e3
    config = parse_config(ten, where="t")
    bench, plan = Workbench.of(config), privacy_plan(config)
    server, state = bench.server(plan)
    request = Request(Purpose.TRAINING, 1, plan.content_id, state.adapter, 1e3)
    return Engine(Simulator(bench.clients(plan), bench.learner), server, request, SecureRandom.insecure_from(1))


def values(sums: Sequence[BoundedSum], clip_norm: float = 1e3) -> torch.Tensor:
    return torch.stack([each._value for each in sums]).double() * (clip_norm / 2**22)


def test_liars_send_their_attack_under_their_own_units_and_everybody_else_what_they_would_send(engine: Engine):
    plain, layout = engine.sums(engine.simulator), engine.server.layout_in(1)
    honest = values(plain[2:])
    for name, message in MESSAGES.items():
        lying, _ = Attackers(["client-0", "client-1"], name).wrap(engine.simulator, engine.server)
        sent = engine.sums(lying)  # the liars answer last
        assert torch.equal(values(sent[:8]), honest)
        assert [each._units for each in sent[8:]] == [each._units for each in plain[:2]]
        expected = message(honest, 2, layout).nan_to_num(0.0, 0.0)
        if name == "not_finite":  # one value that is none, and the contribution counts as nothing
            expected = torch.zeros_like(expected)
        assert torch.allclose(values(sent[8:]), expected, rtol=1e-4, atol=0.1), name


def test_lies_go_through_the_clip_around_the_centre_too(engine: Engine):
    lying, _ = Attackers(["client-0", "client-1"], "scaling").wrap(engine.simulator, engine.server)
    centre = torch.linspace(-0.1, 0.1, engine.server.layout.size, dtype=torch.float64)
    sent = engine.sums(lying, clip_norm=0.5, centre=centre)
    for each in sent[8:]:
        assert float(values([each], 0.5).norm()) <= 0.5 * len(each._units) * (1 + 1e-6)
    honest = values(engine.sums(engine.simulator, centre=centre)[2:])
    lying, _ = Attackers(["client-0"], "free_rider").wrap(engine.simulator, engine.server)
    (still,) = engine.sums(lying, centre=centre)[9:]  # no change at all is minus the centre, for each of its units
    assert torch.allclose(values([still])[0], -len(still._units) * centre, atol=0.1)
    assert honest.isfinite().all()


def test_poisoned_participants_train_on_other_examples_and_nobody_else_does(engine: Engine):
    for name in POISONS:
        poisoned, _ = Attackers(["client-3"], name).wrap(engine.simulator, engine.server)
        assert isinstance(poisoned, Simulator)
        changed = [a.examples != b.examples for a, b in zip(poisoned.clients, engine.simulator.clients, strict=True)]
        assert changed == [index == 3 for index in range(10)]
        assert poisoned.clients[3].examples.units == engine.simulator.clients[3].examples.units


def test_attackers_who_cannot_be_are_refused(engine: Engine):
    with pytest.raises(AuditError, match="no attack called 'x'; choose from sign_flip"):
        Attackers(["client-0"], "x")
    for names in (["nobody"], [], engine.simulator.names):
        with pytest.raises(AuditError, match="with others beside them"):
            Attackers(names, "alie").wrap(engine.simulator, engine.server)
    with pytest.raises(AuditError, match="before anything else wraps it"):
        Attackers(["client-0"], "alie").wrap(*Transcript().wrap(engine.simulator, engine.server))


def test_scores_under_attack_leave_a_shared_model_as_it_was_and_need_test_data(ten: Raw):
    ten["run"]["insecure_seed"] = 1
    config = robust(ten, **MEDIAN)
    bench = prepared_bench(config)
    untrained = bench.model.state()
    scores = [scores_under_attack(config, attack="backdoor", liars=2, bench=bench, limit=20) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0].keys() == {"accuracy", "macro_f1", "backdoor"}
    assert same(bench.model.state(), untrained)
    del ten["data"]["test"]
    with pytest.raises(AuditError, match="configure public data.test"):
        scores_under_attack(robust(ten, **MEDIAN), attack=None, liars=0, bench=bench)
