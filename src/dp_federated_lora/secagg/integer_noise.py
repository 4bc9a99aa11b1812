r"""Exact integer noise: the discrete Gaussian and Skellam distributions by inversion.

A draw is a secret sign and a 63-bit uniform u that is looked up among thresholds floor(P(|X| <= k) 2^63). The thresholds
come from big integers with a proven error, so a uniform that starts with u lies in cell k for certain unless u EQUALS a
threshold; then further random bits and more precision decide. What is drawn is therefore the true law, not one that
floating point approximates (cf. Mironov 2012; Canonne, Kamath and Steinke 2020, arXiv 2004.00010).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from typing import Final, NamedTuple

import mpmath
import numpy as np
from numpy.typing import NDArray

from dp_federated_lora.errors import PrivacyError
from dp_federated_lora.privacy import SecureRandom

_RANGE: Final = (2.0**-10, 2.0**16)  # of standard deviations; tables of larger ones leave every cache
_BITS: Final = 63
_LAST: Final = 2**_BITS - 1
_PRECISION: Final = 192
_BLOCK: Final = 2**14  # draws whose temporaries stay in the cache beside the table

# A law maps a standard deviation and a precision to integers w_0..w_K, proportional to P(X = k), such that
#     |C_k / C_K - P(|X| <= k)| <= (K + 2)^3 2^(6 - precision)  for C_k = w_0 + 2 (w_1 + .. + w_k).
Law = Callable[[float, int], list[int]]


def draw(law: Law, std: float, n: int, rng: SecureRandom) -> NDArray[np.int64]:
    """Exact draws `(n,)` of a law.

    Args:
        law: `discrete_gaussian` or `skellam`.
        std: standard deviation in lattice units, 2^-10 to 2^16.
        n: number of draws.
        rng: the stream.

    Raises:
        PrivacyError: if std is out of range.
    """
    if not _RANGE[0] <= std <= _RANGE[1]:
        raise PrivacyError(f"integer noise has a standard deviation of 2^-10 to 2^16 lattice units, got {std}: rescale it")
    table = _table(law, std)
    draws = np.empty(n, dtype=np.int64)
    for start in range(0, n, _BLOCK):
        bits = rng.uint64(min(_BLOCK, n - start)).view(np.int64)
        uniform = bits & _LAST
        cell = table.guide.take(uniform >> table.shift, mode="clip")
        crowded = np.flatnonzero(cell < 0)
        threshold = table.thresholds.take(cell, mode="clip")
        cell += uniform > threshold
        if crowded.size:
            cell[crowded] = found = table.thresholds.searchsorted(uniform[crowded])
            threshold[crowded] = table.thresholds[found]
        for index in np.flatnonzero(uniform == threshold):
            cell[index] = _decide(law, std, int(uniform[index]), rng)
        sign = bits >> _BITS  # 0 or -1; 0 is its own negative, so it keeps its mass
        cell ^= sign
        np.subtract(cell, sign, out=draws[start : start + _BLOCK])
    return draws


class _Table(NamedTuple):
    """Thresholds `(m,)` and, for each value of a uniform's leading bits, the first cell or -1 if it spans three or more."""

    thresholds: NDArray[np.int64]
    guide: NDArray[np.int32]
    shift: int


@lru_cache(maxsize=8)
def _table(law: Law, std: float, precision: int = _PRECISION) -> _Table:
    cumulative, error = _cumulative(law, std, precision)
    total = cumulative[-1]
    thresholds: list[int] = []
    for value in cumulative:
        threshold, rest = divmod((value - error) << _BITS, total)
        thresholds.append(threshold)
        if threshold == _LAST:  # all further cells share it
            break
        if rest + (error << (_BITS + 1)) >= total:  # the error is larger than what is left to the next integer
            return _table(law, std, 2 * precision)
    array = np.array(thresholds, dtype=np.int64)
    leading = min(18, max(12, round(math.log2(std)) + 5))  # few buckets hold three cells, and the guide fits the cache
    shift = _BITS - leading
    first = array.searchsorted(np.arange(2**leading, dtype=np.int64) << shift)
    inside = np.diff(first, append=len(array))
    return _Table(array, np.where(inside > 1, -1, first).astype(np.int32), shift)


def _cumulative(law: Law, std: float, precision: int) -> tuple[list[int], int]:
    """C_0..C_K of a law, and the bound of |C_k - P(|X| <= k) C_K|."""
    weights = law(std, precision)
    cumulative = list(accumulate((2 * weight for weight in weights[1:]), initial=weights[0]))
    return cumulative, ((len(weights) + 1) ** 3 * cumulative[-1] >> (precision - 6)) + 1


def _decide(law: Law, std: float, uniform: int, rng: SecureRandom) -> int:
    """The cell |X| of a uniform whose first 63 bits are `uniform`, from as many further bits as it takes."""
    bits = _BITS
    while True:
        uniform = (uniform << 64) | int(rng.uint64(1)[0])
        bits += 64
        cumulative, error = _cumulative(law, std, _PRECISION + bits)
        low, high = (point * cumulative[-1] >> bits for point in (uniform, uniform + 1))
        cell = bisect_right(cumulative, low - error)
        if cell < len(cumulative) and cell == bisect_right(cumulative, high + 1 + error):
            return cell


def discrete_gaussian(sigma: float, precision: int) -> list[int]:
    """Weights of P(k) proportional to exp(-k^2 / (2 sigma^2)); the variance is at most sigma^2, from sigma = 2 on the same.

    w_k = 2^precision q^(k^2) for q = exp(-1 / (2 sigma^2)), from w_(k+1) = w_k q^(2k+1), down to zero. Truncated
    products of numbers below one: the error of q^(2k+1) is at most 3 (k + 1) units, that of w_k 4 (k + 1)^2, and the mass
    beyond K no more than (K + 1) times that of K.
    """
    with mpmath.workprec(precision + 64):
        exponent = 1 / (2 * mpmath.mpf(sigma) ** 2)
        ratio, square = (int(mpmath.ldexp(mpmath.exp(-power * exponent), precision)) for power in (1, 2))
    weights = [1 << precision]
    while weights[-1]:
        weights.append(weights[-1] * ratio >> precision)
        ratio = ratio * square >> precision
    return weights


def skellam(std: float, precision: int) -> list[int]:
    """Weights of the difference of two Poisson(mu / 2) variables, mu = std^2: P(k) = exp(-mu) I_k(mu).

    By I_(k-1) = I_(k+1) + (2k / mu) I_k from I_(K+1) = 0 downwards. All terms are positive, so a step loses a relative
    2^(1 - precision) at most. Starting at zero changes w_k by less than I_(K+1), since the other solution (-1)^k K_k(mu) grows
    with k (Gautschi 1967; DLMF 10.29, 10.37), and K is the first x for which the Chernoff bound
    P(X >= x) <= exp(mu (cosh t - 1) - t x), sinh t = x / mu, is below 2^-precision.
    """
    mu = std * std

    def exponent(x: int) -> float:
        return x * math.asinh(x / mu) - x * x / (math.hypot(x, mu) + mu)

    last = bisect_left(range(2**32), (precision + 1) * math.log(2.0), key=exponent)
    shift = precision + max(1, math.frexp(mu)[1])
    factor = math.floor(Fraction(2 ** (shift + 1)) / Fraction(std) ** 2)
    weights = [0, 1 << precision]
    for k in range(last, 0, -1):
        weights.append(weights[-2] + (k * weights[-1] * factor >> shift))
    return weights[:0:-1]
