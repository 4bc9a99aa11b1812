"""Groups with budgets of their own: what they get, and that nobody pays more than declared."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from dp_federated_lora import train
from dp_federated_lora.errors import ConfigError, IncompatiblePlan
from dp_federated_lora.federated import Server
from dp_federated_lora.lab.budgets import Personalisation, personal_tiers
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.statement import state_privacy
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import (
    Budget,
    Composition,
    PrivacyPlan,
    PrivacyUnit,
    SecureRandom,
    Spend,
    Tier,
    UnitId,
    clip_examples,
)

DELTA = 1e-5
GROUPS = [(Budget(1.0, DELTA), 300), (Budget(3.0, DELTA), 500), (Budget(8.0, DELTA), 200)]


def spent(z: float, tier: Tier, rounds: int) -> float:
    composition = Composition()
    composition.add(PoissonSampledDpEvent(tier.sampling_rate, GaussianDpEvent(z / tier.clip_share)), rounds)
    return composition.epsilon(DELTA)


def test_scale_gives_the_clip_norms_of_the_formula():
    z, tiers = personal_tiers(GROUPS, variant=Personalisation.SCALE, sampling_rate=0.01, rounds=1000)
    multipliers = [z / t.clip_share for t in tiers]
    assert multipliers == pytest.approx([1.4146, 0.8136, 0.5863], rel=1e-3)
    total = sum(t.units for t in tiers)
    scale = 1 / sum(t.units / total / m for t, m in zip(tiers, multipliers, strict=True))
    assert scale == pytest.approx(0.85633, rel=1e-3)
    mean_share = sum(t.units * t.clip_share for t in tiers) / total
    assert [t.clip_share / mean_share for t in tiers] == pytest.approx([0.6053, 1.0525, 1.4607], rel=1e-3)
    assert max(t.clip_share for t in tiers) == 1.0


@pytest.mark.parametrize("variant", list(Personalisation))
def test_each_group_stays_within_its_budget_and_uses_it(variant: Personalisation):
    z, tiers = personal_tiers(GROUPS[:2], variant=variant, sampling_rate=0.1, rounds=20)
    for tier in tiers:
        assert 0.99 * tier.budget.epsilon <= spent(z, tier, 20) <= tier.budget.epsilon
    rates, shares = [t.sampling_rate for t in tiers], [t.clip_share for t in tiers]
    if variant is Personalisation.SAMPLE:  # the mean rate is kept, and the generous take part more often
        assert rates[0] < rates[1]
        assert sum(t.units * t.sampling_rate for t in tiers) / 800 == pytest.approx(0.1, rel=1e-3)
        assert shares == [1.0, 1.0]
    else:
        assert rates == [0.1, 0.1]
        assert shares[0] < shares[1] == 1.0


def test_one_budget_for_all_is_the_ordinary_plan():
    for variant in Personalisation:
        z, (tier,) = personal_tiers([(Budget(3.0, DELTA), 10)], variant=variant, sampling_rate=0.05, rounds=50)
        assert tier.sampling_rate == pytest.approx(0.05, rel=1e-3)
        assert tier.clip_share == 1.0
        assert spent(z, tier, 50) <= 3.0


def test_empty_groups_are_refused():
    for groups in ([], [(Budget(1.0, DELTA), 0)]):
        with pytest.raises(IncompatiblePlan, match="at least one group"):
            personal_tiers(groups, variant=Personalisation.SCALE, sampling_rate=0.1, rounds=1)


def grouped(variant: Personalisation) -> PrivacyPlan:
    return PrivacyPlan.calibrated(
        unit=PrivacyUnit.CLIENT,
        budget=Budget(8.0, DELTA),
        population=1000,
        sampling_rate=0.3,
        rounds=4,
        clip_norm=2.0,
        groups=personal_tiers(
            [(Budget(2.0, DELTA), 400), (Budget(8.0, DELTA), 600)], variant=variant, sampling_rate=0.3, rounds=4
        ),
    )


def test_a_plan_draws_each_group_at_its_own_rate_and_clips_it_to_its_own_share():
    sample, scale = grouped(Personalisation.SAMPLE), grouped(Personalisation.SCALE)
    careful, generous = sample.tiers
    drawn = sample.draw(range(1000), SecureRandom.insecure_from(1), number=1)
    for size, members, tier in ((400, drawn[drawn < 400], careful), (600, drawn[drawn >= 400], generous)):
        spread = math.sqrt(size * tier.sampling_rate * (1 - tier.sampling_rate))
        assert abs(len(members) - size * tier.sampling_rate) < 5.4 * spread  # false positives below 1e-7
    with pytest.raises(IncompatiblePlan, match="no population of 999"):
        sample.draw(range(999), SecureRandom.insecure_from(1), number=1)
    total = scale.clip(torch.full((1, 9), 50.0), 2.0, [UnitId("a")], tier=0)
    norm = math.sqrt(sum(int(v) ** 2 for v in total._value)) * 2.0 / 2**22
    assert norm == pytest.approx(2.0 * scale.tiers[0].clip_share, rel=1e-5)
    assert norm <= 2.0 * scale.tiers[0].clip_share
    assert total.clip_norm == 2.0  # one lattice for all groups
    with pytest.raises(Exception, match="share of the clip norm"):
        clip_examples(torch.ones(1, 2), 1.0, [UnitId("a")], share=1.5)


@pytest.mark.parametrize("variant", list(Personalisation))
def test_the_statement_has_a_row_for_each_declared_budget(variant: Personalisation):
    plan = grouped(variant)
    rows = state_privacy(plan, spend=Spend(8.0, DELTA, 4, 4), insecure=False)
    found = [(row.unit, row.epsilon) for row in rows if row.adversary == "other participants"]
    assert [unit for unit, _ in found] == ["client (declared epsilon 2)", "client (declared epsilon 8)"]
    assert 1.9 < found[0][1] <= 2.0 < 7.9 < found[1][1] <= 8.0
    assert plan.event == plan.event_of(plan.tiers[1])  # what the run's ledger is charged is the dearest group's


def test_plans_whose_groups_do_not_fit_are_refused():
    plan = grouped(Personalisation.SAMPLE)
    careful, generous = plan.tiers
    with pytest.raises(IncompatiblePlan, match="cost a unit"):
        replace(plan, tiers=(replace(careful, sampling_rate=0.9), generous))
    with pytest.raises(IncompatiblePlan, match="dearest group"):
        replace(plan, tiers=(careful,))


@pytest.mark.parametrize("variant", ["sample", "scale"])
def test_a_run_keeps_every_group_within_its_budget(request: pytest.FixtureRequest, variant: str):
    unit = "client" if variant == "sample" else "example"
    raw = request.getfixturevalue("client_config" if unit == "client" else "raw_config")
    populations = {} if unit == "client" else {"population": 60}
    raw["privacy"] |= {
        "personalisation": variant,
        "groups": [{"epsilon": 2.0, "clients": 2, **populations}, {"epsilon": 8.0, "clients": 2, **populations}],
    }
    config = parse_config(raw, where="test")
    bench = Workbench.of(config)
    assert [client.tier for client in bench.clients(privacy_plan(config))] == [0, 0, 1, 1]
    result = train(config)
    epsilons = [row.epsilon for row in result.statement if row.adversary == "recipients of the model"]
    assert 1.9 < epsilons[0] <= 2.0
    assert 7.9 < epsilons[1] <= 8.0


def test_no_group_pays_for_more_rounds_than_were_planned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    raw = request.getfixturevalue("client_config")
    raw["privacy"]["groups"] = [{"epsilon": 2.0, "clients": 2}, {"epsilon": 8.0, "clients": 2}]
    config = parse_config(raw, where="test")
    key_lost = []

    def stop(report):
        if report.round == 1 and not key_lost:
            key_lost.append(True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_round=stop)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Server, "run_round", die)
        with pytest.raises(KeyboardInterrupt):
            train(resume=config.run.out)
    (Path(config.run.out) / "state" / "round.key").unlink()  # its round must be charged again
    result = train(resume=config.run.out)
    assert result.rounds == 2
    assert "all are made" in str(result.stopped)


@pytest.mark.parametrize(
    "groups",
    [
        [{"epsilon": 2.0, "clients": 2}, {"epsilon": 8.0, "clients": 1}],
        [{"epsilon": 2.0, "clients": 2}, {"epsilon": 4.0, "clients": 2}],
    ],
)
def test_impossible_groups_are_refused(request: pytest.FixtureRequest, groups: list[dict[str, object]]):
    raw = request.getfixturevalue("client_config")
    raw["privacy"]["groups"] = groups
    with pytest.raises(ConfigError, match="privacy.groups"):
        parse_config(raw, where="test")
