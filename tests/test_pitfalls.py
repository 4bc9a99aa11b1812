"""Mistakes found in other systems for private federated learning, each shown to be impossible here.

The numbers are those of docs/pitfalls.md.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting.pld import PLDAccountant

from dp_federated_lora import train
from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.errors import CheckpointError, IncompatiblePlan, PermitMismatch, RunInterrupted, UnsupportedEvent
from dp_federated_lora.federated import Client, Purpose, Request, RoundReport, Server, ServerState, handle
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.monitoring.metrics import read_metrics
from dp_federated_lora.privacy import (
    BoundedSum,
    Composition,
    FixedSizeSampler,
    GaussianMechanism,
    Ledger,
    PoissonSampler,
    PrivacyPlan,
    SecureRandom,
    UnitId,
    clip_examples,
    clip_to,
)
from dp_federated_lora.training.gradients import ExampleGradients
from dp_federated_lora.vector import Layout
from plans import a_plan

Raw = dict[str, dict[str, object]]
SIZE = 40
ONE_SURE_ROUND = {
    "sampler": PoissonSampler(1.0),
    "clip_norm": 1.0,
    "mechanism": GaussianMechanism(1.0),
    "rounds": 1,
    "divisor": 10.0,
}


def released(tmp_path: Path, updates: Sequence[torch.Tensor], seed: int = 1) -> torch.Tensor:
    """The adapter after a round in which these clients' updates arrive, with noise of `seed`."""

    class Clients:
        names = tuple(str(i) for i in range(10))

        def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
            for index, update in enumerate(updates):
                yield BoundedSum.collect([clip_to(update, 1.0, UnitId(str(index)))], size=SIZE, clip_norm=1.0)

    plan = a_plan(**ONE_SURE_ROUND)
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (SIZE,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(SIZE)}, Sgd(1.0).init(SIZE), plan.clip_norm)
    key = SecureRandom.insecure_from(seed)
    tmp_path.mkdir(exist_ok=True)
    ledger = Ledger.open(tmp_path / f"{len(list(tmp_path.iterdir()))}.sqlite", budget=plan.budget, owner="t")
    return server.run_round(state, server.reserve(state, ledger, key), Clients(), key)[0].adapter["lora_B"]


def example_bench(raw: Raw) -> tuple[Workbench, PrivacyPlan, list[Client]]:
    config = parse_config(raw, where="test")
    plan = privacy_plan(config)
    bench = Workbench.of(config)
    return bench, plan, bench.clients(plan)


