"""trust = "local": what leaves a participant is noised, holds against the server, and costs one charge a round."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_federated_lora import plan_run, train
from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.audit import Transcript, compare
from dp_federated_lora.errors import (
    AuditError,
    ConfigError,
    DuplicateContribution,
    IncompatiblePlan,
    PermitMismatch,
    PermitSpent,
    PrivacyError,
    RunInterrupted,
)
from dp_federated_lora.federated import Purpose, Request, RoundReport, Server, ServerState, handle, report
from dp_federated_lora.lab.auditing import audit
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.statement import state_privacy, statement_at
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import (
    GaussianMechanism,
    Ledger,
    Permit,
    PoissonSampler,
    PrivacyPlan,
    Released,
    SecureRandom,
    Spend,
    Trust,
    UnitId,
    clip_examples,
)
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.vector import Layout
from plans import a_plan

Raw = dict[str, dict[str, object]]
Sites = Mapping[str, tuple[Permit, SecureRandom]]
D = 4000  # statistical bounds below are more than 6 standard errors wide: false positives under 1e-8


def local(raw: Raw, **run: object) -> Config:
    raw["privacy"]["trust"] = "local"
    raw["run"] |= run
    return parse_config(raw, where="test")


def a_local_plan(**changes: object) -> PrivacyPlan:
    return a_plan(trust=Trust.LOCAL, sites=100, **changes)


def permit_of(ledger: Ledger, plan: PrivacyPlan, key: SecureRandom) -> Permit:
    return ledger.reserve(plan.event, round=1, purpose="training", commitment=key.commitment)


class Reporters:
    """An exchange of a hundred sites that all hold one vector, with coins and noise of their own."""

    def __init__(self, plan: PrivacyPlan, value: torch.Tensor, *, answering: int = 100, same_units: bool = False) -> None:
        self.plan, self.value, self.answering, self.same_units = plan, value, answering, same_units
        self.names = [f"c{i}" for i in range(100)]
        self.sent: list[Released] = []

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        for name in self.names[: self.answering]:
            permit, rng = sites[name]
            chosen = self.plan.draw(range(1), rng.derive("sample"), number=request.round).tolist()
            units = [UnitId("u" if self.same_units else name)] * len(chosen)
            total = clip_examples(self.value[None].expand(len(chosen), -1), request.clip_norm, units)
            self.sent.append(self.plan.mechanism.release(total, charged=self.plan.event, permit=permit, rng=rng))
            yield self.sent[-1]


def one_round(tmp_path: Path, exchange: Reporters, *, seed: int = 1) -> torch.Tensor:
    plan, key = exchange.plan, SecureRandom.insecure_from(seed)
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (D,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(D)}, Sgd(1.0).init(D), plan.clip_norm)
    ledger = Ledger.open(tmp_path / f"{seed}.sqlite", budget=plan.budget, owner="t")
    after, _ = server.run_round(state, server.reserve(state, ledger, key), exchange, key)
    assert ledger.spent().charges == 1
    return after.adapter["lora_B"].double()


# --- the round --------------------------------------------------------------------------------------


def test_every_report_carries_full_noise_of_its_own_and_their_mean_a_root_of_the_sites_times_as_much(tmp_path: Path):
    exchange = Reporters(a_local_plan(), torch.zeros(D))
    mean = one_round(tmp_path, exchange)
    std = 1.5 * 2.0  # noise multiplier x clip norm
    assert len(exchange.sent) == 100  # whatever the coins say
    for sent in exchange.sent:
        assert abs(float(sent.value.std()) / std - 1) < 6.5 / math.sqrt(2 * D)
    for first, second in zip(exchange.sent[:20], exchange.sent[20:40], strict=True):
        assert abs(float(torch.corrcoef(torch.stack([first.value, second.value]))[0, 1])) < 6.5 / math.sqrt(D)
    assert abs(float(mean.std()) / (std * math.sqrt(100) / 50.0) - 1) < 6.5 / math.sqrt(2 * D)
    assert exchange.plan.noise_norm(D, 2.0) == pytest.approx(std * math.sqrt(100 * D) / 50.0)
    assert exchange.plan.noise_norm(D, 2.0) == pytest.approx(10 * a_plan().noise_norm(D, 2.0))


def test_coins_are_the_participants_own_and_those_whose_coin_says_no_send_noise_alone(tmp_path: Path):
    plan = a_local_plan(mechanism=GaussianMechanism(0.5), rounds=1)
    exchange = Reporters(plan, torch.full((D,), 1.0))
    one_round(tmp_path, exchange)
    towards = torch.tensor([float(sent.value.sum()) / math.sqrt(D) for sent in exchange.sent])  # 2 or 0, noise of std 1
    took_part = int((towards > 1.0).sum())
    assert 5 < took_part < 95  # half of 100, each misread with probability 0.16: beyond 8 standard errors
    again = Reporters(plan, torch.full((D,), 1.0))
    one_round(tmp_path, again, seed=2)
    assert [bool(x.value.sum() > math.sqrt(D)) for x in again.sent] != [bool(x > 1) for x in towards]


def test_a_site_that_drops_out_takes_its_noise_along_and_nobody_elses_guarantee(tmp_path: Path):
    whole, fewer = Reporters(a_local_plan(), torch.ones(D)), Reporters(a_local_plan(), torch.ones(D), answering=90)
    first = one_round(tmp_path, whole)
    (tmp_path / "other").mkdir()
    second = one_round(tmp_path / "other", fewer)
    assert all(torch.equal(a.value, b.value) for a, b in zip(whole.sent, fewer.sent, strict=False))
    assert torch.allclose(first - second, sum(sent.value for sent in whole.sent[90:]) / 50.0, atol=1e-4)


def test_a_unit_that_is_at_two_sites_and_another_number_of_sites_are_refused(tmp_path: Path):
    with pytest.raises(DuplicateContribution, match="two sites"):
        one_round(tmp_path, Reporters(a_local_plan(sampler=PoissonSampler(1.0)), torch.ones(D), same_units=True))
    exchange = Reporters(a_local_plan(), torch.ones(D))
    exchange.names.append("stranger")
    with pytest.raises(PrivacyError, match="101 participants, but the plan says 100"):
        one_round(tmp_path, exchange, seed=2)
    with pytest.raises(PrivacyError, match="shape"):
        one_round(tmp_path, Reporters(a_local_plan(), torch.ones(D + 1)), seed=3)


def test_a_charge_buys_one_release_of_every_site_from_its_own_stream_and_nothing_else(tmp_path: Path):
    plan, key = a_local_plan(), SecureRandom.insecure_from(1)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    permit = permit_of(ledger, plan, key)
    with pytest.raises(PrivacyError, match="named twice"):
        permit.divide(key, ["a", "a"])
    with pytest.raises(PermitMismatch):
        permit.divide(SecureRandom.insecure_from(2), ["a", "b"])
    sites = permit.divide(key, ["a", "b"])
    with pytest.raises(PermitSpent):
        permit.divide(key, ["c"])
    total = clip_examples(torch.ones(1, 3), 2.0, [UnitId("u")])
    with pytest.raises(PermitSpent):
        plan.mechanism.release(total, charged=plan.event, permit=permit, rng=key)
    with pytest.raises(PermitMismatch):
        plan.mechanism.release(total, charged=plan.event, permit=sites["a"][0], rng=sites["b"][1])
    for _ in range(2):
        again = permit_of(ledger, plan, key).divide(key, ["a", "b"])  # the same key: an interrupted round is re-created
        assert {s: stream.commitment for s, (_, stream) in again.items()} == {s: r.commitment for s, (_, r) in sites.items()}
    assert ledger.spent().charges == 1


# --- what leaves a client ---------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "client"])
@pytest.mark.parametrize("noised", [True, False])
def test_what_leaves_a_client_tells_its_data_only_where_its_noise_is_taken_away(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, noised: bool
):
    """The attack: compare a report with the contribution, which the attacker knows. It has to see through the mutation alone."""
    raw = request.getfixturevalue("client_config" if unit == "client" else "raw_config")
    raw["privacy"]["sampling_rate"] = 1.0
    config = local(raw)
    plan = privacy_plan(config)
    bench = Workbench.of(config)
    client = max(bench.clients(plan), key=lambda c: len(c.examples))
    if not noised:
        monkeypatch.setattr(SecureRandom, "rounded_gaussian", lambda self, sigma, n: torch.zeros(n, dtype=torch.int64).numpy())
    key = SecureRandom.insecure_from(3)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    permit, stream = permit_of(ledger, plan, key).divide(key, [client.name])[client.name]
    ask = Request(Purpose.TRAINING, 1, plan.content_id, bench.model.state(), plan.clip_norm)
    sent = report(ask, client, bench.learner, permit, stream)
    known = handle(ask, client, bench.learner, stream)._value.double() * plan.clip_norm / 2**22
    rest = sent.value - known
    seen_through = float(torch.linalg.vector_norm(rest)) < 1e-6
    assert seen_through != noised
    if noised:
        size, std = rest.numel(), plan.mechanism.noise_multiplier * plan.clip_norm
        assert abs(float(rest.square().mean()) / std**2 - 1) < 6 * math.sqrt(2 / size)


def test_a_replay_without_one_example_changes_the_release_by_no_more_than_a_clip_norm(raw_config: Raw, tmp_path: Path):
    raw_config["privacy"]["rounds"] = 2
    config = local(raw_config)
    plan, bench = privacy_plan(config), Workbench.of(config)
    clients = bench.clients(plan)
    whole, start = clients[-1].examples, bench.model.state()
    transcripts: list[Transcript] = []
    for examples in (whole, whole.subset(range(len(whole) - 1))):
        transcript = Transcript(replay=transcripts[0] if transcripts else None)
        bench.model.load(start)
        server, state = Server.of(bench.model, plan, bench.method, Sgd(1.0))
        last = replace(clients[-1], examples=examples)
        exchange, server = transcript.wrap(Simulator([*clients[:-1], last], bench.learner), server)
        ledger = Ledger.open(tmp_path / f"{len(transcripts)}.sqlite", budget=plan.budget, owner="t")
        for number in (1, 2):
            key = SecureRandom.insecure_from(5).derive("round", number)
            permit = server.reserve(state, ledger, key)
            state, norm = server.run_round(state, permit, exchange, key)
            ledger.commit(permit.serial)
            transcript.reports.append(server.report(state, ledger, update_norm=norm, clip_norm=plan.clip_norm, scores={}))
        transcripts.append(transcript)
    assert compare(*transcripts, plan).passed
    assert len(transcripts[0].requests) == 2


# --- runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_run_states_the_same_epsilon_against_the_server_as_against_recipients(request: pytest.FixtureRequest, unit: str):
    config = local(request.getfixturevalue("client_config" if unit == "client" else "raw_config"))
    central = privacy_plan(config.model_copy(update={"privacy": config.privacy.model_copy(update={"trust": "central"})}))
    seen: list[RoundReport] = []
    result = train(config, on_round=seen.append)
    assert {row.adversary: row.epsilon for row in result.statement} == dict.fromkeys(
        ("recipients of the model", "other participants", "the server"), result.epsilon
    )
    assert 0.9 * 8.0 < result.epsilon <= 8.0
    assert all("tosses secret coins" in row.assumptions[0] for row in result.statement)
    assert [any("nobody else is trusted" in a for a in row.assumptions) for row in result.statement] == [False, False, True]
    assert not any("un-noised" in a for row in result.statement for a in row.assumptions)
    privacy = json.loads((result.path / "privacy.json").read_text())
    assert (privacy["trust"], privacy["noise_sources"]) == ("local", 4)
    assert privacy["noise_multiplier"] == central.mechanism.noise_multiplier  # the amount is the same; four add it
    assert Ledger.read(result.path / "ledger.sqlite").spent().charges == config.privacy.rounds
    assert "each of 4 participants" in (result.path / "report.html").read_text()
    planned = plan_run(config).as_json()
    assert seen[-1].noise_norm == pytest.approx(planned["noise_norm"])
    assert planned["noise_norm"] == pytest.approx(2 * central.noise_norm(planned["trainable_parameters"], 1.0))


def test_an_interrupted_local_run_resumes_to_the_same_adapter_and_a_begun_round_is_the_same_release(
    raw_config: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(done: RoundReport) -> None:
        if done.round == 1:
            os.kill(os.getpid(), signal.SIGINT)

    raw_config["privacy"]["rounds"] = 2
    config = local(raw_config, insecure_seed=2)
    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(RunInterrupted):
        train(config, out=tmp_path / "stopped", on_round=stop)
    resumed = train(resume=tmp_path / "stopped")
    files = [(r.path / "adapter" / "adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert files[0] == files[1]
    assert whole.epsilon == resumed.epsilon
    assert all(row.epsilon is None for row in whole.statement)  # a seed is known to whoever reads the configuration

    release, seen = GaussianMechanism.release, list[torch.Tensor]()

    def dying(self: GaussianMechanism, *args: object, **kwargs: object) -> Released:
        seen.append(release(self, *args, **kwargs).value)  # type: ignore[arg-type]
        if len(seen) == 6:  # the second of four sites in the second round
            raise MemoryError
        return Released(seen[-1], 0.0, insecure=False)

    fresh = local(raw_config, out=str(tmp_path / "fresh"), insecure_seed=None)
    monkeypatch.setattr(GaussianMechanism, "release", dying)
    with pytest.raises(MemoryError):
        train(fresh)
    train(resume=tmp_path / "fresh")
    assert torch.equal(seen[4], seen[6])
    assert torch.equal(seen[5], seen[7])
    assert Ledger.read(tmp_path / "fresh" / "ledger.sqlite").spent().charges == 2


def test_evaluation_and_groups_of_budgets_work_with_noise_of_each_participant(
    client_config: Raw, raw_config: Raw, tmp_path: Path
):
    client_config["privacy"]["rounds"] = 2
    client_config["evaluation"] = {"epsilon": 2.0, "every": 1, "holdout": 0.3}
    result = train(local(client_config, out=str(tmp_path / "evaluated")))
    assert Ledger.read(result.path / "ledger.sqlite").spent().charges == 4
    assert 0.9 * 8.0 < result.epsilon <= 8.0
    del client_config["evaluation"]
    client_config["privacy"]["personalisation"] = "scale"
    client_config["privacy"]["groups"] = [{"epsilon": 2.0, "clients": 2}, {"epsilon": 8.0, "clients": 2}]
    result = train(local(client_config, out=str(tmp_path / "grouped")))
    server = [row.epsilon for row in result.statement if row.adversary == "the server"]
    assert 1.9 < server[0] <= 2.0 < 7.9 < server[1] <= 8.0


def test_a_declared_shuffler_adds_a_row_and_changes_neither_noise_nor_charge(client_config: Raw):
    raw = client_config
    raw["privacy"] |= {"epsilon": 1.0, "rounds": 10, "sampling_rate": 1.0, "shuffler": True}
    raw["federation"] = {"clients": 3000, "partition": "dirichlet", "alpha": 0.5}
    config, spend = local(raw), Spend(1.0, 1e-5, 10, 10)
    plan = privacy_plan(config)
    rows = statement_at(config, plan, spend)
    assert rows[:-1] == state_privacy(plan, spend=spend, insecure=False)
    assert rows[-1].adversary == "the server behind the shuffler"
    assert rows[-1].epsilon is not None
    assert 0.1 < rows[-1].epsilon < 0.5
    assert "all 3000 reports" in rows[-1].assumptions[-1]
    assert not any("nobody else is trusted" in a for a in rows[-1].assumptions)  # here the others are
    assert statement_at(local(raw, insecure_seed=1), plan, spend)[-1].epsilon is None
    raw["federation"]["clients"] = 4  # too few to hide among: the row says what holds anyway
    few = local(raw, insecure_seed=None)
    assert statement_at(few, privacy_plan(few), spend)[-1].epsilon == 1.0
    for section, change in (
        ("privacy", {"trust": "central"}),
        ("privacy", {"groups": [{"epsilon": 1.0, "clients": 4}]}),
        ("evaluation", {"epsilon": 0.5, "every": 1}),
    ):
        with pytest.raises(ConfigError, match="privacy.shuffler"):
            parse_config(raw | {section: raw.get(section, {}) | change}, where="test")


def test_what_does_not_combine_is_refused_with_a_reason(raw_config: Raw, tmp_path: Path):
    with pytest.raises(AuditError, match="trust = central"):
        audit(local(raw_config), out=tmp_path / "audit")
    assert not (tmp_path / "audit" / "ledger.sqlite").exists()  # refused before anything was charged
    raw_config["privacy"]["clip_quantile"] = 0.5
    with pytest.raises(ConfigError, match="would follow that noise"):
        local(raw_config)
    with pytest.raises(IncompatiblePlan, match="4 sites"):
        a_plan(sites=4)
