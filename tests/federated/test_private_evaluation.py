"""Scores on participants' own data: bounded, noised, charged, and inside one budget with training."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_federated_lora import train
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import ConfigError, IncompatiblePlan
from dp_federated_lora.federated import Client, Purpose, Request, handle
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.monitoring.metrics import read_metrics
from dp_federated_lora.privacy import Ledger, PrivateEvaluation, SecureRandom, UnitId
from dp_federated_lora.training import evaluate_model, example_scores
from plans import a_plan

Raw = dict[str, dict[str, object]]
SCORING = PrivateEvaluation(noise_multiplier=2.0, every=2, loss_cap=4.0)


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=8))
def test_one_unit_moves_the_sums_by_at_most_the_root_of_three(scores: list[tuple[float, float]]):
    correct = torch.tensor([c for c, _ in scores])
    losses = torch.tensor([loss for _, loss in scores])
    for index in range(len(scores)):
        one = SCORING.tally(correct[index : index + 1], losses[index : index + 1], [UnitId("a")])
        values = [float(v) * SCORING.BOUND / 2**22 for v in one._value]
        assert sum(v * v for v in values) <= 3.0
        finite = not any(math.isnan(v) for v in scores[index])
        assert (values[1] > 0.99) == finite  # a score that is no number counts nowhere, not even as a unit


def test_released_sums_become_ratios_in_their_possible_range():
    assert SCORING.metrics(torch.tensor([40.0, 80.0, 20.0])) == {"accuracy": 0.5, "loss": 1.0, "units": 80.0}
    assert SCORING.metrics(torch.tensor([9.0, -3.0, -1.0])) == {"accuracy": 1.0, "loss": 0.0, "units": 0.0}
    for wrong in ({"every": 0}, {"loss_cap": 0.0}, {"loss_cap": math.inf}):
        with pytest.raises(IncompatiblePlan):
            PrivateEvaluation(**({"noise_multiplier": 1.0, "every": 1, "loss_cap": 1.0} | wrong))


def test_an_example_is_held_out_by_itself_and_the_seed_alone():
    everything = Examples(tuple((n, n + 1) for n in range(2000)))
    rest, held_out = everything.split(0.25, seed=3)
    assert abs(len(held_out) - 500) < 5.4 * math.sqrt(2000 * 0.25 * 0.75)  # beyond 5.4 standard errors: below 1e-7
    assert set(rest.units).isdisjoint(held_out.units)
    _, fewer = everything.subset(range(1, 2000)).split(0.25, seed=3)
    assert set(held_out.units) - set(fewer.units) <= {0}  # taking one example away moves no other
    assert set(everything.split(0.25, seed=4)[1].units) != set(held_out.units)
    assert len(everything.split(0.0, seed=3)[1]) == 0


def test_evaluation_and_training_share_one_budget():
    plain = a_plan()
    both = a_plan(evaluation=PrivateEvaluation(noise_multiplier=2.0, every=1, loss_cap=1.0))
    assert both.epsilon_after(3) > plain.epsilon_after(3)
    assert both.content_id != plain.content_id
    seldom = a_plan(evaluation=PrivateEvaluation(noise_multiplier=2.0, every=3, loss_cap=1.0))
    assert seldom.epsilon_after(2) == pytest.approx(plain.epsilon_after(2))
    assert plain.epsilon_after(3) < seldom.epsilon_after(3) < both.epsilon_after(3)


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_run_scores_held_out_data_within_its_budget(request: pytest.FixtureRequest, unit: str):
    raw = request.getfixturevalue("client_config" if unit == "client" else "raw_config")
    raw["evaluation"] = {"epsilon": 2.0, "every": 2, "holdout": 0.3}
    config = parse_config(raw, where="test")
    result = train(config)
    lines = read_metrics(result.path / "metrics.jsonl")
    assert [bool(line["private_metrics"]) for line in lines] == [line["round"] % 2 == 0 for line in lines]
    scored = next(line["private_metrics"] for line in lines if line["private_metrics"])
    assert set(scored) == {"accuracy", "loss", "units"}
    assert 0.0 <= scored["accuracy"] <= 1.0
    assert 0.9 * 8.0 < result.epsilon <= 8.0
    purposes = [row.facts["purpose"] for row in Ledger.read(result.path / "ledger.sqlite").rows() if row.kind == "reserve"]
    assert purposes.count("evaluation") == config.privacy.rounds // 2
    assert "held-out" in (result.path / "report.html").read_text()


def test_without_noise_the_sums_are_those_of_the_data(raw_config: Raw):
    raw_config["evaluation"] = {"epsilon": 2.0, "every": 2, "holdout": 0.5}
    config = parse_config(raw_config, where="test")
    plan = privacy_plan(config)
    bench = Workbench.of(config)
    client = max(bench.clients(plan), key=lambda c: len(c.held_out))
    correct, losses = example_scores(bench.learner, client.held_out)
    assert float(correct.mean()) == pytest.approx(evaluate_model(bench.learner, client.held_out)["accuracy"])
    ask = Request(Purpose.EVALUATION, 2, plan.content_id, bench.model.state(), plan.clip_norm)
    sums = handle(ask, client, bench.learner, SecureRandom.insecure_from(1))._value.double() * 3**0.5 / 2**22
    expected = [float(correct.sum()), len(client.held_out), float((losses / 4.0).clamp(max=1.0).sum())]
    assert sums.tolist() == pytest.approx(expected, abs=1e-3)
    unasked = Client("x", client.examples, a_plan(), client.method, None, client.held_out)
    other = Request(Purpose.EVALUATION, 2, a_plan().content_id, bench.model.state(), 1.0)
    with pytest.raises(IncompatiblePlan, match="without evaluation"):
        handle(other, unasked, bench.learner, SecureRandom.insecure_from(1))


def test_a_run_killed_during_an_evaluation_goes_on_and_keeps_the_charge(raw_config: Raw, monkeypatch: pytest.MonkeyPatch):
    raw_config["evaluation"] = {"epsilon": 2.0, "every": 2}
    config = parse_config(raw_config, where="test")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrivateEvaluation, "metrics", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    before = Ledger.read(Path(config.run.out) / "ledger.sqlite").spent()
    result = train(resume=config.run.out)
    assert result.rounds == config.privacy.rounds
    assert before.epsilon < result.epsilon <= 8.0
    assert read_metrics(result.path / "metrics.jsonl")[-1]["private_metrics"]


@pytest.mark.parametrize(
    ("section", "key"),
    [({"epsilon": 8.0, "every": 1}, "evaluation.epsilon"), ({"epsilon": 1.0, "every": 99}, "evaluation.every")],
)
def test_impossible_evaluations_are_refused(raw_config: Raw, section: dict[str, object], key: str):
    raw_config["evaluation"] = section
    with pytest.raises(ConfigError, match=key):
        parse_config(raw_config, where="test")
