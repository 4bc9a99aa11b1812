from __future__ import annotations

import itertools
from pathlib import Path

import dp_accounting as da
import numpy as np
import pytest
from scipy import stats

from dp_federated_lora.errors import IncompatiblePlan, PermitMismatch, PrivacyError, UnsupportedEvent
from dp_federated_lora.privacy import (
    BoundedSum,
    Budget,
    Composition,
    CyclicPoissonSampler,
    DpEvent,
    FixedSizeSampler,
    GaussianMechanism,
    Ledger,
    PoissonSampler,
    SecureRandom,
    TruncatedPoissonSampler,
    epsilon_rdp,
    event_from_json,
    event_to_json,
)

ALPHA = 1e-7  # false-positive rate of each statistical test below
ONE = GaussianMechanism(1.0).event
TRUNCATED = TruncatedPoissonSampler(0.01, 130, 10_000).amplify(ONE)
FIXED = FixedSizeSampler(100, 10_000).amplify(ONE)


def epsilon(event: DpEvent, rounds: int) -> float:
    composition = Composition()
    composition.add(event, rounds)
    return composition.epsilon(1e-5)


def test_a_capped_poisson_cohort_costs_twice_a_poisson_one():
    # dp-accounting 0.6.0, PLDAccountant(REPLACE_SPECIAL), interval 1e-4: 3.684
    assert epsilon(TRUNCATED, 1000) == pytest.approx(3.684, abs=2e-3)
    assert epsilon(TRUNCATED, 10) > epsilon(PoissonSampler(0.01).amplify(ONE), 10)


def test_a_cohort_of_fixed_size_is_charged_for_replacing_a_unit():
    # RdpAccountant(REPLACE_ONE) gives 3.576 to whoever passes z for a clipped sum; its sensitivity is 2 C.
    assert epsilon(FIXED, 1000) == pytest.approx(20.99, abs=5e-3)
    naive = da.SampledWithoutReplacementDpEvent(10_000, 100, da.GaussianDpEvent(1.0))
    assert epsilon(naive, 1000) == pytest.approx(3.576, abs=5e-3)
    assert naive != FIXED
    assert FixedSizeSampler(100, 10_000).amplify(GaussianMechanism(2.0).event) == naive


def test_the_event_that_is_wrong_for_the_noise_buys_no_release(tmp_path: Path):
    naive = da.SampledWithoutReplacementDpEvent(10_000, 100, da.GaussianDpEvent(1.0))
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=Budget(100.0, 1e-5), owner="t")
    total = BoundedSum.collect([], size=3, clip_norm=1.0)
    for number, event in enumerate((FIXED, naive), start=1):
        key = SecureRandom.from_os()
        permit = ledger.reserve(event, round=number, purpose="training", commitment=key.commitment)
        if event == naive:
            with pytest.raises(PermitMismatch, match=r"2\.0 was charged"):
                GaussianMechanism(1.0).release(total, charged=event, permit=permit, rng=key)
        else:
            assert GaussianMechanism(1.0).release(total, charged=event, permit=permit, rng=key).noise_std == 1.0


@pytest.mark.parametrize(("first", "second"), [(FIXED, ONE), (ONE, FIXED)])
def test_two_neighbouring_relations_are_never_added_up(first: DpEvent, second: DpEvent):
    composition = Composition()
    composition.add(first)
    before = composition.epsilon(1e-5)
    with pytest.raises(UnsupportedEvent, match="replace-one"):
        composition.add(second)
    assert composition.epsilon(1e-5) == before
    with pytest.raises(UnsupportedEvent, match="no Renyi bound"):
        epsilon_rdp([(first, 1), (second, 1)], 1e-5)


def test_a_copy_of_a_composition_of_fixed_cohorts_leaves_the_first_alone():
    composition = Composition()
    composition.add(FIXED)
    before = composition.epsilon(1e-5)
    assert composition.with_event(FIXED).epsilon(1e-5) > before
    assert composition.epsilon(1e-5) == before


def test_repeated_and_free_events_compose_as_they_say():
    once, twice = Composition(), Composition()
    twice.add(da.SelfComposedDpEvent(ONE, 3), 2)
    once.add(ONE, 6)
    once.add(da.NoOpDpEvent())
    assert twice.epsilon(1e-5) == once.epsilon(1e-5)
    free = Composition()
    free.add(da.NoOpDpEvent(), 5)
    assert free.epsilon(1e-5) == 0.0
    with pytest.raises(UnsupportedEvent, match="no Renyi bound"):
        epsilon_rdp([(TRUNCATED, 1)], 1e-5)


