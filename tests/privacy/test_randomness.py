import pickle

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri

from dp_federated_lora.errors import InsecureRandomness, PrivacyError
from dp_federated_lora.privacy import SecureRandom

ALPHA = 1e-7  # false-positive rate of each statistical test below


def test_the_same_key_and_labels_repeat_and_other_labels_do_not():
    key = SecureRandom.from_os().export_key()
    first, again = SecureRandom(key).derive("noise", 3), SecureRandom(key).derive("noise", 3)
    assert (first.uint64(64) == again.uint64(64)).all()
    for other in (SecureRandom(key).derive("noise", 4), SecureRandom(key).derive("noise", "3"), SecureRandom(key)):
        assert (SecureRandom(key).derive("noise", 3).uint64(64) != other.uint64(64)).any()


def test_fresh_streams_differ_and_only_seeded_ones_are_marked_insecure():
    assert SecureRandom.from_os().commitment != SecureRandom.from_os().commitment
    assert not SecureRandom.from_os().derive("x").insecure
    assert SecureRandom.insecure_from(1).derive("x").insecure


def test_a_short_key_and_a_pickled_stream_are_refused():
    with pytest.raises(InsecureRandomness, match="32 bytes"):
        SecureRandom(b"short")
    with pytest.raises(PrivacyError, match="pickled"):
        pickle.dumps(SecureRandom.from_os())


def test_coins_fall_at_their_rate_and_at_the_extremes():
    rng = SecureRandom.from_os()
    assert not rng.bernoulli(0.0, 1000).any()
    assert rng.bernoulli(1.0, 1000).all()
    hits = int(rng.bernoulli(0.1, 100_000).sum())
    assert stats.binomtest(hits, 100_000, 0.1).pvalue > ALPHA
    with pytest.raises(PrivacyError, match="sampling probability"):
        rng.bernoulli(1.5, 1)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.7])
def test_rounded_gaussian_has_exactly_the_cell_probabilities_of_a_rounded_normal(sigma: float):
    n = 200_000
    draws = SecureRandom.from_os().rounded_gaussian(sigma, n)
    edge = max(1, round(3 * sigma))
    cells = np.arange(-edge, edge + 1)
    expected = np.diff(stats.norm.cdf((np.append(cells, edge + 1) - 0.5) / sigma))
    observed = np.array([(draws == cell).sum() for cell in cells])
    expected, observed = np.append(expected, 1 - expected.sum()) * n, np.append(observed, n - observed.sum())
    assert stats.chisquare(observed, expected).pvalue > ALPHA


def test_an_offset_shifts_the_deviate_before_it_is_rounded():
    n, sigma = 200_000, 1.3
    offsets = np.tile([-0.5, 0.25], n // 2)
    draws = SecureRandom.from_os().rounded_gaussian(sigma, n, offset=offsets)
    cells = np.arange(-4, 5)
    for offset in (-0.5, 0.25):
        drawn = draws[offsets == offset]
        expected = np.diff(stats.norm.cdf((np.append(cells, 5) - 0.5 - offset) / sigma))
        observed = np.array([(drawn == cell).sum() for cell in cells])
        expected, observed = (
            np.append(expected, 1 - expected.sum()) * len(drawn),
            np.append(observed, len(drawn) - observed.sum()),
        )
        assert stats.chisquare(observed, expected).pvalue > ALPHA


@given(st.integers(0, 10_000), st.floats(-0.5, 0.5))
@settings(deadline=None, max_examples=25)
def test_the_same_stream_with_an_offset_moves_every_draw_by_one_cell_at_most(seed: int, offset: float):
    plain, moved = (SecureRandom.insecure_from(seed).rounded_gaussian(50.0, 200, offset=o) for o in (0.0, offset))
    assert set(np.unique((moved - plain) * (1 if offset >= 0 else -1))) <= {0, 1}


def test_offsets_beyond_half_a_cell_are_refused():
    for offset in (0.6, float("nan"), np.array([0.0, -0.51])):
        with pytest.raises(PrivacyError, match="half a lattice unit"):
            SecureRandom.insecure_from(0).rounded_gaussian(1.0, 2, offset=offset)


def test_rounded_gaussian_of_a_fine_lattice_is_normal():
    draws = SecureRandom.from_os().rounded_gaussian(2.0**22, 100_000) / 2.0**22
    assert stats.kstest(draws, "norm").pvalue > ALPHA


def test_draws_close_to_a_cell_boundary_are_decided_in_multiple_precision():
    rng = SecureRandom.insecure_from(5)
    # Half the mass lies beyond 0, whose cell is (-1/2, 1/2); the smallest magnitudes lie far in the tail.
    assert rng._decide(2**63 - 1, 1000.0) == 0
    assert rng._decide(0, 1000.0) > 9000
    with mpmath.workprec(200):
        tail = mpmath.ncdf(-mpmath.mpf("7.5") / 1000)
        magnitude = int(mpmath.floor(mpmath.ldexp(tail, 64)))
    assert rng._decide(magnitude - 2, 1000.0) == 8
    assert rng._decide(magnitude + 2, 1000.0) == 7
    assert rng._decide(magnitude - 2, 1000.0, -1) == -8
    assert rng._decide(magnitude + 2, 1000.0, -1, 0.25) == -7
    assert rng._decide(magnitude - 2, 1000.0, 1, 0.5) == rng._decide(magnitude + 2, 1000.0, 1, 0.5) == 8


def test_the_inverse_normal_is_far_more_accurate_than_the_margin_assumes():
    for tail in np.geomspace(2.0**-20, 0.499, 300):
        with mpmath.workprec(150):
            exact = mpmath.sqrt(2) * mpmath.erfinv(1 - 2 * mpmath.mpf(float(tail)))
            assert abs(float(exact - mpmath.mpf(float(-ndtri(tail))))) < 2.0**-42 / 100


@given(st.floats(allow_nan=True, allow_infinity=True).filter(lambda s: not 0 < s <= 2.0**40))
@settings(deadline=None)
def test_impossible_noise_scales_are_refused(sigma: float):
    with pytest.raises(PrivacyError):
        SecureRandom.insecure_from(0).rounded_gaussian(sigma, 1)
