import math
from collections.abc import Callable

import dp_accounting as da
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError, UnsupportedEvent
from dp_federated_lora.privacy import (
    Composition,
    GaussianMechanism,
    PoissonSampler,
    calibrate_noise_multiplier,
    epsilon_rdp,
    event_from_json,
    event_to_json,
)
from dp_federated_lora.privacy.accounting import LEAST_NOISE
from plans import a_plan


def event(q: float, z: float) -> da.DpEvent:
    return PoissonSampler(q).amplify(GaussianMechanism(z).event)


def epsilon(q: float, z: float, rounds: int) -> float:
    composition = Composition()
    composition.add(event(q, z), rounds)
    return composition.epsilon(1e-5)


@pytest.mark.parametrize(
    ("q", "z", "rounds", "pld", "rdp"),
    [
        (0.01, 1.0, 1000, 1.8282, 2.1014),
        (0.05, 1.0, 100, 3.5021, 4.0389),
        (0.1, 2.0, 50, 1.6525, 1.8440),
        (1.0, 10.0, 100, 4.3772, 4.7285),
        (0.1, 1.0, 100, 7.0466, 7.9),
    ],
)
def test_reference_epsilons_of_both_accountants(q: float, z: float, rounds: int, pld: float, rdp: float):
    assert pld - 1e-4 <= epsilon(q, z, rounds) <= pld + 2e-3  # never below, and close above
    assert epsilon_rdp([(event(q, z), rounds)], 1e-5) == pytest.approx(rdp, abs=5e-2 if rdp == 7.9 else 2e-4)


@pytest.mark.parametrize(("target", "z"), [(1.0, 3.730632), (4.0, 1.081162), (8.0, 0.600229)])
def test_calibration_of_one_gaussian_release(target: float, z: float):
    found = calibrate_noise_multiplier(epsilon=target, delta=1e-5, sampling_rate=1.0, rounds=1)
    assert z <= found <= z * 1.001


@pytest.mark.parametrize(("target", "z"), [(1.0, 3.9417), (3.0, 1.6747), (6.0, 1.0911), (8.0, 0.9359)])
def test_calibration_of_a_sampled_run(target: float, z: float):
    found = calibrate_noise_multiplier(epsilon=target, delta=1e-5, sampling_rate=0.1, rounds=100)
    assert z * 0.9999 <= found <= z * 1.001
    assert epsilon(0.1, found, 100) <= target


def test_a_calibrated_run_charged_round_by_round_stays_within_its_target():
    z = calibrate_noise_multiplier(epsilon=3.0, delta=1e-5, sampling_rate=0.2, rounds=60)
    composition = Composition()
    for _ in range(60):
        composition.add(event(0.2, z))
    assert 2.99 < composition.epsilon(1e-5) <= 3.0
    assert composition.with_event(event(0.2, z)).epsilon(1e-5) > 3.0


@given(st.floats(0.01, 1.0), st.floats(0.7, 5.0), st.integers(1, 40))
@settings(deadline=None, max_examples=15)
def test_renyi_never_claims_less_than_the_pld(q: float, z: float, rounds: int):
    ours = epsilon(q, z, rounds)
    assert 0.0 <= ours <= epsilon_rdp([(event(q, z), rounds)], 1e-5) + 1e-3


def test_more_rounds_more_sampling_and_less_noise_all_cost_more():
    base = epsilon(0.1, 1.0, 10)
    assert base < epsilon(0.1, 1.0, 11)
    assert base < epsilon(0.11, 1.0, 10)
    assert base < epsilon(0.1, 0.95, 10)
    assert Composition().epsilon(1e-5) == 0.0


@pytest.mark.parametrize("case", [event(0.1, 1.5), event(1.0, 2.0)])
def test_events_survive_json(case: da.DpEvent):
    assert event_from_json(event_to_json(case)) == case


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"event": "os.system"},
        {"event": "gaussian"},
        {"event": "gaussian", "noise_multiplier": -1.0},
        {"event": "gaussian", "noise_multiplier": float("nan")},
        {"event": "gaussian", "noise_multiplier": 0.0},
        {"event": "poisson", "sampling_rate": 2.0, "of": {"event": "gaussian", "noise_multiplier": 1.0}},
    ],
)
def test_events_outside_the_closed_table_are_refused(data: object):
    with pytest.raises(UnsupportedEvent):
        event_from_json(data)


def test_other_events_of_the_library_are_not_charged_silently():
    with pytest.raises(UnsupportedEvent, match="nothing was charged"):
        Composition().add(da.LaplaceDpEvent(1.0))
    with pytest.raises(PrivacyError, match="at least once"):
        Composition().add(event(0.1, 1.0), 0)


def test_an_unreachable_target_says_so():
    with pytest.raises(PrivacyError, match="raise epsilon"):
        calibrate_noise_multiplier(epsilon=1e-6, delta=1e-9, sampling_rate=1.0, rounds=10_000)


@pytest.mark.parametrize(
    "heavy",
    [
        lambda: GaussianMechanism(1e-3),
        lambda: Composition().add(event(1.0, 1.0), 10_000_000),
        lambda: a_plan(rounds=10_000_000),
        lambda: calibrate_noise_multiplier(epsilon=1e6, delta=1e-5, sampling_rate=1.0, rounds=1),
        lambda: calibrate_noise_multiplier(epsilon=1.0, delta=1e-5, sampling_rate=1e-6, rounds=1),
    ],
    ids=["little noise", "many releases", "many rounds", "large epsilon", "a sample that is never drawn"],
)
def test_what_protects_nobody_is_refused_before_it_fills_the_memory(heavy: Callable[[], object]):
    with pytest.raises(IncompatiblePlan, match="protects nobody"):
        heavy()


def test_the_least_noise_is_still_accounted_for_and_less_is_no_event():
    mu = 1 / LEAST_NOISE

    def delta(at: float) -> float:  # Balle and Wang 2018, arXiv 1805.06530, Theorem 8
        return float(norm.cdf(mu / 2 - at / mu) - math.exp(at + norm.logcdf(-mu / 2 - at / mu)))

    exact = brentq(lambda at: delta(at) - 1e-5, 100, 300)
    assert exact <= epsilon(1.0, LEAST_NOISE, 1) <= 1.001 * exact
    with pytest.raises(UnsupportedEvent, match=r"at least 0\.0625"):
        Composition().add(da.GaussianDpEvent(1e-3))
    with pytest.raises(UnsupportedEvent):
        event_from_json({"event": "gaussian", "noise_multiplier": 1e-3})


def test_the_library_disagrees_with_itself_under_replace_one_which_is_why_it_is_not_offered():
    replace = da.NeighboringRelation.REPLACE_ONE
    rdp, pld = RdpAccountant(neighboring_relation=replace), PLDAccountant(replace)
    rdp.compose(da.GaussianDpEvent(1.0))
    pld.compose(da.GaussianDpEvent(1.0))
    assert rdp.get_epsilon(1e-5) == pytest.approx(4.7285, abs=1e-3)
    assert pld.get_epsilon(1e-5) == pytest.approx(9.9973, abs=1e-3)
