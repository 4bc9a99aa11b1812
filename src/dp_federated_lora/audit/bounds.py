r"""What correct guesses about canaries say about epsilon: lower bounds, and an estimate. Pure mathematics.

The two one-run bounds hold at their confidence for whatever canaries and scores; the cosine estimate is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from dp_accounting import get_sigma_gaussian
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_ndtr, ndtr, ndtri
from scipy.stats import beta, binom

from dp_federated_lora.errors import AuditError

InverseBlowUp = Callable[[float], float]
"""y -> f(1 - y) of a symmetric trade-off function f: the least false-alarm rate at which a test finds a share y of positives."""

_LARGEST: Final = 1e4  # epsilons beyond this are reported as infinite
_THRESHOLDS: Final = np.linspace(0.0, 8.0, 17)


@final
@dataclass(frozen=True, slots=True)
class Guesses:
    """Outcome of guessing which canaries took part.

    Args:
        canaries: m, each of which took part with probability 1/2, independently.
        guesses: r <= m of them were guessed; their number was fixed in advance.
        correct: v <= r guesses were right.

    Raises:
        AuditError: if the numbers are impossible.
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.guesses <= self.canaries or self.guesses == 0:
            raise AuditError(f"0 <= correct <= guesses <= canaries with at least one guess, got {self}")


def clopper_pearson(successes: int, trials: int, *, confidence: float) -> tuple[float, float]:
    """One-sided lower and upper limits of a probability, each at `confidence` (Clopper and Pearson 1934).

    Raises:
        AuditError: if the counts or the confidence are impossible.
    """
    alpha = _significance(confidence)
    if not 0 <= successes <= trials or trials == 0:
        raise AuditError(f"{successes} successes in {trials} trials are impossible")
    low = beta.ppf(alpha, successes, trials - successes + 1) if successes else 0.0
    high = beta.ppf(1 - alpha, successes + 1, trials - successes) if successes < trials else 1.0
    return float(low), float(high)