@pytest.mark.parametrize(
    "case", [TRUNCATED, FIXED, da.NoOpDpEvent(), da.SelfComposedDpEvent(PoissonSampler(0.1).amplify(ONE), 7)]
)
def test_events_survive_json(case: DpEvent):
    assert event_from_json(event_to_json(case)) == case


@pytest.mark.parametrize(
    "case",
    [
        da.SelfComposedDpEvent(da.SelfComposedDpEvent(ONE, 2), 2),
        da.SelfComposedDpEvent(ONE, 0),
        da.SampledWithoutReplacementDpEvent(10, 11, ONE),
        da.SampledWithoutReplacementDpEvent(0, 0, ONE),
        da.SampledWithoutReplacementDpEvent(10, 5, PoissonSampler(0.1).amplify(ONE)),
        da.TruncatedSubsampledGaussianDpEvent(100, 0.1, 101, 1.0),
        da.TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 0.0),
        da.PoissonSampledDpEvent(0.1, da.SelfComposedDpEvent(ONE, 2)),
    ],
)
def test_impossible_events_are_neither_written_nor_charged(case: DpEvent):
    with pytest.raises(UnsupportedEvent):
        event_to_json(case)
    with pytest.raises((UnsupportedEvent, PrivacyError)):
        Composition().add(case)


@pytest.mark.parametrize(
    "data",
    [
        {"event": "repeated", "of": {"event": "gaussian", "noise_multiplier": 1.0}, "count": 0},
        {"event": "repeated", "of": {"event": "gaussian", "noise_multiplier": 1.0}, "count": "many"},
        {"event": "fixed_size", "population": 10, "cohort": 20, "of": {"event": "gaussian", "noise_multiplier": 1.0}},
        {"event": "fixed_size", "population": 10, "cohort": 2},
        {"event": "poisson", "sampling_rate": "0.1", "of": {"event": "gaussian", "noise_multiplier": 1.0}},
        {"event": "poisson", "sampling_rate": 0.1, "of": 1.0},
        {"event": ["gaussian"], "noise_multiplier": 1.0},
    ],
)
def test_malformed_events_are_refused(data: object):
    with pytest.raises(UnsupportedEvent):
        event_from_json(data)


def test_a_capped_cohort_never_exceeds_its_cap_and_is_fair():
    sampler, draws = TruncatedPoissonSampler(0.5, 5, 10), 20_000
    rng = SecureRandom.from_os()
    cohorts = [sampler.draw(10, rng) for _ in range(draws)]
    assert max(len(cohort) for cohort in cohorts) == 5
    assert all((np.diff(cohort) > 0).all() for cohort in cohorts)
    sizes = np.bincount([len(cohort) for cohort in cohorts], minlength=6)
    law = stats.binom.pmf(np.arange(6), 10, 0.5)
    law[5] = 1.0 - law[:5].sum()
    assert stats.chisquare(sizes, law * draws).pvalue > ALPHA
    share = float(law @ np.arange(6)) / 10
    for unit in (0, 9):
        assert stats.binomtest(sum(unit in cohort for cohort in cohorts), draws, share).pvalue > ALPHA


def test_a_fixed_cohort_is_a_uniform_subset():
    sampler, rng = FixedSizeSampler(2, 5), SecureRandom.from_os()
    counts = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for _ in range(10_000):
        counts[tuple(sampler.draw(5, rng).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > ALPHA


@pytest.mark.parametrize("sampler", [TruncatedPoissonSampler(0.1, 5, 10), FixedSizeSampler(5, 10)])
def test_another_population_than_the_one_accounted_for_is_refused(sampler: TruncatedPoissonSampler | FixedSizeSampler):
    with pytest.raises(PrivacyError, match="9 units"):
        sampler.draw(9, SecureRandom.from_os())


@pytest.mark.parametrize(
    "make",
    [
        lambda: TruncatedPoissonSampler(0.0, 5, 10),
        lambda: TruncatedPoissonSampler(0.1, 11, 10),
        lambda: FixedSizeSampler(0, 10),
        lambda: FixedSizeSampler(11, 10),
        lambda: CyclicPoissonSampler(0, 0.5),
        lambda: CyclicPoissonSampler(3, 1.5),
    ],
)
def test_impossible_samplers_are_refused(make):
    with pytest.raises(IncompatiblePlan):
        make()
