"""Distributed mechanisms against reference numbers, exact divergences and a second accountant."""

from __future__ import annotations

import math
from functools import lru_cache

import mpmath
import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError
from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg import DiscreteGaussian, DistributedMechanism, SecureSum, Skellam
from dp_federated_lora.secagg.mechanisms import skellam_rdp, subsampled_rdp

DELTA = 1e-5
DEVIATIONS = 5.33  # of a normal deviate, two-sided probability 1e-7
MECHANISMS = pytest.mark.parametrize("mechanism", [DiscreteGaussian, Skellam])


def a_sum(**changes: object) -> SecureSum:
    facts: dict[str, object] = {
        "size": 2**20,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "bits": 16,
        "max_cohort": 100,
        "min_cohort": 100,
    }
    return SecureSum(**(facts | changes))  # type: ignore[arg-type]


def epsilon(mechanism: DistributedMechanism, **changes: object) -> float:
    return mechanism.epsilon(**({"rounds": 1, "delta": DELTA} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cohort", "bits", "scale", "inflation", "cost"),
    [(100, 16, 8382.49, 1.001927, 4.7624), (1000, 18, 24102.83, 1.000247, 4.7540), (100, 12, 523.9, 1.3996, 7.0057)],
)
def test_scale_inflation_and_epsilon_of_the_reference_settings(cohort, bits, scale, inflation, cost):
    total = a_sum(max_cohort=cohort, min_cohort=cohort, bits=bits)
    assert total.scale == pytest.approx(scale, abs=0.03)
    assert total.l2 / total.scale == pytest.approx(inflation, abs=5e-5)
    assert epsilon(DiscreteGaussian(total)) == pytest.approx(cost, abs=1e-4)
    assert epsilon(Skellam(total)) == pytest.approx(cost, abs=1e-4)


def test_redrawing_keeps_the_inflation_far_below_that_of_plain_rounding():
    total = a_sum()
    assert (total.scale + 2**10) / total.scale == pytest.approx(1.1222, abs=1e-4)
    assert total.l2 < 1.002 * total.scale
    single = a_sum(size=1, max_cohort=10, min_cohort=10, bits=20)  # in few dimensions the plain bound would be the larger too
    assert single.squared_bound <= (single.scale + 1.0) ** 2


def test_a_fine_lattice_costs_what_the_gaussian_costs_at_integer_orders():
    orders = np.arange(2, 513)
    gaussian, _ = compute_epsilon(orders, orders / 2.0, DELTA)
    assert gaussian == pytest.approx(4.7527, abs=1e-4)
    for mechanism in (DiscreteGaussian, Skellam):
        assert gaussian < epsilon(mechanism(a_sum(bits=22))) < gaussian + 1e-4


@MECHANISMS
@pytest.mark.parametrize("rounds", [1, 20])
def test_the_conversion_is_the_published_one(mechanism, rounds: int):
    made = mechanism(a_sum(noise_multiplier=3.0))
    a = np.arange(2.0, 513.0)
    by_hand = np.min(rounds * made.rdp(a) + np.log1p(-1 / a) - (np.log(DELTA) + np.log(a)) / (a - 1))
    assert epsilon(made, rounds=rounds) == pytest.approx(by_hand, rel=1e-12)


def divergence(left, right, order: int) -> float:
    """Renyi divergence of two sequences of masses."""
    return float(mpmath.log(mpmath.fsum(p**order * q ** (1 - order) for p, q in zip(left, right, strict=True))) / (order - 1))


@lru_cache
def skellam_masses(mu: float, shift: int) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """P(k) and P(k - shift) for k from -200 to 200."""
    with mpmath.workdps(60):
        mass = {k: mpmath.exp(-mu) * mpmath.besseli(k, mu) for k in range(201 + shift)}
        return [mass[abs(k)] for k in range(-200, 201)], [mass[abs(k - shift)] for k in range(-200, 201)]


@pytest.mark.parametrize(("order", "value", "bound"), [(2, 0.019997, 0.0209), (8, 0.079579, 0.0821), (32, 0.296604, 0.3269)])
def test_scalar_skellam_reference_values(order: int, value: float, bound: float):
    plain, shifted = skellam_masses(50.0, 1)
    assert divergence(shifted, plain, order) == pytest.approx(value, abs=1e-6)
    assert skellam_rdp(np.array([float(order)]), l2=1.0, l1=1.0, variance=50.0)[0] == pytest.approx(bound, abs=1e-4)


@pytest.mark.parametrize("mu", [1.0, 5.0, 50.0])
@pytest.mark.parametrize("shift", [1, 4])
@pytest.mark.parametrize("q", [1.0, 0.5, 0.1])
def test_the_skellam_bound_dominates_the_exact_divergence_with_and_without_sampling(mu: float, shift: int, q: float):
    bounds = skellam_rdp(np.arange(2.0, 33.0), l2=shift, l1=shift, variance=mu)
    bounds = bounds if q == 1.0 else subsampled_rdp(bounds, q)
    plain, shifted = skellam_masses(mu, shift)
    mixed = [(1 - q) * a + q * b for a, b in zip(plain, shifted, strict=True)]
    for order in (2, 3, 8, 32):
        added, removed = divergence(mixed, plain, order), divergence(plain, mixed, order)
        assert 0 < removed <= added * (1 + 1e-12)
        assert added <= bounds[order - 2]


@pytest.mark.parametrize("bits", [5, 6])
def test_the_discrete_gaussian_bound_dominates_the_exact_divergence_of_a_sum_of_shares(bits: int):
    total = a_sum(size=1, bits=bits, max_cohort=3, min_cohort=3)
    assert 0.5 < total.share_std < 2.5  # few lattice points, so that the sum is far from a discrete Gaussian
    with mpmath.workdps(60):
        share = [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(total.share_std) ** 2)) for k in range(-60, 61)]
        norm = mpmath.fsum(share) ** 3
        polynomial = [mpmath.mpf(1)]
        for _ in range(3):
            polynomial = [
                mpmath.fsum(polynomial[i] * share[n - i] for i in range(max(0, n - 120), min(n + 1, len(polynomial))))
                for n in range(len(polynomial) + 120)
            ]
        summed, shift = [mass / norm for mass in polynomial], math.floor(total.l2)
        middle = len(summed) // 2
        plain, shifted = (summed[middle - 40 - by : middle + 41 - by] for by in (0, shift))
        for order in (2, 3, 8):
            assert 0 < divergence(shifted, plain, order) <= DiscreteGaussian(total).rdp(np.array([float(order)]))[0]


