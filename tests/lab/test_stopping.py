"""Runs that end early: by rule, by hand, by a crash. Whatever ended them, they state no less than their whole plan."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from databases import Place
from dp_federated_lora import train
from dp_federated_lora.errors import ConfigError, RunInterrupted
from dp_federated_lora.federated import RoundReport
from dp_federated_lora.lab.attestation import Attestation
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import TrainResult
from dp_federated_lora.lab.stopping import reason_to_stop
from dp_federated_lora.privacy import GaussianMechanism, Ledger, PrivateEvaluation

Raw = dict[str, dict[str, object]]


def patient(raw: Raw, patience: int = 1) -> Config:
    """Scored on held-out data after every round."""
    raw["evaluation"] = {"epsilon": 2.0, "every": 1, "holdout": 0.3}
    raw["training"]["patience"] = patience
    return parse_config(raw, where="test")


def reports(*scores: float | None, metric: str = "accuracy", public: bool = False) -> list[RoundReport]:
    """A report for each score; None for a round without an evaluation."""
    facts = {"rounds": 99, "epsilon": 1.0, "delta": 1e-5, "update_norm": 1.0, "noise_norm": 1.0, "clip_norm": 1.0}
    values = [{} if score is None else {metric: score} for score in scores]
    return [
        RoundReport(**facts, round=n, bytes_per_client=1, public_metrics=v if public else {}, private_metrics={} if public else v)
        for n, v in enumerate(values, start=1)
    ]


def test_the_rule_waits_for_as_many_evaluations_without_a_gain_as_it_says(raw_config: Raw):
    config = patient(raw_config, 2)
    for scores in ((), (0.5,), (0.5, 0.4), (0.5, 0.4, 0.6), (0.5, None, None, 0.4), (float("nan"), 0.2, 0.1)):
        assert reason_to_stop(config, reports(*scores)) is None, scores
    for scores in ((0.5, 0.4, 0.4), (0.5, 0.5, 0.5), (0.1, 0.5, None, 0.4, None, 0.5)):
        assert "no gain in held-out accuracy in 2 evaluations: best 0.5000" in str(reason_to_stop(config, reports(*scores)))
    assert reason_to_stop(config, reports(0.5, 0.4, 0.3, public=True)) is None  # held-out scores come first
    del raw_config["evaluation"]
    watching_public = parse_config(raw_config, where="test")
    assert "public accuracy" in str(reason_to_stop(watching_public, reports(0.5, 0.4, 0.3, public=True)))
    del raw_config["training"]["patience"]
    assert reason_to_stop(parse_config(raw_config, where="test"), reports(*[0.5] * 9, public=True)) is None


def test_a_language_model_is_watched_by_its_loss_which_should_fall(raw_config: Raw):
    raw_config["model"]["task"] = "causal-lm"
    del raw_config["data"]["label_column"], raw_config["data"]["labels"]
    raw_config["federation"] = {"clients": 4}
    config = patient(raw_config)
    assert reason_to_stop(config, reports(3.0, 2.9, 2.8, metric="loss")) is None
    assert "best 2.9000 after round 2" in str(reason_to_stop(config, reports(3.0, 2.9, 3.1, metric="loss")))


def test_patience_without_scores_is_refused(raw_config: Raw):
    raw_config["training"]["patience"] = 2
    del raw_config["data"]["test"]
    with pytest.raises(ConfigError, match=r"training\.patience"):
        parse_config(raw_config, where="test")


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out scores fall from the first evaluation on."""
    values = iter([0.9 - 0.1 * n for n in range(8)])
    monkeypatch.setattr(PrivateEvaluation, "metrics", lambda *_: {"accuracy": next(values), "loss": 1.0, "units": 9.0})


def claims(result: TrainResult) -> set[float]:
    return {row.epsilon for row in result.statement if row.epsilon is not None}


