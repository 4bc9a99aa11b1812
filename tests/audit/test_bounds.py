"""Bounds against published values, and against a second computation of each."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm

from dp_federated_lora.audit.bounds import (
    Guesses,
    clopper_pearson,
    cosine_estimate,
    curve_through,
    f_dp_refuted,
    gaussian_curve,
    gaussian_f_dp_bound,
    gaussian_pair_epsilon,
    largest_refuted,
    one_run_bound,
)
from dp_federated_lora.errors import AuditError

# m, r, v; bounds at 95 % for delta 0, delta 1e-5, and by f-DP at 1e-5
PUBLISHED = [
    (100, 100, 70, 0.4717, 0.4714, 1.0607),
    (1000, 1000, 600, 0.2975, 0.2972, 0.5835),
    (1000, 1000, 750, 0.9767, 0.9764, 1.8189),
    (1000, 200, 190, 2.3979, 2.3936, 3.9161),
    (10_000, 1000, 1000, 5.8091, 5.5293, 8.9877),
    (1000, 100, 100, 3.4930, 3.4654, 5.5490),
]


@pytest.mark.parametrize(("m", "r", "v", "pure", "approximate", "f_dp"), PUBLISHED)
def test_bounds_are_those_of_the_reference(m: int, r: int, v: int, pure: float, approximate: float, f_dp: float):
    guesses = Guesses(m, r, v)
    assert one_run_bound(guesses, delta=0.0, confidence=0.95) == pytest.approx(pure, abs=1e-4)
    assert one_run_bound(guesses, delta=1e-5, confidence=0.95) == pytest.approx(approximate, abs=1e-4)
    assert gaussian_f_dp_bound(guesses, delta=1e-5, confidence=0.95) == pytest.approx(f_dp, abs=1e-4)


def exact_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 by sums of exact binomial terms in 50 digits."""
    with mpmath.workdps(50):
        q = 1 / (1 + mpmath.exp(-epsilon))
        mass = [mpmath.binomial(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
        tail = sum(mass[v:])
        slope = max([mpmath.mpf(0)] + [sum(mass[v - i : v]) / i for i in range(1, v + 1)])
        return float(min(1, tail + 2 * m * delta * slope))


@pytest.mark.parametrize(
    ("m", "r", "v", "delta"), [(100, 100, 70, 1e-5), (60, 40, 36, 1e-3), (200, 30, 30, 1e-4), (50, 50, 33, 0.0)]
)
def test_the_one_run_bound_is_where_exact_binomial_sums_reach_the_significance(m: int, r: int, v: int, delta: float):
    bound = one_run_bound(Guesses(m, r, v), delta=delta, confidence=0.95)
    assert exact_p_value(m, r, v, bound, delta) <= 0.05 * (1 + 1e-6)
    assert exact_p_value(m, r, v, bound + 1e-4, delta) > 0.05


def test_all_guesses_right_has_a_closed_form():
    p = 0.05 ** (1 / 100)
    assert one_run_bound(Guesses(100, 100, 100), delta=0.0, confidence=0.95) == pytest.approx(math.log(p / (1 - p)), abs=1e-5)


def test_guessing_shows_nothing():
    for v in (0, 50, 55):
        assert one_run_bound(Guesses(100, 100, v), delta=1e-5, confidence=0.95) == 0.0
        assert gaussian_f_dp_bound(Guesses(100, 100, v), delta=1e-5, confidence=0.95) == 0.0


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 60), st.data())
def test_a_further_correct_guess_never_lowers_a_bound_nor_does_less_confidence(r: int, data: st.DataObject):
    m, v = r + data.draw(st.integers(0, 300)), data.draw(st.integers(1, r))
    for bound in (one_run_bound, gaussian_f_dp_bound):
        value = bound(Guesses(m, r, v), delta=1e-5, confidence=0.95)
        assert bound(Guesses(m, r, v - 1), delta=1e-5, confidence=0.95) <= value + 1e-5
        assert value <= bound(Guesses(m, r, v), delta=1e-5, confidence=0.9) + 1e-5


def test_bounds_hold_for_the_mechanism_with_the_most_correct_guesses():
    """Randomised response is right with probability e^eps / (1 + e^eps), independently: the worst case at delta = 0.

    At significance 1e-4 a valid bound exceeds the truth in 2,000 runs more than five times with probability under 1e-7.
    """
    epsilon, r = 1.0, 200
    rng = np.random.default_rng(0)
    correct = rng.binomial(r, 1 / (1 + math.exp(-epsilon)), size=2000)
    least = next(v for v in range(r + 1) if one_run_bound(Guesses(r, r, v), delta=0.0, confidence=1 - 1e-4) > epsilon)
    assert int((correct >= least).sum()) <= 5
    # and it is tight: one guess fewer would be refuted too often
    assert exact_p_value(r, r, least - 1, epsilon, 0.0) > 1e-4 >= exact_p_value(r, r, least, epsilon, 0.0)