def test_a_sum_of_narrow_discrete_gaussians_is_charged_for_not_being_one():
    wide, narrow = a_sum(size=2**10, bits=10), a_sum(size=2**10, bits=7)
    assert wide.share_std > 3.0
    assert narrow.share_std < 0.6
    assert epsilon(DiscreteGaussian(wide)) == pytest.approx(epsilon(Skellam(wide)), rel=1e-2)
    assert epsilon(DiscreteGaussian(narrow)) > 1.5 * epsilon(Skellam(narrow))


@given(
    st.integers(1, 500),
    st.integers(0, 500),
    st.integers(0, 500),
    st.floats(0.05, 50.0),
    st.floats(1e-3, 1e3),
    st.sampled_from([1, 5, 1000, 2**20]),
)
@settings(deadline=None)
def test_the_worst_dropout_and_collusion_leave_the_noise_that_is_charged(honest, colluders, extra, z, clip_norm, size):
    total = a_sum(
        size=size,
        clip_norm=clip_norm,
        noise_multiplier=z,
        bits=20,
        max_cohort=honest + colluders + extra,
        min_cohort=honest + colluders,
        colluders=colluders,
    )
    assert total.shares == honest
    left = honest * total.share_std**2 / total.scale**2
    assert left >= (z * clip_norm) ** 2 * (1 - 1e-12)
    # The largest sum fits: 3.89 standard deviations of a rotated coordinate stay inside the modulus.
    n = total.max_cohort
    variance = total.scale**2 * clip_norm**2 * n * n / total.padded_size + n * total.share_std**2 + n / 4.0
    assert 3.89 * math.sqrt(variance) <= 2**19


