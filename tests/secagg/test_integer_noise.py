"""Integer noise against multiple-precision references; statistical tests have a false-positive rate of 1e-7 each."""

from __future__ import annotations

from functools import lru_cache

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dp_federated_lora.errors import PrivacyError
from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg.integer_noise import Law, _cumulative, _decide, _table, discrete_gaussian, draw, skellam

ALPHA = 1e-7
DEVIATIONS = 5.33  # of a normal deviate, two-sided probability 1e-7
LAWS = pytest.mark.parametrize("law", [discrete_gaussian, skellam])


@lru_cache(maxsize=16)
def exact(law: Law, std: float) -> list[mpmath.mpf]:
    """P(|X| <= k), k = 0, 1, .., to far beyond 2^-200, by formulas that the sampler does not use."""
    with mpmath.workprec(400):
        mu = mpmath.mpf(std) ** 2
        last = int(18 * std) + 60
        if law is skellam:
            pmf = [mpmath.exp(-mu) * mpmath.besseli(k, mu) for k in range(last)]
        else:
            total = mpmath.jtheta(3, 0, mpmath.exp(-1 / (2 * mu)))
            pmf = [mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mu)) / total for k in range(last)]
        cumulative = [pmf[0]]
        for mass in pmf[1:]:
            cumulative.append(cumulative[-1] + 2 * mass)
        return cumulative


class Scripted:
    """A stream whose words are given in advance."""

    def __init__(self, *words: int) -> None:
        self.words = list(words)

    def uint64(self, n: int) -> np.ndarray:
        taken, self.words = self.words[:n], self.words[n:]
        assert len(taken) == n
        return np.array(taken, dtype=np.uint64)


@LAWS
@pytest.mark.parametrize("std", [2.0**-10, 0.3, 1.0, 3.7, 30.0])
def test_thresholds_are_the_exact_probabilities_to_the_last_bit(law: Law, std: float):
    thresholds = _table(law, std).thresholds.tolist()
    with mpmath.workprec(400):
        expected = [int(mpmath.floor(mpmath.ldexp(p, 63))) for p in exact(law, std)[: len(thresholds)]]
    if (law, std) == (discrete_gaussian, 2.0**-10):
        assert expected == [2**63]  # 400 bits do not tell 1 - 2^-756,000 from 1
        expected = [2**63 - 1]
    assert thresholds == expected
    assert thresholds[-1] == 2**63 - 1


@LAWS
@pytest.mark.parametrize("precision", [64, 100, 192, 257])
@pytest.mark.parametrize("std", [0.3, 2.0, 25.0])
def test_cumulative_weights_keep_the_error_bound_that_the_sampler_relies_on(law: Law, std: float, precision: int):
    cumulative, error = _cumulative(law, std, precision)
    with mpmath.workprec(400):
        worst = max(abs(c - p * cumulative[-1]) for c, p in zip(cumulative, exact(law, std), strict=False))
        assert 0 < worst <= error


@LAWS
def test_too_little_precision_is_noticed_and_raised(law: Law):
    coarse, fine = _table(law, 3.7, 64), _table(law, 3.7)
    assert coarse.thresholds.tolist() == fine.thresholds.tolist()
    assert _cumulative(law, 3.7, 64)[1] * 2**63 > _cumulative(law, 3.7, 64)[0][-1]  # 64 bits alone would not do


@LAWS
@pytest.mark.parametrize("std", [0.6, 5.0, 40.0])
def test_draws_have_the_exact_law(law: Law, std: float):
    n = 300_000
    draws = draw(law, std, n, SecureRandom.from_os())
    edge = max(1, round(3 * std))
    half = np.diff([0.0, *(float(p) for p in exact(law, std)[: edge + 1])])
    pmf = np.concatenate((half[:0:-1] / 2, half[:1], half[1:] / 2))
    cells = [(draws < -edge).sum(), *((draws == k).sum() for k in range(-edge, edge + 1)), (draws > edge).sum()]
    beyond = (1 - pmf.sum()) / 2
    assert stats.chisquare(cells, n * np.array([beyond, *pmf, beyond])).pvalue > ALPHA


