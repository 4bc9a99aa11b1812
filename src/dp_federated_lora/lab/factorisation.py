"""Which bands to correlate noise with: the least squared error of all prefix sums, found once before a run.

After t rounds of plain SGD the model has taken in the sum of t releases, whose noise is row t of A C^{-1} Z with A the prefix
sums (arXiv 2306.08153). Nothing here touches data or affects a guarantee: `CorrelatedGaussian` scales its noise to
whatever it is given.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from scipy.signal import lfilter

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.privacy import Correlation, Participation, sensitivity

Floats = NDArray[np.float64]
Error = Literal["mean", "max"]  # over rounds; the largest error of a prefix sum is that of the last


def square_root_bands(n: int) -> Floats:
    """c_k = binom(2k, k) / 4^k `(n,)`, the optimal Toeplitz C for the largest error and one participation (arXiv 2202.11205)."""
    k = np.arange(1, n)
    return np.cumprod(np.append(1.0, (2 * k - 1) / (2 * k)))


def prefix_error(column: Floats, rounds: int, error: Error = "mean") -> float:
    """Mean or largest variance of the noise in the prefix sums of `rounds` rounds, for Z of variance 1 and C of that column."""
    return float(_weights(rounds, error) @ _impulse([1.0], np.convolve(column, [1.0, -1.0]), rounds) ** 2)


@lru_cache(maxsize=8)
def optimise_bands(rounds: int, bands: int, error: Error = "mean") -> Correlation:
    """The bands, the first one included, with the least error if rounds of one unit are at least `bands` apart.

    Then every participation costs the same and how many there are does not matter.

    Raises:
        ConfigError: if there are no bands or more than rounds.
    """
    if not 1 <= bands <= rounds:
        raise ConfigError(f"between 1 and {rounds} bands can be optimised over {rounds} rounds, got {bands}")
    weights = _weights(rounds, error)

    def loss(free: Floats) -> tuple[float, Floats]:
        c = np.append(1.0, free)
        sums = _impulse([1.0], np.convolve(c, [1.0, -1.0]), rounds)  # first column of A C^{-1}
        total, norm = weights @ sums**2, c @ c
        # d sums / d c_j = -x^j sums / c, as power series.
        slope = lfilter([1.0], c, sums)
        gradient = np.array([-2.0 * (weights * sums)[j:] @ slope[: rounds - j] for j in range(1, bands)])
        return float(total * norm), gradient * norm + 2.0 * total * free

    best = minimize(loss, square_root_bands(bands)[1:], jac=True, method="L-BFGS-B", options=_OPTIONS).x if bands > 1 else []
    return Correlation(tuple(float(band) for band in best))


@lru_cache(maxsize=8)
def optimise_buffers(rounds: int, separation: int, maximum: int, buffers: int, error: Error = "mean") -> Correlation:
    """A C without end (BLT, arXiv 2408.08868) of little error for `Participation(separation, maximum)`, overlapping or not."""
    participation = Participation(separation, maximum)
    weights = _weights(rounds, error)

    def loss(free: Floats) -> float:
        decays, scales = _parameters(free)
        if scales.sum() > 1.0:  # c would increase, and its sensitivity be unknown
            return np.inf
        below = np.poly(decays)
        above = below + np.append(0.0, sum(s * np.poly(np.delete(decays, i)) for i, s in enumerate(scales)))
        sums = _impulse(below, np.convolve(above, [1.0, -1.0]), rounds)
        return float(weights @ sums**2) * sensitivity(_buffered(decays, scales).column(rounds), participation) ** 2

    def search(slowest: float) -> Any:
        decays = 1.0 - np.geomspace(slowest, 0.5, buffers)
        scales, _ = nnls(np.power.outer(decays, np.arange(rounds - 1)).T, square_root_bands(rounds)[1:])
        found = np.concatenate([np.log(1.0 - decays), np.log(np.maximum(scales, 1e-3))])
        for _ in range(3):  # a fresh simplex leaves the ridge on which the last one collapsed
            result = minimize(loss, found, method="Nelder-Mead", options={"maxiter": 2000, "adaptive": True})
            found = result.x
        return result

    best = min((search(slowest) for slowest in (1e-3 / rounds, 1.0 / rounds, 10.0 / rounds)), key=lambda result: result.fun)
    return _buffered(*_parameters(best.x))


def _buffered(decays: Floats, scales: Floats) -> Correlation:
    return Correlation(tuple(scales.tolist()), tuple(decays.tolist()))


_OPTIONS = {"maxiter": 500, "ftol": 1e-13, "gtol": 1e-9}


def _weights(rounds: int, error: Error) -> Floats:
    """Entry j of the first column of A C^{-1} is in rows j .. rounds - 1."""
    return np.arange(rounds, 0, -1) / rounds if error == "mean" else np.ones(rounds)


def _parameters(free: Floats) -> tuple[Floats, Floats]:
    decays, scales = np.split(np.exp(np.clip(free, -30.0, -1e-9)), 2)
    return 1.0 - decays, scales


def _impulse(above: Any, below: Any, rounds: int) -> Floats:
    """The first coefficients `(rounds,)` of the power series above / below."""
    return np.asarray(lfilter(above, below, np.eye(1, rounds)[0]))