def one_run_bound(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """Largest epsilon such that every smaller one is refuted, at `delta` (Steinke et al. 2023, arXiv 2305.08846, Theorem 5.2).

    Holds for any mechanism and any scores.
    """
    alpha = _significance(confidence)
    return largest_refuted(lambda epsilon: _one_run_p_value(guesses, epsilon, delta) <= alpha)


def _one_run_p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Largest probability of at least v correct guesses under (epsilon, delta)-DP."""
    r, v, q = guesses.guesses, guesses.correct, float(expit(epsilon))
    tail = float(binom.sf(v - 1, r, q))
    if v == 0 or delta == 0:
        return tail
    i = np.arange(1, v + 1)
    slope = float(np.max((binom.sf(v - i - 1, r, q) - tail) / i, initial=0.0))
    return min(1.0, tail + 2 * guesses.canaries * delta * slope)


def f_dp_refuted(guesses: Guesses, inverse_blow_up: InverseBlowUp, *, confidence: float) -> bool:
    """Whether the guesses refute f-DP at `confidence` (Mahloujifar et al. 2024, arXiv 2410.22235, Algorithm 3).

    Args:
        guesses: what came of one run.
        inverse_blow_up: of the claimed trade-off function.
        confidence: probability that a true claim is not refuted.
    """
    alpha, m, n, v = _significance(confidence), guesses.canaries, guesses.guesses, guesses.correct
    r, h = alpha * v / m, alpha * (n - v) / m
    for i in range(v - 1, -1, -1):
        higher = max(h, inverse_blow_up(r))
        if higher == h:  # then nothing below changes any more
            break
        h, r = higher, min(1.0, r + i / (n - i) * (higher - h))
    return r + h > n / m


def gaussian_curve(epsilon: float, delta: float) -> InverseBlowUp:
    """The Gaussian mechanism that is exactly (epsilon, delta)-DP (Dong et al. 2022, arXiv 1905.02383)."""
    if epsilon == 0.0:
        return lambda y: y
    shift = 1.0 / float(get_sigma_gaussian(epsilon, delta))
    return lambda y: float(ndtr(ndtri(y) - shift))


def curve_through(points: Sequence[tuple[float, float]]) -> InverseBlowUp:
    """The weakest symmetric trade-off function of a mechanism that is (epsilon, delta)-DP at all of `points`.

    It is the maximum of their lines (Wasserman and Zhou 2010), never above the mechanism's own.
    """
    epsilons, deltas = (np.array(column) for column in zip(*points, strict=True))
    slopes = np.exp(np.concatenate([epsilons, -epsilons]))
    offsets = np.concatenate([1 - deltas, np.exp(-epsilons) * (1 - deltas)])
    return lambda y: max(0.0, float(np.max(offsets - slopes * (1 - y))))


def gaussian_f_dp_bound(guesses: Guesses, *, delta: float, confidence: float) -> float:
    """Epsilon at `delta` of the least private Gaussian mechanism that the guesses refute: holds within that family only."""
    return largest_refuted(lambda epsilon: f_dp_refuted(guesses, gaussian_curve(epsilon, delta), confidence=confidence))


def largest_refuted(refuted: Callable[[float], bool]) -> float:
    """Where `refuted` stops to hold, from below; 0 if it holds nowhere and infinity if beyond 10,000."""
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
        if high > _LARGEST:
            return math.inf
    return boundary(refuted, low, high, tolerance=1e-6) if low > 0 or refuted(0.0) else 0.0


def boundary(refuted: Callable[[float], bool], low: float, high: float, *, tolerance: float) -> float:
    """Where between `low`, which is refuted, and `high` that stops: the refuted end of an interval `tolerance` x `high` wide."""
    width = tolerance * high
    while high - low > width:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


@final
@dataclass(frozen=True, slots=True)
class CosineEstimate:
    """Epsilon as estimated from the scores of canaries that took part.

    Args:
        epsilon: of a fitted normal distribution against the exact null; an estimate, no bound.
        low: lower end of its confidence interval, if scores were independent.
        mean: of the scores; 0 for canaries that did not take part.
        std: of the scores; 1 for canaries that did not take part.
    """

    epsilon: float
    low: float
    mean: float
    std: float


def cosine_estimate(scores: ArrayLike, *, delta: float, confidence: float) -> CosineEstimate:
    """One-shot estimate from one run (Andrew et al. 2024, arXiv 2302.03098, sections 3 and 4).

    Args:
        scores: of the canaries that took part `(k,)`: cosines times sqrt(d), whose null is N(0, 1).
        delta: at which epsilon is wanted.
        confidence: of `low`.

    Raises:
        AuditError: if there are fewer than two scores or they are all equal.
    """
    seen = np.sort(np.asarray(scores, dtype=np.float64))
    if len(seen) < 2 or not float(seen.std()) > 0:
        raise AuditError(f"{len(seen)} canaries that took part show no distribution: use more canaries")
    mean, std = float(seen.mean()), float(seen.std(ddof=1))
    return CosineEstimate(gaussian_pair_epsilon(mean, std, delta=delta), _cosine_low(seen, delta, confidence), mean, std)


def _cosine_low(seen: NDArray[np.float64], delta: float, confidence: float) -> float:
    """Epsilon from error rates of a threshold test: misses by Clopper-Pearson, false alarms from the null.

    The thresholds are fixed in advance and share the error probability.
    """
    share = 1 - _significance(confidence) / len(_THRESHOLDS)
    found = 0.0
    for threshold in _THRESHOLDS:
        misses = int(np.searchsorted(seen, threshold))
        miss = clopper_pearson(misses, len(seen), confidence=share)[1]
        alarm, log_alarm = float(ndtr(-threshold)), float(log_ndtr(-threshold))
        if 1 - delta - miss > 0:
            found = max(found, math.log(1 - delta - miss) - log_alarm)
        if 1 - delta - alarm > 0:
            found = max(found, math.log(1 - delta - alarm) - math.log(miss))
    return found


def gaussian_pair_epsilon(mean: float, std: float, *, delta: float) -> float:
    """Exact epsilon at `delta` between N(0, 1) and N(mean, std^2), the worse of both directions."""

    def excess(epsilon: float) -> float:
        return max(_pair_delta(mean, std, epsilon, sign) for sign in (1.0, -1.0)) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > _LARGEST:
            return math.inf
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def _pair_delta(mean: float, std: float, epsilon: float, sign: float) -> float:
    """Hockey-stick divergence: N(mean, std^2) from N(0, 1) for sign 1, the other way round for sign -1."""
    # sign x log-ratio - epsilon = a x^2 + b x + c, positive where the first density exceeds e^epsilon times the other
    a = sign * (1 - std**-2) / 2
    b = sign * mean / std**2
    c = sign * (-((mean / std) ** 2) / 2 - math.log(std)) - epsilon
    delta = 0.0
    for low, high in _positive(a, b, c):
        null = _log_mass(low, high)
        other = _log_mass((low - mean) / std, (high - mean) / std)
        first, second = (other, null) if sign > 0 else (null, other)
        delta += math.exp(first) * -math.expm1(min(0.0, epsilon + second - first)) if first > -math.inf else 0.0
    return delta


def _positive(a: float, b: float, c: float) -> list[tuple[float, float]]:
    """Intervals on which a x^2 + b x + c > 0."""
    if abs(a) < 1e-12:
        return [] if b == 0 else [(-c / b, math.inf)] if b > 0 else [(-math.inf, -c / b)]
    discriminant = b * b - 4 * a * c
    if discriminant <= 0:
        return [(-math.inf, math.inf)] if a > 0 else []
    root = -(b + math.copysign(math.sqrt(discriminant), b)) / 2  # without cancellation
    low, high = sorted((root / a, c / root))
    return [(-math.inf, low), (high, math.inf)] if a > 0 else [(low, high)]


def _log_mass(low: float, high: float) -> float:
    """Logarithm of the standard normal mass of [low, high], accurate in both tails."""
    if low > 0:
        low, high = -high, -low
    larger, smaller = float(log_ndtr(high)), float(log_ndtr(low))
    return larger + math.log(-math.expm1(smaller - larger)) if smaller < larger else -math.inf


def _significance(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise AuditError(f"a confidence lies in (0, 1), got {confidence}")
    return 1 - confidence
