"""The lattice pipeline of clients and server; statistical tests have a false-positive rate below 1e-6 each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard as hadamard_matrix

from dp_federated_lora.aggregation import Sketch
from dp_federated_lora.errors import InsecureRandomness, PrivacyError
from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg import DiscreteGaussian, Field, SecureSum, Skellam
from dp_federated_lora.secagg.field import hadamard, roundings

SEED = bytes(range(32))


def a_field(*, kind=Skellam, seed: bytes = SEED, **changes: object) -> Field:
    facts: dict[str, object] = {
        "size": 1000,
        "clip_norm": 2.0,
        "noise_multiplier": 0.5,
        "bits": 18,
        "max_cohort": 20,
        "min_cohort": 15,
        "colluders": 2,
    }
    return Field(kind(SecureSum(**(facts | changes))), seed)  # type: ignore[arg-type]


def some_vectors(count: int, size: int, norm: float, seed: int = 1) -> torch.Tensor:
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return norm * rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("size", [1, 2, 8, 128])
def test_the_transform_is_the_hadamard_matrix(size: int):
    expected = torch.from_numpy(hadamard_matrix(size).astype(np.float64))
    actual = torch.stack([hadamard(row) for row in torch.eye(size, dtype=torch.float64)])
    assert torch.equal(actual, expected)


@given(st.integers(0, 12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_the_transform_stretches_norms_alike_and_undoes_itself(log_size: int, seed: int):
    vector = torch.randn(2**log_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(hadamard(hadamard(vector)) / 2**log_size, vector, atol=1e-13)
    assert float(hadamard(vector).norm()) == pytest.approx(math.sqrt(2**log_size) * float(vector.norm()), rel=1e-13)


def test_a_peaked_vector_is_spread_by_the_rotation():
    field = a_field(size=1024)
    spike = torch.zeros(1024)
    spike[3] = 1.0
    encoded = field.encode(spike, SecureRandom.insecure_from(1))
    assert int(encoded.abs().max()) <= math.ceil(field.mechanism.total.scale / 32.0)


@pytest.mark.parametrize("size", [1, 3, 1000, 1024])
@pytest.mark.parametrize("count", [1, 13])
def test_without_noise_the_sum_comes_back_to_one_lattice_step(size: int, count: int):
    field = a_field(size=size)
    vectors = some_vectors(count, size, norm=1.9)
    encoded = [field.wrap(field.encode(row, SecureRandom.insecure_from(n))) for n, row in enumerate(vectors)]
    error = field.decode(field.sum(encoded)) - vectors.sum(dim=0)
    # Each rotated coordinate of each client is off by less than one step, and the rotation keeps the norm.
    assert float(error.norm()) <= count * math.sqrt(field.mechanism.total.padded_size) / field.mechanism.total.scale
    if count == 1 and size > 1:
        assert float(error.abs().max()) < 3.0 / field.mechanism.total.scale  # a mean of bounded errors: 6 deviations
        assert float(error.square().mean().sqrt()) <= 1.0 / field.mechanism.total.scale


def test_long_vectors_are_scaled_to_the_clip_norm_and_short_ones_are_left():
    field = a_field()
    (vector,) = some_vectors(1, 1000, norm=1.0)
    for norm, kept in ((0.7, 0.7), (2.0, 2.0), (50.0, 2.0), (1e100, 2.0)):
        back = field.decode(field.wrap(field.encode(vector * norm, SecureRandom.insecure_from(1))))
        assert torch.allclose(back, vector * kept, atol=4.0 / field.mechanism.total.scale)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=9),
    st.sampled_from([6, 10, 20, 32]),
    st.sampled_from([1e-3, 1.0, 1e4]),
)
@settings(deadline=None, max_examples=150)
def test_the_integer_norm_never_exceeds_the_bound_for_any_input(values: list[float], bits: int, clip_norm: float):
    field = a_field(size=len(values), bits=bits, clip_norm=clip_norm, max_cohort=15)
    encoded = field.encode(torch.tensor(values, dtype=torch.float64), SecureRandom.insecure_from(3))
    assert sum(k * k for k in encoded.tolist()) <= field.mechanism.total.squared_bound
    if not all(map(math.isfinite, values)):
        assert not encoded.any()


def test_eight_bits_give_a_vector_back_without_bias_and_sums_of_encodings_exactly():
    field, trials = a_field(size=60, bits=8), 800
    (vector,) = some_vectors(1, 60, norm=1.0)  # half the clip norm: no rounding comes near the bound and is drawn again
    encoded = [field.encode(vector, SecureRandom.insecure_from(n)) for n in range(trials)]
    wrapped = [field.wrap(k) for k in encoded]
    assert all(w.shape == (64,) and int(w.min()) >= 0 and int(w.max()) < 2**8 for w in wrapped)
    assert torch.equal(field.unwrap(field.sum(wrapped[:20])), sum(encoded[:20]))
    errors = torch.stack([field.decode(w) for w in wrapped]).mean(dim=0) - vector
    # Independent rounding errors of range 1 in rotated coordinates: Hoeffding gives less than 1e-7 for all 60 together.
    assert float(errors.abs().max()) * field.mechanism.total.scale < 6.5 * 0.5 / math.sqrt(trials)


def test_sketches_of_vectors_pass_through_a_secure_sum_as_the_sketch_of_their_sum():
    sketch, field = Sketch(4.0, 1), a_field(size=250)
    vectors = some_vectors(13, 1000, norm=1.0)
    sent = [field.wrap(field.encode(row, SecureRandom.insecure_from(n))) for n, row in enumerate(sketch.encode(vectors, 3))]
    error = field.decode(field.sum(sent)) - sketch.encode(vectors.sum(dim=0)[None], 3)[0]
    assert float(error.norm()) <= 13 * math.sqrt(field.mechanism.total.padded_size) / field.mechanism.total.scale


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_vector_that_is_not_finite_counts_as_zero_and_still_carries_noise(bad: float):
    field = a_field()
    vector = torch.ones(1000)
    vector[17] = bad
    noise = field.mechanism.noise_share(SecureRandom.insecure_from(4))
    assert torch.equal(field.unwrap(field.contribution(vector, SecureRandom.insecure_from(4))), noise)


@given(st.data(), st.integers(2, 32), st.integers(0, 12))
@settings(deadline=None)
def test_modular_sums_are_exact_for_any_number_of_clients_within_the_modulus(data: st.DataObject, bits: int, clients: int):
    field = a_field(bits=bits, size=4, max_cohort=1, min_cohort=1, colluders=0)
    limit = (2 ** (bits - 1) - 1) // max(clients, 1)
    rows = [data.draw(st.lists(st.integers(-limit, limit), min_size=4, max_size=4)) for _ in range(clients)]
    summed = field.sum(field.wrap(torch.tensor(row)) for row in rows)
    assert bool(((summed >= 0) & (summed < 2**bits)).all())
    assert field.unwrap(summed).tolist() == [sum(column) for column in zip(*rows, strict=True)] if rows else [0] * 4


@given(st.integers(2, 32), st.integers(-(2**40), 2**40))
def test_recentring_inverts_reduction_modulo_the_field(bits: int, value: int):
    field = a_field(bits=bits, size=1, max_cohort=1, min_cohort=1, colluders=0)
    wrapped, centred = (int(f(torch.tensor(value))) for f in (field.wrap, field.unwrap))
    assert wrapped == value % 2**bits
    assert (centred - value) % 2**bits == 0
    assert -(2 ** (bits - 1)) <= centred < 2 ** (bits - 1)


def test_roundings_are_unbiased_neighbours_and_end_towards_zero():
    scaled = torch.tensor([-2.75, -0.5, 0.0, 0.125, 3.0])
    draws = torch.stack([next(roundings(scaled, SecureRandom.insecure_from(n))) for n in range(4000)]).double()
    assert bool(((draws - scaled).abs() < 1).all())
    assert bool(((draws.mean(dim=0) - scaled).abs() <= 5.33 * 0.5 / math.sqrt(4000)).all())
    assert list(roundings(scaled, SecureRandom.insecure_from(1)))[-1].tolist() == [-2, 0, 0, 0, 3]


def test_a_rounding_meets_the_bound_as_often_as_the_theorem_says():
    total = a_field(size=256, bits=8).mechanism.total
    worst = torch.full((256,), 0.5, dtype=torch.float64)  # every coordinate has the largest rounding variance
    worst *= total.scale * total.clip_norm / worst.norm()
    trials = 600
    met = sum(
        int(next(roundings(worst, SecureRandom.insecure_from(n))).square().sum()) <= total.squared_bound for n in range(trials)
    )
    assert met / trials > 1 - math.exp(-0.5) - 5.33 * 0.5 / math.sqrt(trials)
    redrawn = [a_field(size=256, bits=8).encode(worst, SecureRandom.insecure_from(n)) for n in range(100)]
    assert max(int(k.square().sum()) for k in redrawn) <= total.squared_bound


@pytest.mark.parametrize("kind", [Skellam, DiscreteGaussian])
def test_a_full_cohort_gives_the_sum_with_the_declared_error(kind):
    field = a_field(kind=kind, size=4096)
    total = field.mechanism.total
    vectors = some_vectors(total.max_cohort, 4096, norm=2.0)
    sent = [field.contribution(row, SecureRandom.from_os()) for row in vectors]
    assert all(bool(((c >= 0) & (c < 2**total.bits)).all()) for c in sent)
    error = (field.decode(field.sum(sent)) - vectors.sum(dim=0)).square().mean().item() * total.scale**2
    noise = total.max_cohort * total.share_std**2
    slack = 5.33 * math.sqrt(2.0 / 4096)
    assert noise * (1 - slack) < error < (noise + total.max_cohort / 4.0) * (1 + slack)


def test_rounding_and_noise_are_secret_and_the_rotation_is_shared():
    field, vector = a_field(), torch.linspace(-1, 1, 1000)
    first, again, other = (field.contribution(vector, SecureRandom.insecure_from(n)) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    encoded = field.encode(vector, SecureRandom.insecure_from(1))
    turned = a_field(seed=bytes(32)).encode(vector, SecureRandom.insecure_from(1))
    assert (encoded - turned).abs().max() > 10
    assert not torch.equal(field.unwrap(first), encoded)


def test_wrong_shapes_and_seeds_are_refused():
    with pytest.raises(PrivacyError, match=r"\(1000,\), got \(999,\)"):
        a_field().encode(torch.zeros(999), SecureRandom.insecure_from(1))
    with pytest.raises(PrivacyError, match="shape"):
        a_field().contribution(torch.zeros(1, 1000), SecureRandom.insecure_from(1))
    with pytest.raises(InsecureRandomness, match="32 bytes"):
        a_field(seed=b"short").encode(torch.zeros(1000), SecureRandom.insecure_from(1))