@pytest.mark.usefixtures("falling")
def test_a_run_that_stops_by_rule_states_all_planned_rounds_and_resumes_to_the_same_end(raw_config: Raw):
    config = patient(raw_config)
    plan = privacy_plan(config)
    result = train(config)
    assert result.rounds == 2 < plan.rounds
    assert "no gain in held-out accuracy" in str(result.stopped)
    spend = Ledger.read(result.path / "ledger.sqlite").spent()
    assert spend.epsilon == pytest.approx(plan.epsilon_after(2))
    assert claims(result) == {result.epsilon} == {plan.epsilon_after(plan.rounds)}
    assert result.epsilon > 1.2 * spend.epsilon
    privacy = json.loads((result.path / "privacy.json").read_text())
    assert (privacy["published_rounds"], privacy["planned_rounds"]) == (2, 4)
    assert privacy["stopped"] == result.stopped
    assert privacy["epsilon_charged"] == spend.epsilon < privacy["statement"][0]["epsilon"] == result.epsilon
    assert "of all 4 planned rounds" in " ".join(privacy["statement"][0]["assumptions"])
    page = (result.path / "report.html").read_text()
    assert "Ended early" in page
    assert "of all 4 planned rounds" in page
    assert Attestation.of(result.path).statement == result.statement
    again = train(resume=result.path)
    assert (again.rounds, again.epsilon) == (2, result.epsilon)
    assert Ledger.read(result.path / "ledger.sqlite").spent() == spend


def test_a_run_stopped_by_hand_and_never_resumed_states_all_planned_rounds(raw_config: Raw):
    config = parse_config(raw_config, where="test")
    with pytest.raises(RunInterrupted):
        train(config, on_round=lambda _: os.kill(os.getpid(), signal.SIGINT))
    run, plan = Path(config.run.out), privacy_plan(config)
    stated = Attestation.of(run)
    assert stated.ledger.spent().charges == 1
    assert {row.epsilon for row in stated.statement} == {plan.epsilon_after(plan.rounds), None}


def test_a_run_that_died_in_a_round_states_its_budget_until_the_round_is_published(
    raw_config: Raw, monkeypatch: pytest.MonkeyPatch
):
    config = parse_config(raw_config, where="test")
    with monkeypatch.context() as patch:
        patch.setattr(GaussianMechanism, "release", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            train(config)
    run, plan = Path(config.run.out), privacy_plan(config)
    stated = Attestation.of(run).statement
    assert {row.epsilon for row in stated} == {8.0, None}
    assert "the whole budget" in " ".join(stated[0].assumptions)
    assert plan.epsilon_after(plan.rounds) <= train(resume=run).epsilon < 8.0


def test_groups_of_budgets_state_all_planned_rounds_too(raw_config: Raw):
    raw_config["privacy"]["groups"] = [
        {"epsilon": 8.0, "clients": 1, "population": 60},
        {"epsilon": 4.0, "clients": 3, "population": 60},
    ]
    raw_config["privacy"]["personalisation"] = "scale"
    config = parse_config(raw_config, where="test")
    with pytest.raises(RunInterrupted):
        train(config, on_round=lambda _: os.kill(os.getpid(), signal.SIGINT))
    plan = privacy_plan(config)
    stated = [row.epsilon for row in Attestation.of(Path(config.run.out)).statement[:2]]
    assert stated == [plan.epsilon_of(tier, plan.rounds) for tier in plan.tiers]
    assert stated == pytest.approx([8.0, 4.0], rel=1e-3)


def test_what_early_stopping_saves_in_lifetime_budgets_is_real(raw_config: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A Renyi filter admits choices made after outputs, to stop among them: rounds that were not run are not counted."""
    place = Place(str(tmp_path / "lifetime.sqlite"), tmp_path / "lifetime.key")
    raw_config["privacy"]["allow_weak_privacy"] = True
    raw_config["ledger"] = {"database": place.where, "key": str(place.key), "data_set": "mail", "epsilon": 60.0}
    config = patient(raw_config)

    def spent_with(accuracies: list[float], out: str) -> tuple[int, float]:
        before = Ledger.read_all(place.where)[0].spent().epsilon if Path(place.where).exists() else 0.0
        values = iter(accuracies)
        monkeypatch.setattr(PrivateEvaluation, "metrics", lambda *_: {"accuracy": next(values), "loss": 1.0, "units": 9.0})
        rounds = train(config, out=tmp_path / out).rounds
        (after,) = {ledger.spent().epsilon for ledger in Ledger.read_all(place.where)}
        return rounds, after - before

    spent_with([0.4, 0.3], "first")  # the conversion to epsilon is paid once; from here on spending is proportional
    assert spent_with([0.4, 0.3], "early") == (2, pytest.approx(spent_with([0.1, 0.2, 0.3, 0.4], "whole")[1] / 2))
