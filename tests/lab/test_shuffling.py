"""Amplification by shuffling: against the authors' figures, exact enumeration, and the limits that theory knows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr
from scipy.stats import binom

from dp_federated_lora.errors import PrivacyError
from dp_federated_lora.lab.shuffling import _distance, shuffled_epsilon, shuffled_gaussian_epsilon
from dp_federated_lora.privacy import calibrate_noise_multiplier


def closed_form(n: int, e: float, delta: float) -> float:
    """Theorem 3.1 of arXiv 2012.12803, for e <= log(n / (16 log(2 / delta)))."""
    grown = 8 * math.sqrt(math.exp(e) * math.log(4 / delta) / n) + 8 * math.exp(e) / n
    return math.log1p((math.exp(e) - 1) / (math.exp(e) + 1) * grown)


def delta_of(first: np.ndarray, second: np.ndarray, epsilon: float) -> float:
    return max(float(np.maximum(p - math.exp(epsilon) * q, 0).sum()) for p, q in ((first, second), (second, first)))


def exact_delta(n: int, e: float, epsilon: float, ones: int) -> float:
    """Hockey-stick divergence of shuffled binary randomised response by enumeration.

    Of the n - 1 others, `ones` hold a one. Shuffling shows the number of ones reported, and no more.
    """
    a = 1 / (1 + math.exp(-e))
    others = np.convolve(binom.pmf(np.arange(ones + 1), ones, a), binom.pmf(np.arange(n - ones), n - 1 - ones, 1 - a))
    return delta_of(np.convolve(others, [1 - a, a]), np.convolve(others, [a, 1 - a]), epsilon)


def test_the_bound_lies_between_those_that_the_authors_publish():
    # README of github.com/apple/ml-shuffling-amplification: numerical lower and upper bound, then the closed form
    found = shuffled_epsilon(reports=100_000, epsilon0=4.0, delta=1e-6)
    assert 0.1675385583317841 < found < 0.172790550755978
    assert found < closed_form(100_000, 4.0, 1e-6) == pytest.approx(0.5378040242374512, rel=0.01)  # their code has another factor
    assert closed_form(10_000, 1.0, 1e-6) == pytest.approx(0.2140, abs=1e-4)


@pytest.mark.parametrize(("n", "e", "delta"), [(1000, 0.5, 1e-5), (10_000, 1.0, 1e-6), (100_000, 3.0, 1e-8)])
def test_the_bound_is_below_the_closed_form_of_the_theorem(n: int, e: float, delta: float):
    assert e <= math.log(n / (16 * math.log(2 / delta)))
    assert shuffled_epsilon(reports=n, epsilon0=e, delta=delta) < closed_form(n, e, delta)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("e", [0.3, 1.0, 2.5])
def test_the_bound_is_never_below_what_shuffled_randomised_response_loses(n: int, e: float):
    for delta in (1e-1, 1e-2, 1e-4):
        found = shuffled_epsilon(reports=n, epsilon0=e, delta=delta)
        assert max(exact_delta(n, e, found, ones) for ones in range(n)) <= delta


@pytest.mark.parametrize(("n", "e"), [(3, 1.0), (40, 0.5), (60, 2.0)])
def test_the_bound_is_the_divergence_of_the_counts_of_theorem_3_2_up_to_its_rounding(n: int, e: float):
    """Counts drawn out in full: C ~ Bin(n - 1, exp(-e)) clones, A ~ Bin(C, 1/2), and the own report by a biased coin."""
    a, share = 1 / (1 + math.exp(-e)), math.exp(-e)
    first, second = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1))
    for c in range(n):
        for k in range(c + 1):
            mass = binom.pmf(c, n - 1, share) * binom.pmf(k, c, 0.5)
            first[c, k + 1] += a * mass
            first[c, k] += (1 - a) * mass
            second[c, k + 1] += (1 - a) * mass
            second[c, k] += a * mass
    for delta in (1e-2, 1e-5):
        found = shuffled_epsilon(reports=n, epsilon0=e, delta=delta)
        assert delta_of(first, second, found) <= delta
        assert delta_of(first, second, found - 2e-3) > delta


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3000), st.floats(0.05, 6.0), st.floats(1e-9, 1e-2))
def test_shuffling_never_costs_and_more_reports_never_cost_more(n: int, e: float, delta: float):
    found = shuffled_epsilon(reports=n, epsilon0=e, delta=delta)
    assert 0.0 <= found <= e
    # The numbers of clones that are told apart differ, so the bound falls up to their rounding.
    assert shuffled_epsilon(reports=4 * n, epsilon0=e, delta=delta) <= found * 1.02 + 1e-3
    assert shuffled_epsilon(reports=n, epsilon0=e, delta0=1e-18, delta=delta) >= found - 1e-3


def test_rounds_compose_within_basic_composition_and_above_one_round():
    one = shuffled_epsilon(reports=2000, epsilon0=1.0, delta=1e-6)
    ten = shuffled_epsilon(reports=2000, epsilon0=1.0, delta=1e-6, rounds=10)
    assert 1.5 * one < ten < 10 * shuffled_epsilon(reports=2000, epsilon0=1.0, delta=1e-7)


@pytest.mark.parametrize(("e", "d"), [(0.0, 1e-6), (1.0, 1e-3), (4.0, 1e-9)])
def test_the_distance_to_pure_reports_is_below_the_constant_of_theorem_3_8(e: float, d: float):
    for n in (1, 2, 1000):
        assert _distance(n, e, d) <= (1 + math.exp(-e) / 2) * n * d


@pytest.mark.parametrize("e", [0.5, 2.0])
def test_approximate_reports_of_randomised_response_that_sometimes_tells_all(e: float):
    """With probability d a report says its bit aloud: enumerated with the number of such reports, the bound holds."""
    n, d, a = 8, 1e-5, 1 / (1 + math.exp(-e))
    reports = {bit: np.array([d * (bit == 0), (1 - d) * (a if bit == 0 else 1 - a), (1 - d) * (1 - a if bit == 0 else a),
                              d * (bit == 1)]) for bit in (0, 1)}  # fmt: skip

    def histogram(bits: list[int]) -> dict[tuple[int, ...], float]:
        total = {(0, 0, 0, 0): 1.0}
        for bit in bits:
            grown: dict[tuple[int, ...], float] = {}
            for counts, mass in total.items():
                for said, p in enumerate(reports[bit]):
                    key = tuple(c + (j == said) for j, c in enumerate(counts))
                    grown[key] = grown.get(key, 0.0) + mass * p
            total = grown
        return total

    for delta in (1e-2, 1e-3):
        found = shuffled_epsilon(reports=n, epsilon0=e, delta0=d, delta=delta)
        assert found < e
        for others in ([0] * (n - 1), [1] * (n - 1), [0, 1] * (n // 2 - 1) + [0]):
            first, second = histogram([0, *others]), histogram([1, *others])
            keys = sorted(first.keys() | second.keys())
            pair = [np.array([h.get(key, 0.0) for key in keys]) for h in (first, second)]
            assert delta_of(pair[0], pair[1], found) <= delta


def test_a_shuffler_helps_gaussian_reports_only_where_there_are_many_of_them():
    """Ten rounds at delta 1e-5; the reports alone cost epsilon 1 (relation: data against none). docs/privacy.md says so."""
    z = calibrate_noise_multiplier(epsilon=1.0, delta=1e-5, sampling_rate=1.0, rounds=10)
    few, many = (
        shuffled_gaussian_epsilon(reports=n, noise_multiplier=z, sampling_rate=1.0, rounds=10, delta=1e-5) for n in (300, 30_000)
    )
    assert few > 1.0
    assert many < 0.2
    sampled = shuffled_gaussian_epsilon(reports=30_000, noise_multiplier=z, sampling_rate=0.1, rounds=10, delta=1e-5)
    assert sampled < many


def test_one_gaussian_report_alone_is_no_better_than_the_gaussian_mechanism_under_replacement():
    found, mu = shuffled_gaussian_epsilon(reports=1, noise_multiplier=4.0, sampling_rate=1.0, rounds=1, delta=1e-5), 2 / 4.0
    exact = math.exp(log_ndtr(mu / 2 - found / mu)) - math.exp(found + log_ndtr(-mu / 2 - found / mu))
    assert exact <= 1e-5


@pytest.mark.parametrize(
    "wrong", [{"reports": 0}, {"epsilon0": 0.0}, {"epsilon0": math.nan}, {"delta": 0.0}, {"rounds": 0}, {"delta0": -1e-9}]
)
def test_impossible_parameters_are_refused_and_hopeless_ones_show_nothing(wrong: dict[str, float]):
    facts = {"reports": 100, "epsilon0": 1.0, "delta": 1e-5}
    with pytest.raises(PrivacyError, match="have no epsilon"):
        shuffled_epsilon(**(facts | wrong))  # type: ignore[arg-type]
    assert shuffled_epsilon(**facts, delta0=1e-5) == math.inf  # type: ignore[arg-type]
