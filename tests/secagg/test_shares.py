"""Noise in shares for a plan: its claim holds on the lattice of every size, and one unit moves integers by no more than that."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError, UnsupportedEvent
from dp_federated_lora.privacy import (
    Composition,
    RenyiFilter,
    SecureRandom,
    TruncatedPoissonSampler,
    UnitId,
    calibrate_noise_multiplier,
    clip_examples,
    epsilon_rdp,
    event_from_json,
    event_to_json,
)
from dp_federated_lora.privacy.accounting import SharedNoiseDpEvent
from dp_federated_lora.secagg import Field, SharedNoise
from dp_federated_lora.secagg.mechanisms import subsampled_rdp

DELTA = 1e-5
ORDERS = np.arange(2.0, 4097.0)
NOISES = pytest.mark.parametrize("noise", ["skellam", "discrete gaussian"])


def shares(z: float = 1.0, **changes: object) -> SharedNoise:
    facts: dict[str, object] = {"bits": 24, "max_cohort": 20, "min_cohort": 16, "colluders": 2}
    return SharedNoise(noise_multiplier=z, **(facts | changes))  # type: ignore[arg-type]


@NOISES
@pytest.mark.parametrize("units", [None, 5000])
@pytest.mark.parametrize("bits", [18, 24, 32])
@pytest.mark.parametrize("size", [1, 3, 4000, 147_456])
def test_the_noise_of_every_size_is_as_good_as_the_gaussian_it_claims_and_hardly_larger(noise, units, bits: int, size: int):
    claimed = 0.7
    mechanism = shares(claimed, noise=noise, units=units, bits=bits).of_size(size)
    assert (mechanism.rdp(ORDERS) <= ORDERS / (2 * claimed**2)).all()
    dearer = 1.01 if bits >= 24 else 1.5
    assert claimed <= mechanism.total.noise_multiplier < dearer * claimed


def test_too_few_bits_say_which_and_what_to_raise():
    with pytest.raises(IncompatiblePlan, match="10 bits are too few for a sum of 5,000 units.*raise secure_sum.bits"):
        shares(bits=10, units=5000).of_size(4096)
    with pytest.raises(IncompatiblePlan, match="not exact"):
        shares(units=2**31)
    with pytest.raises(IncompatiblePlan, match="colluders"):
        shares(colluders=16)


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 70),
    units=st.integers(1, 12),
    bits=st.sampled_from([14, 20, 24]),
    spread=st.sampled_from([1e-9, 1.0, 1e9]),
)
@settings(deadline=None, max_examples=120)
def test_one_unit_more_moves_what_a_client_of_many_units_sends_by_no_more_than_the_declared_norm(seed, size, units, bits, spread):
    noise, generator = shares(units=12, bits=bits, max_cohort=2, min_cohort=2, colluders=0), torch.Generator().manual_seed(seed)
    field = Field(noise.of_size(size), bytes(32))
    rows = spread * torch.randn(units, size, generator=generator)
    rows[0] = rows[0].sign() if seed % 2 else rows[0]  # a spread-out unit, or any

    def integers(chosen: torch.Tensor) -> torch.Tensor:
        total = clip_examples(chosen, 1.0, [UnitId(str(n)) for n in range(len(chosen))])
        return field.encode(total._value.double() / 2**22, SecureRandom.insecure_from(1))

    moved = integers(rows) - integers(rows[1:])
    assert int((moved * moved).sum()) <= field.mechanism.total.squared_bound


def test_the_sum_over_units_comes_back_to_half_a_lattice_step_for_each_client():
    noise = shares(units=100)
    field = Field(noise.of_size(1000), bytes(range(32)))
    vectors = 9.0 * torch.randn(20, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 32
    sent = [field.wrap(field.encode(row, SecureRandom.insecure_from(n))) for n, row in enumerate(vectors)]
    back = noise.opened(field.sum(sent), size=1000, clip_norm=3.0, rotation=bytes(range(32)), insecure=True)
    error = back.value - 3.0 * vectors.sum(dim=0)
    total = field.mechanism.total
    assert float(error.norm()) <= 3.0 * 20 * 0.5 * math.sqrt(total.padded_size) / total.scale
    assert back.insecure


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_counts_as_zero(bad: float):
    field = Field(shares(units=10).of_size(4), bytes(32))
    assert not field.encode(torch.tensor([1.0, bad, 0.0, 0.0]), SecureRandom.insecure_from(1)).any()


# --- what it costs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "z", "rounds"), [(1.0, 1.0, 1), (0.2, 0.9, 100), (0.01, 0.6, 1000)])
def test_epsilon_is_that_of_renyi_divergences_at_integer_orders(q: float, z: float, rounds: int):
    orders = np.arange(2, 513)
    accountant = RdpAccountant(orders)
    gaussian, shared = GaussianDpEvent(z), SharedNoiseDpEvent(z)
    accountant.compose(gaussian if q == 1.0 else PoissonSampledDpEvent(q, gaussian), rounds)
    event = shared if q == 1.0 else PoissonSampledDpEvent(q, shared)
    composition = Composition()
    composition.add(event, rounds)
    assert composition.epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    assert epsilon_rdp([(event, rounds)], DELTA) == composition.epsilon(DELTA)
    plain = Composition()
    plain.add(gaussian if q == 1.0 else PoissonSampledDpEvent(q, gaussian), rounds)
    assert plain.epsilon(DELTA) <= composition.epsilon(DELTA) <= 1.25 * plain.epsilon(DELTA)  # a distribution tells more


@NOISES
@pytest.mark.parametrize("q", [1.0, 0.1])
def test_the_charged_event_costs_no_less_than_the_mechanism_itself(noise, q: float):
    made = shares(0.8, noise=noise, bits=18)
    composition = Composition()
    composition.add(made.event if q == 1.0 else PoissonSampledDpEvent(q, made.event), 30)
    for size in (1, 1000, 147_456):
        mechanism = made.of_size(size)
        assert mechanism.epsilon(rounds=30, delta=DELTA, sampling_rate=q) <= composition.epsilon(DELTA) * (1 + 1e-9)
        if q < 1.0:
            curve = subsampled_rdp(mechanism.rdp(np.arange(2.0, 65.0)), q)
            allowed = RdpAccountant(range(2, 65)).compose(PoissonSampledDpEvent(q, GaussianDpEvent(0.8)))._rdp
            assert (curve <= np.asarray(allowed) * (1 + 1e-9)).all()


def test_shared_noise_composes_with_gaussians_by_divergences_and_with_nothing_that_has_none():
    mixed, alone = Composition(), Composition()
    mixed.add(PoissonSampledDpEvent(0.1, SharedNoiseDpEvent(1.0)), 10)
    mixed.add(GaussianDpEvent(5.0), 2)
    alone.add(PoissonSampledDpEvent(0.1, SharedNoiseDpEvent(1.0)), 10)
    accountant = RdpAccountant(range(2, 513))
    accountant.compose(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 10).compose(GaussianDpEvent(5.0), 2)
    assert mixed.epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-9)
    assert mixed.epsilon(DELTA) > alone.epsilon(DELTA)
    with pytest.raises(UnsupportedEvent, match="PLD alone"):
        mixed.add(TruncatedPoissonSampler(0.1, 150, 1000).amplify(GaussianDpEvent(1.0)))


def test_the_event_survives_json_the_lifetime_filter_and_calibration():
    event = PoissonSampledDpEvent(0.25, SharedNoiseDpEvent(1.5))
    assert event_from_json(event_to_json(event)) == event
    plain = PoissonSampledDpEvent(0.25, GaussianDpEvent(1.5))
    assert event_to_json(event) != event_to_json(plain)
    empty = RenyiFilter.for_budget(8.0, DELTA)
    assert empty.with_event(event).divergence == empty.with_event(plain).divergence
    z = calibrate_noise_multiplier(epsilon=8.0, delta=DELTA, sampling_rate=0.2, rounds=100, shared=True)
    gaussian = calibrate_noise_multiplier(epsilon=8.0, delta=DELTA, sampling_rate=0.2, rounds=100)
    assert gaussian <= z <= 1.1 * gaussian
    composition = Composition()
    composition.add(PoissonSampledDpEvent(0.2, SharedNoiseDpEvent(z)), 100)
    assert composition.epsilon(DELTA) <= 8.0
    with pytest.raises((PrivacyError, UnsupportedEvent)):
        Composition().add(SharedNoiseDpEvent(0.01))