def test_3_a_client_has_no_number_of_examples_to_claim_and_every_update_weighs_the_same(tmp_path: Path):
    claims = {f.name for kind in (Request, Client) for f in dataclasses.fields(kind)} & {"weight", "num_examples", "count"}
    assert not claims
    one, ones = torch.zeros(SIZE), torch.ones(SIZE) / math.sqrt(SIZE)
    nobody = released(tmp_path, [one, one])
    for update in (ones, 1e9 * ones):  # however large, it moves the mean by clip norm / public divisor
        assert torch.allclose(released(tmp_path, [update, one]) - nobody, ones / 10.0, atol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_4_a_non_finite_update_contributes_nothing(tmp_path: Path, poison: float):
    bad = torch.ones(SIZE)
    bad[0], bad[1] = 1e9, poison
    good = torch.ones(SIZE)
    assert torch.equal(released(tmp_path, [bad, good]), released(tmp_path, [torch.zeros(SIZE), good]))


def test_5_a_record_whose_gradient_is_not_a_number_leaves_the_others_untouched(raw_config: Raw):
    bench, plan, clients = example_bench(raw_config)
    client = max(clients, key=lambda c: len(c.examples))
    trained = bench.model.train_only(FFA.factors)
    batch = list(range(4))
    units = [UnitId(str(i)) for i in batch]

    def total(spoil: float | None, keep: Sequence[int]) -> BoundedSum:
        with ExampleGradients(bench.model.module, trained) as gradients:
            losses = bench.learner.losses(client.examples, batch)
            rows = gradients.rows(losses)
        if spoil is not None:
            rows[2] = spoil
        return clip_examples(rows[list(keep)], plan.clip_norm, [units[i] for i in keep])

    def noised(part: BoundedSum, folder: str) -> torch.Tensor:
        key = SecureRandom.insecure_from(5)
        ledger = Ledger.open(Path(raw_config["run"]["out"]).parent / folder, budget=plan.budget, owner="t")  # type: ignore[arg-type]
        permit = ledger.reserve(plan.event, round=1, purpose="training", commitment=key.commitment)
        return plan.mechanism.release(part, charged=plan.event, permit=permit, rng=key).value

    with_bad = noised(total(math.nan, range(4)), "a.sqlite")
    without = noised(total(None, (0, 1, 3)), "b.sqlite")
    assert torch.isfinite(with_bad).all()
    assert torch.equal(with_bad, without)


def test_6_zero_updates_and_empty_rounds_are_ordinary_rounds(tmp_path: Path):
    zeros = released(tmp_path, [torch.zeros(SIZE)] * 3)
    assert torch.equal(zeros, released(tmp_path, []))
    assert 0.05 < float(zeros.std()) < 0.2  # noise of 0.1: 40 values, beyond 6 standard errors
    assert torch.isfinite(zeros).all()


def test_7_replies_that_do_not_arrive_change_neither_divisor_nor_noise(tmp_path: Path):
    one = torch.ones(SIZE) / math.sqrt(SIZE)
    all_of_them, some = released(tmp_path, [one] * 10), released(tmp_path, [one] * 4)
    assert torch.allclose(all_of_them - some, 6 * one / 10.0, atol=1e-6)


def test_8_the_sampler_that_is_charged_is_the_one_that_picks_the_examples(raw_config: Raw, monkeypatch: pytest.MonkeyPatch):
    bench, plan, clients = example_bench(raw_config)
    client = max(clients, key=lambda c: len(c.examples))
    drawn: list[int] = []
    draw = PoissonSampler.draw

    def spy(self: PoissonSampler, size: int, rng: SecureRandom):
        picked = draw(self, size, rng)
        drawn.append(len(picked))
        return picked

    monkeypatch.setattr(PoissonSampler, "draw", spy)
    seen: list[int] = []
    losses = type(bench.learner).losses
    monkeypatch.setattr(type(bench.learner), "losses", lambda s, e, i: seen.append(len(i)) or losses(s, e, i))
    for seed in range(3):
        request = Request(Purpose.TRAINING, 1, plan.content_id, bench.model.state(), plan.clip_norm)
        handle(request, client, bench.learner, SecureRandom.insecure_from(seed))
    assert sum(seen) == sum(drawn)
    assert plan.event.sampling_probability == plan.sampler.sampling_rate  # type: ignore[union-attr]


def test_9_only_the_poisson_sampler_amplifies_and_the_price_of_other_samplers_is_known():
    poisson = a_plan(sampler=PoissonSampler(0.1), mechanism=GaussianMechanism(1.0), rounds=100).epsilon_after(100)
    assert poisson == pytest.approx(7.05, abs=0.01)
    assert a_plan(**ONE_SURE_ROUND).event == GaussianMechanism(1.0).event
    unamplified = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-2)
    unamplified.compose(dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), 100))
    assert poisson < unamplified.get_epsilon(1e-5) / 10  # what a sampler without secret coins would cost
    fixed = Composition()
    fixed.add(FixedSizeSampler(100, 1000).amplify(GaussianMechanism(1.0).event), 100)
    assert fixed.epsilon(1e-5) > 14.05  # the price if replacing a unit moved the sum by one clip norm; it moves it by two
    with pytest.raises(UnsupportedEvent):
        fixed.add(PoissonSampler(0.1).amplify(GaussianMechanism(1.0).event))
    with pytest.raises(UnsupportedEvent):
        Composition().add(dp_accounting.SampledWithReplacementDpEvent(1000, 100, dp_accounting.GaussianDpEvent(1.0)))