def test_a_true_gaussian_claim_is_not_refuted_by_f_dp():
    """Canaries that do not disturb each other, each behind its own N(0, 1) noise: mu = 1, epsilon 4.377 at 1e-5.

    About 87 % of guesses are right; a refutation needs so many that its probability is under 1e-7, far below the 5 % allowed.
    """
    m, curve = 2000, gaussian_curve(4.37718, 1e-5)
    least = next(v for v in range(401) if f_dp_refuted(Guesses(m, 400, v), curve, confidence=0.95))
    cut = brentq(lambda t: (norm.sf(t) + norm.sf(t - 1)) / 2 - 0.1, 0, 5)
    assert binom.sf(least - 1, 400, norm.sf(cut - 1) / 0.2) < 1e-7
    rng = np.random.default_rng(1)
    included = rng.random(m) < 0.5
    order = np.argsort(included + rng.standard_normal(m))
    assert included[order[-200:]].sum() + (~included[order[:200]]).sum() < least


def test_a_curve_of_many_points_is_that_of_the_mechanism_and_never_above_it():
    epsilons = np.linspace(0, 10, 400)
    deltas = from_gaussian_mechanism(1.0, pessimistic_estimate=True).get_delta_for_epsilon(epsilons)
    through, exact = curve_through(list(zip(epsilons, deltas, strict=True))), gaussian_curve(4.377178, 1e-5)
    for y in np.linspace(0.001, 0.999, 99):
        assert exact(y) - 2e-4 <= through(y) <= exact(y) + 1e-6


def test_where_nothing_stops_the_search_the_bound_is_infinite():
    assert largest_refuted(lambda _: True) == math.inf
    assert largest_refuted(lambda epsilon: epsilon < 0.3) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 20), (20, 20), (7, 500)])
def test_clopper_pearson_limits_are_where_binomial_tails_reach_the_significance(k: int, n: int):
    low, high = clopper_pearson(k, n, confidence=0.95)

    def tail(p: float, counts: range) -> float:
        return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)

    assert low == 0.0 if k == 0 else tail(low, range(k, n + 1)) == pytest.approx(0.05)
    assert high == 1.0 if k == n else tail(high, range(k + 1)) == pytest.approx(0.05)


def test_the_estimate_of_exact_scores_is_the_analytic_gaussian():
    assert gaussian_pair_epsilon(1.0, 1.0, delta=1e-5) == pytest.approx(4.37718, abs=1e-5)
    assert gaussian_pair_epsilon(0.0, 1.0, delta=1e-5) == 0.0
    for mu in (0.3, 2.0, 5.0):
        assert gaussian_pair_epsilon(mu, 1.0, delta=1e-6) == pytest.approx(get_epsilon_gaussian(1 / mu, 1e-6), rel=1e-6)
    assert gaussian_pair_epsilon(1000.0, 1.0, delta=1e-5) == math.inf


@pytest.mark.parametrize(("mean", "std"), [(1.0, 1.2), (1.0, 0.8), (0.0, 1.5), (0.0, 0.6), (-2.0, 1.1), (4.0, 3.0)])
def test_the_epsilon_of_two_normal_distributions_is_where_the_integral_of_the_excess_is_delta(mean: float, std: float):
    epsilon = gaussian_pair_epsilon(mean, std, delta=1e-4)

    x = np.linspace(-40, 40, 800_001)

    def divergence(first: tuple[float, float], second: tuple[float, float]) -> float:
        excess = norm.pdf(x, *first) - np.exp(np.minimum(epsilon + norm.logpdf(x, *second), 700.0))
        return float(np.trapezoid(np.maximum(excess, 0.0), x))

    null, seen = (0.0, 1.0), (mean, std)
    assert max(divergence(null, seen), divergence(seen, null)) == pytest.approx(1e-4, rel=1e-3)


def test_the_estimate_of_sampled_scores_is_near_the_truth_and_its_lower_end_below():
    """20,000 scores fit mean and deviation to 0.7 %; epsilon moves by 30 per unit of deviation, so 0.8 is over five errors."""
    scores = np.random.default_rng(2).normal(1.0, 1.0, 20_000)
    estimate = cosine_estimate(scores, delta=1e-5, confidence=1 - 1e-7)
    assert estimate.epsilon == pytest.approx(4.377, abs=0.8)
    assert 2.0 < estimate.low < 4.377
    assert cosine_estimate(scores[:200], delta=1e-5, confidence=0.95).low < estimate.low
    assert cosine_estimate(scores - 1.0, delta=1e-5, confidence=1 - 1e-7).low == 0.0


def test_impossible_counts_are_refused():
    for numbers in ((10, 11, 5), (10, 5, 6), (10, 0, 0), (10, 5, -1)):
        with pytest.raises(AuditError, match="correct <= guesses"):
            Guesses(*numbers)
    with pytest.raises(AuditError, match="confidence"):
        one_run_bound(Guesses(10, 10, 9), delta=0.0, confidence=1.0)
    with pytest.raises(AuditError, match="impossible"):
        clopper_pearson(3, 2, confidence=0.9)
    for scores in ([1.0], [2.0, 2.0]):
        with pytest.raises(AuditError, match="more canaries"):
            cosine_estimate(scores, delta=1e-5, confidence=0.95)
