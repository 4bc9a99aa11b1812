"""Whole runs with correlated noise on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from safetensors import safe_open

from dp_federated_lora import plan_run, train
from dp_federated_lora.errors import (
    AuditError,
    BudgetExhausted,
    CheckpointError,
    ConfigError,
    ParticipationExceeded,
    PrivacyError,
)
from dp_federated_lora.federated import RoundReport
from dp_federated_lora.lab.attestation import Attestation
from dp_federated_lora.lab.auditing import audit
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.factorisation import prefix_error
from dp_federated_lora.lab.ledgers import verify_ledgers
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import (
    Composition,
    CorrelatedGaussian,
    CyclicPoissonSampler,
    Ledger,
    PrivacyPlan,
    SecureRandom,
    event_from_json,
)
from saved import adapter, same

Raw = dict[str, dict[str, object]]
BANDS, BUFFERS = {"bands": 2, "separation": 2}, {"buffers": 2, "separation": 2}


@pytest.fixture
def correlated(client_config: Raw) -> Raw:
    """Four clients, each with its turn in every second of five rounds, without any coin."""
    client_config["privacy"] |= {"sampling_rate": 1.0, "rounds": 5, "correlated": BANDS}
    return client_config


def configured(raw: Raw, **privacy: object) -> Config:
    raw["privacy"] |= privacy
    return parse_config(raw, where="test")


def charged(run: Path) -> list[object]:
    return [event_from_json(row.facts["event"]) for row in Ledger.read(run / "ledger.sqlite").rows() if row.kind == "reserve"]


def test_a_run_without_coins_is_charged_whole_with_its_first_round_and_says_so(correlated: Raw):
    config, seen, kept = configured(correlated), list[RoundReport](), []
    planned = plan_run(config)

    def look(report: RoundReport) -> None:
        seen.append(report)
        state = Path(config.run.out) / "state" / "checkpoint.safetensors"
        with safe_open(state, framework="pt") as file:
            kept.append((state.stat().st_mode & 0o777, {n for n in file.keys() if n.startswith("noise/")}))  # noqa: SIM118

    result = train(config, on_round=look)
    # The noise of a run under way is kept for its owner alone, and dropped with the last round.
    assert kept == [(0o600, {"noise/memory", "noise/facts"})] * 4 + [(0o600, set())]
    mechanism = planned.privacy.mechanism
    assert isinstance(mechanism, CorrelatedGaussian)
    for report in seen:
        expected = mechanism.noise_std(report.round) * planned.trainable_parameters**0.5 / 2.0
        assert report.noise_norm == pytest.approx(expected)
    assert seen[0].noise_norm < seen[1].noise_norm
    assert charged(result.path) == [planned.privacy.event, *[NoOpDpEvent()] * 4]
    assert isinstance(planned.privacy.event, GaussianDpEvent)
    assert 7.99 < result.epsilon <= 8.0
    assert {report.epsilon for report in seen} == {result.epsilon}
    facts, privacy = planned.as_json(), json.loads((result.path / "privacy.json").read_text())
    for told in (facts, privacy):
        assert (told["participations"], told["separation"], told["sampling_rate"]) == (3, 2, 1.0)
    assert facts["expected_cohort"] == 2.0
    assert facts["statement"] == privacy["statement"]
    for row in privacy["statement"][:2]:
        assert row["epsilon"] == result.epsilon
        assert not any("coins" in words for words in row["assumptions"])
        assert any("more than 3 times" in words and "2 rounds" in words for words in row["assumptions"])
    assert "at most 3, 2 apart" in (result.path / "report.html").read_text()
    verify_ledgers(str(result.path))
    assert Attestation.of(result.path).statement == result.statement


@pytest.mark.parametrize("section", [BANDS, BUFFERS])
def test_a_run_interrupted_after_any_release_resumes_to_the_same_adapter(
    correlated: Raw, section: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    correlated["run"]["insecure_seed"] = 5
    config = configured(correlated, rounds=3, correlated=section)
    whole = train(config, out=tmp_path / "whole")
    release, deaths, seen = CorrelatedGaussian.release, [1, 3], dict[int, list[torch.Tensor]]()

    def dying(self, total, state, **kwargs):
        released, following = release(self, total, state, **kwargs)
        seen.setdefault(following.round, []).append(released.value)
        if deaths[:1] == [following.round]:
            deaths.pop(0)
            raise MemoryError
        return released, following

    monkeypatch.setattr(CorrelatedGaussian, "release", dying)
    run = tmp_path / "broken"
    with pytest.raises(MemoryError):
        train(config, out=run)
    with pytest.raises(MemoryError):
        train(resume=run)
    train(resume=run)
    assert [len(values) for values in seen.values()] == [2, 1, 2]
    assert all(torch.equal(values[0], values[-1]) for values in seen.values())  # one release, however often it is computed
    assert same(adapter(run), adapter(whole.path))
    assert Ledger.read(run / "ledger.sqlite").spent().charges == 3


def test_an_older_checkpoint_is_refused_and_so_is_a_plan_that_another_library_made(
    correlated: Raw, monkeypatch: pytest.MonkeyPatch
):
    config, kept = configured(correlated, rounds=3), []
    run = Path(config.run.out)
    state = run / "state" / "checkpoint.safetensors"
    train(config, on_round=lambda r: kept.append(state.read_bytes()))
    state.write_bytes(kept[0])
    with pytest.raises(CheckpointError, match="never released again"):
        train(resume=run)
    state.write_bytes(kept[-1])
    monkeypatch.setattr(PrivacyPlan, "content_id", "0" * 64)
    with pytest.raises(CheckpointError, match="belongs to"):
        train(resume=run)


def test_a_schedule_that_lets_a_unit_take_part_too_soon_is_stopped_by_the_mechanism(
    correlated: Raw, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(CyclicPoissonSampler, "draw", lambda self, units, rng, *, number: np.arange(len(units)))
    with pytest.raises(ParticipationExceeded, match="cannot in round 2"):
        train(configured(correlated))


def test_a_lost_key_ends_the_run_rather_than_repeat_a_round(correlated: Raw, monkeypatch: pytest.MonkeyPatch):
    release = CorrelatedGaussian.release

    def dying_in(number: int):
        def dying(self, total, state, **kwargs):
            if state.round + 1 == number:
                raise MemoryError
            return release(self, total, state, **kwargs)

        return dying

    run = Path(str(correlated["run"]["out"]))
    for number, error in ((1, BudgetExhausted), (2, PrivacyError)):
        correlated["run"]["out"] = str(run / str(number))
        with monkeypatch.context() as patch:
            patch.setattr(CorrelatedGaussian, "release", dying_in(number))
            with pytest.raises(MemoryError):
                train(configured(correlated))
        (run / str(number) / "state" / "round.key").unlink()
        with pytest.raises(error):
            train(resume=run / str(number))


def test_units_can_be_examples_with_coins_and_scores_on_held_out_data(raw_config: Raw):
    raw_config["privacy"] |= {"sampling_rate": 0.5, "rounds": 6, "correlated": {"bands": 3, "separation": 3}}
    raw_config["evaluation"] = {"epsilon": 2.0, "every": 3, "holdout": 0.2}
    config = configured(raw_config)
    plan, result = privacy_plan(config), train(config)
    event = plan.event
    assert isinstance(event, SelfComposedDpEvent)
    assert (event.count, type(event.event), event.event.sampling_probability) == (2, PoissonSampledDpEvent, 0.5)
    assert plan.divisor == 0.5 * 120 / 3
    assert plan.evaluation is not None
    free = NoOpDpEvent()
    assert charged(result.path) == [event, free, free, plan.evaluation.event, free, free, free, plan.evaluation.event]
    total = Composition()
    total.add(event)
    total.add(plan.evaluation.event, 2)
    assert result.epsilon == pytest.approx(total.epsilon(1e-5), rel=1e-6)
    assert 7.99 < result.epsilon <= 8.0
    assert any("coins" in words for words in result.statement[0].assumptions)


def test_examples_take_turns_by_numbers_of_their_own(raw_config: Raw):
    raw_config["federation"] = {"clients": 120, "partition": "iid"}
    config = configured(raw_config, sampling_rate=1.0, rounds=6, correlated={"bands": 3, "separation": 3})
    plan = privacy_plan(config)
    clients = Workbench.of(config).clients(plan)
    sizes = []
    for number in (1, 2, 3):
        rng = SecureRandom.from_os()
        sizes.append(sum(len(plan.draw(client.examples.units, rng, number=number)) for client in clients))
    assert sizes == [40, 40, 40]  # of 120 participants with one example each


def test_lifetime_budgets_pay_for_the_run_once(correlated: Raw, tmp_path: Path):
    correlated["ledger"] = {"database": str(tmp_path / "life.sqlite"), "data_set": "mail", "epsilon": 9.9}
    run = train(configured(correlated)).path
    ledgers = Ledger.read_all(tmp_path / "life.sqlite")
    assert {(ledger.spent().charges, ledger.spent().epsilon > 8.0) for ledger in ledgers} == {(5, True)}
    verify_ledgers(str(run))


@pytest.mark.parametrize(
    ("privacy", "others", "message"),
    [
        ({"correlated": {"separation": 2}}, {}, "either bands or buffers"),
        ({"correlated": {"separation": 2, "bands": 2, "buffers": 2}}, {}, "either bands or buffers"),
        ({"correlated": {"separation": 6, "bands": 2}}, {}, "at most privacy.rounds"),
        ({"correlated": {"separation": 2, "bands": 3}}, {}, "would overlap"),
        ({"correlated": BUFFERS, "sampling_rate": 0.5}, {}, "cannot be accounted for by turns"),
        ({"clip_quantile": 0.5}, {}, "cannot be combined"),
        ({"groups": [{"epsilon": 8.0, "clients": 4}]}, {}, "cannot be combined"),
        ({}, {"training": {"head_rounds": 1}}, "cannot be combined"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(
    correlated: Raw, privacy: dict[str, object], others: Raw, message: str
):
    for section, changes in others.items():
        correlated[section] |= changes
    with pytest.raises(ConfigError, match=message):
        configured(correlated, **privacy)


def test_an_audit_of_correlated_noise_is_refused(correlated: Raw, tmp_path: Path):
    with pytest.raises(AuditError, match=r"without privacy\.correlated"):
        audit(configured(correlated), out=tmp_path / "audit", canaries=20)


@pytest.mark.parametrize(("section", "error"), [({"bands": 8}, 7.0968), ({"buffers": 3}, 7.98)])
def test_without_sampling_sums_of_updates_are_less_noisy_than_with_independent_noise(
    correlated: Raw, section: dict[str, object], error: float
):
    variances, choices = [], (section, {"bands": 1})
    for choice in choices:
        plan = privacy_plan(configured(correlated, rounds=64, correlated={"separation": 8} | choice))
        assert isinstance(plan.mechanism, CorrelatedGaussian)
        assert plan.epsilon_after(1) == pytest.approx(8.0, rel=1e-4)
        variances.append(plan.mechanism.noise_std(1) ** 2 * prefix_error(plan.mechanism.correlation.column(64), 64))
    # Mean squared error of all prefix sums of 64 rounds: 32.5 for independent noise; the bands' is jax-privacy's (see
    # test_factorisation.py), and buffers of rounds that overlap come near it.
    assert variances[0] / variances[1] == pytest.approx(error / 32.5, rel=1e-3)
