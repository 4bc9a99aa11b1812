"""Groups with budgets of their own: what they get, and that nobody pays more than declared."""

from __future__ import annotations

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy import Budget, Composition, Personalisation, Tier, personal_tiers

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
    z, tiers = personal_tiers(GROUPS, variant=variant, sampling_rate=0.05, rounds=50)
    for tier in tiers:
        assert 0.99 * tier.budget.epsilon <= spent(z, tier, 50) <= tier.budget.epsilon


def test_sample_keeps_the_mean_rate_and_lets_the_generous_take_part_more_often():
    z, tiers = personal_tiers(GROUPS, variant=Personalisation.SAMPLE, sampling_rate=0.05, rounds=50)
    rates = [t.sampling_rate for t in tiers]
    assert rates == sorted(rates)
    assert sum(t.units * t.sampling_rate for t in tiers) / 1000 == pytest.approx(0.05, rel=1e-3)
    assert all(t.clip_share == 1.0 for t in tiers)
    del z


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