@MECHANISMS
def test_summed_shares_have_the_declared_variance(mechanism):
    total = a_sum(size=2**13, max_cohort=40, min_cohort=30, colluders=5)
    made = mechanism(total)
    rngs = [SecureRandom.from_os() for _ in range(total.shares)]
    summed = sum(made.noise_share(rng) for rng in rngs)
    assert summed.dtype == torch.int64
    measured = float((summed.double() ** 2).mean()) / total.scale**2
    assert abs(measured - 1.0) < DEVIATIONS * math.sqrt(2.0 / total.padded_size)


@MECHANISMS
def test_shares_of_different_streams_differ_and_the_same_stream_repeats_its_share(mechanism):
    made = mechanism(a_sum(size=100))
    first, again, other = (made.noise_share(SecureRandom.insecure_from(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (128,)


def test_more_bits_never_take_the_lattice_beyond_what_is_drawn_fast_and_squared_exactly():
    for changes in ({}, {"max_cohort": 2, "min_cohort": 1}, {"noise_multiplier": 2.0**-12, "max_cohort": 1, "min_cohort": 1}):
        total = a_sum(bits=32, **changes)
        assert total.share_std <= 2.0**15 * (1 + 1e-12)
        assert (total.scale * total.clip_norm + math.sqrt(total.padded_size)) ** 2 < 2.0**62
        Skellam(total).noise_share(SecureRandom.insecure_from(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 6, "max_cohort": 300}, "6 bits must hold a sum of 300"),
        ({"bits": 33}, "at most 32"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.inf}, "clip_norm"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"size": 0}, "size"),
        ({"min_cohort": 101}, "max_cohort 100"),
        ({"colluders": 100}, "100 colluders"),
        ({"colluders": -1}, "-1 colluders"),
    ],
)
def test_sums_that_overflow_or_promise_no_honest_noise_are_refused(changes: dict[str, object], message: str):
    with pytest.raises(IncompatiblePlan, match=message):
        a_sum(**changes)


@pytest.mark.parametrize(("q", "z"), [(0.01, 1.0), (0.1, 2.0), (0.5, 4.0), (0.9, 1.0)])
def test_sampling_of_a_gaussian_curve_costs_what_the_second_accountant_says(q: float, z: float):
    orders = np.arange(2.0, 65.0)
    accountant = RdpAccountant(orders)
    accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(z)))
    assert subsampled_rdp(orders / (2 * z * z), q) == pytest.approx(accountant._rdp, rel=1e-9)


@MECHANISMS
def test_sampling_rounds_and_noise_move_epsilon_the_right_way(mechanism):
    made = mechanism(a_sum())
    full = epsilon(made, rounds=5)
    assert epsilon(made, rounds=5, sampling_rate=0.01) < epsilon(made, rounds=5, sampling_rate=0.1) < full
    assert epsilon(made, rounds=5, sampling_rate=0.99) < full
    assert full < epsilon(made, rounds=6)
    assert epsilon(mechanism(a_sum(noise_multiplier=1.1)), rounds=5) < full
    assert epsilon(made, rounds=5, delta=1e-6) > full
    for wrong in ({"rounds": 0}, {"delta": 0.0}, {"sampling_rate": 0.0}, {"sampling_rate": 1.1}):
        with pytest.raises(PrivacyError, match="need rounds"):
            epsilon(made, **wrong)