def test_12_noise_rate_and_divisor_do_not_depend_on_how_many_examples_there_are(raw_config: Raw, tmp_path: Path):
    config = parse_config(raw_config, where="test")
    plan = privacy_plan(config)
    rows = Path(raw_config["data"]["train"]).read_text().splitlines()  # type: ignore[arg-type]
    fewer = tmp_path / "fewer.csv"
    fewer.write_text("\n".join(rows[:60]) + "\n")
    raw_config["data"]["train"] = str(fewer)
    _, other, clients = example_bench(raw_config)
    assert sum(len(c.examples) for c in clients) == 59
    assert other.content_id == plan.content_id
    assert "examples" not in inspect.signature(PrivacyPlan.calibrated).parameters


def test_13_an_empty_sample_is_a_step_like_any_other(raw_config: Raw, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(PoissonSampler, "draw", lambda *_: np.empty(0, dtype=np.int64))
    config = parse_config(raw_config, where="test")
    result = train(config)
    assert result.rounds == config.privacy.rounds
    assert len(read_metrics(result.path / "metrics.jsonl")) == config.privacy.rounds


def test_14_epsilon_adds_up_over_rounds_and_over_a_restart(raw_config: Raw):
    config = parse_config(raw_config, where="test")
    seen: list[float] = []

    def on_round(report: RoundReport) -> None:
        seen.append(report.epsilon)
        if report.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_round=on_round)
    train(resume=config.run.out, on_round=lambda report: seen.append(report.epsilon))
    plan = privacy_plan(config)
    assert seen == sorted(seen)
    assert seen == pytest.approx([plan.epsilon_after(n) for n in (1, 2, 3, 4)])


def test_15_without_its_privacy_state_a_run_does_not_continue(raw_config: Raw):
    config = parse_config(raw_config, where="test")
    run = Path(config.run.out)

    def stop(report: RoundReport) -> None:
        raise RunInterrupted("stop")

    with pytest.raises(RunInterrupted):
        train(config, on_round=stop)
    (run / "ledger.sqlite").unlink()
    with pytest.raises(CheckpointError):
        train(resume=run)
    # and a client computes nothing for a plan that it did not agree to
    _, plan, clients = example_bench(raw_config)
    bench = Workbench.of(config)
    with pytest.raises(IncompatiblePlan):
        handle(
            Request(Purpose.TRAINING, 2, replace(plan, clip_norm=2.0).content_id, bench.model.state(), 2.0),
            clients[0],
            bench.learner,
            SecureRandom.insecure_from(1),
        )


def test_21_reports_metrics_and_logs_hold_public_facts_and_released_values_only(raw_config: Raw):
    raw_config["data"] = {k: v for k, v in raw_config["data"].items() if k not in ("test", "test_is_public")}
    result = train(parse_config(raw_config, where="test"))
    public = {
        "round",
        "rounds",
        "epsilon",
        "delta",
        "update_norm",
        "noise_norm",
        "clip_norm",
        "bytes_per_client",
        "public_metrics",
        "private_metrics",
    }
    assert {f.name for f in dataclasses.fields(RoundReport)} == public
    for line in read_metrics(result.path / "metrics.jsonl"):
        assert set(line) == public
        assert line["public_metrics"] == {}
    for line in (result.path / "run.log").read_text().splitlines():
        entry = json.loads(line)
        assert set(entry.get("report", {})) <= public
        assert not {"loss", "cohort", "examples", "accuracy", "norm"} & set(entry)


def test_22_no_setting_separates_the_noise_that_is_added_from_the_noise_that_is_charged(tmp_path: Path):
    assert [f.name for f in dataclasses.fields(GaussianMechanism)] == ["noise_multiplier"]
    plan = a_plan(**ONE_SURE_ROUND)
    key = SecureRandom.insecure_from(1)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    permit = ledger.reserve(plan.event, round=1, purpose="training", commitment=key.commitment)
    nothing = BoundedSum.collect([], size=SIZE, clip_norm=1.0)
    with pytest.raises(PermitMismatch):  # less noise than was charged for
        GaussianMechanism(0.5).release(nothing, charged=plan.event, permit=permit, rng=key)