@LAWS
@pytest.mark.parametrize("std", [838.0, 20_000.0])
def test_moments_and_shape_of_wide_noise(law: Law, std: float):
    n = 200_000
    draws = draw(law, std, n, SecureRandom.from_os()) / std
    assert abs(draws.mean()) < DEVIATIONS / np.sqrt(n)
    assert abs((draws**2).mean() - 1.0) < DEVIATIONS * np.sqrt(2.0 / n)  # excess kurtosis is below 2e-6
    assert stats.kstest(draws, "norm").pvalue > ALPHA  # cells are 1/800 of a standard deviation at most


@LAWS
@pytest.mark.parametrize("std", [0.3, 60.0, 3000.0])
def test_every_path_of_the_lookup_finds_the_cell_that_a_search_finds(law: Law, std: float):
    table = _table(law, std)
    near = np.concatenate([table.thresholds[:-1] + step for step in (-1, 1, 1 << 20, -(1 << 40))])
    spread = (SecureRandom.insecure_from(2).uint64(20_000) >> np.uint64(1)).astype(np.int64)
    uniform = np.concatenate((near, spread))
    uniform = uniform[(uniform >= 0) & ~np.isin(uniform, table.thresholds)]
    crowded = table.guide[uniform >> table.shift] < 0
    assert 0 < crowded.sum() < len(uniform)
    found = draw(law, std, len(uniform), Scripted(*uniform.tolist()))  # type: ignore[arg-type]
    assert (found == table.thresholds.searchsorted(uniform, side="right")).all()
    mirrored = draw(law, std, len(uniform), Scripted(*(uniform.astype(np.uint64) | np.uint64(2**63)).tolist()))  # type: ignore[arg-type]
    assert (mirrored == -found).all()


@LAWS
@pytest.mark.parametrize(("std", "cell"), [(0.6, 0), (0.6, 2), (3.7, 0), (3.7, 9), (30.0, 41), (30.0, 200)])
def test_a_uniform_that_equals_a_threshold_is_decided_by_further_bits(law: Law, std: float, cell: int):
    threshold = int(_table(law, std).thresholds[cell])
    with mpmath.workprec(400):
        boundary = int(mpmath.floor(mpmath.ldexp(exact(law, std)[cell], 63 + 128)))
    assert boundary >> 128 == threshold
    first, second = (boundary >> 64) % 2**64, boundary % 2**64
    below, above = cell, cell + 1
    for words, expected in (
        ((first - 1,), below),
        ((first + 1,), above),
        ((first, second - 1), below),
        ((first, second + 1), above),
        ((first, second, 0), below),  # the boundary is an irrational number: a third word decides
    ):
        stream = Scripted(threshold | 2**63, *words)
        assert draw(law, std, 1, stream).tolist() == [-expected]  # type: ignore[arg-type]
        assert stream.words == []


@LAWS
def test_the_tail_beyond_the_table_is_drawn_too(law: Law):
    table, cumulative = _table(law, 2.0), exact(law, 2.0)
    for word in (0, 2**63, 2**64 - 2**20):
        cell = _decide(law, 2.0, 2**63 - 1, Scripted(word))  # type: ignore[arg-type]
        with mpmath.workprec(400):
            uniform = 1 - mpmath.ldexp(2**64 - word, -127)
            assert cumulative[cell - 1] <= uniform < cumulative[cell]
        assert cell >= len(table.thresholds) - 1
    assert _decide(law, 2.0, 2**63 - 1, Scripted(2**64 - 2**20)) > len(table.thresholds)  # type: ignore[arg-type]


@LAWS
def test_a_seed_repeats_its_draws_and_any_number_can_be_drawn(law: Law):
    one, same, other = (draw(law, 50.0, 40_000, SecureRandom.insecure_from(seed)) for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).any()
    assert one.dtype == np.int64
    assert draw(law, 50.0, 0, SecureRandom.insecure_from(1)).shape == (0,)


@LAWS
@given(st.floats().filter(lambda s: not 2.0**-10 <= s <= 2.0**16))
@settings(deadline=None, max_examples=50)
def test_standard_deviations_out_of_range_are_refused(law: Law, std: float):
    with pytest.raises(PrivacyError, match="2\\^-10 to 2\\^16"):
        draw(law, std, 1, SecureRandom.insecure_from(0))
