r"""What an anonymous shuffler adds to reports that participants noised themselves (Feldman, McMillan, Talwar, arXiv 2012.12803).

**Pure.** Let all n reports come from one R, with R(x) and R(x') e-indistinguishable for all x, x'. For two of them there are Q,
Q' with R(x) = a Q + (1 - a) Q', R(x') = (1 - a) Q + a Q', a = 1 / (1 + exp(-e)). Any other report is at least exp(-e) (Q + Q') /
2: with probability exp(-e) a clone, of Q or Q' by a fair coin. So shuffled reports are post-processing of the counts of Q and Q'
(Theorem 3.2), whose privacy loss is computed here. (Theorem 3.2 of arXiv 2208.04591 is tighter but, by its erratum, not for
every R.)

**Approximate.** Where R(x), R(x') are (e, d)-indistinguishable, e-indistinguishable ones lie within d / (1 + exp(e)) in total
variation (Kairouz, Oh, Viswanath, arXiv 1311.0776); lifting another report above exp(-e) times their mean moves at most exp(-e)
(d + d / (1 + exp(e))). So shuffled reports are within `_distance` of such as above, and over all rounds delta grows by 1 +
exp(epsilon) times that: less than in Theorem 3.8.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy.special import log_ndtr
from scipy.stats import binom

from dp_federated_lora.errors import PrivacyError

_INTERVAL: Final = 5e-4  # of privacy losses, which are rounded up
_TAIL: Final = 1e-20  # cut off a binomial distribution, and counted as lost
_CLONES: Final = 64  # numbers of clones that are told apart; others are rounded down
_FLOAT: Final = 1.0 + 1e-10  # above the relative error of the probabilities below
_LOCAL: Final = tuple(np.geomspace(0.1, 8.0, 18).tolist())  # e tried for a Gaussian: any set gives a bound


def shuffled_epsilon(*, reports: int, epsilon0: float, delta0: float = 0.0, rounds: int = 1, delta: float) -> float:
    """Pessimistic epsilon at `delta` of shuffled reports, at most `rounds` times `epsilon0`; infinity where none is shown.

    Args:
        reports: n, of participants who all report in every round, with the same randomiser.
        epsilon0: e of one report, whatever two data sets its participant may hold; a participant without data is one of them.
        delta0: d of one report.
        rounds: T, each shuffled anew; the next may depend on the results of the last.
        delta: at which the result holds.

    Raises:
        PrivacyError: if a parameter is out of range.
    """
    if not (reports >= 1 and rounds >= 1 and 0.0 < epsilon0 < math.inf and 0.0 < delta < 1.0 and 0.0 <= delta0 < 1.0):
        raise PrivacyError(f"{reports} reports of ({epsilon0}, {delta0}) in {rounds} rounds have no epsilon at delta {delta}")
    lost = rounds * _distance(reports, epsilon0, delta0)
    room = delta / (2.0 * lost) if lost else math.inf  # what is lost grows with epsilon: it may take half of delta
    if room <= 2.0:
        return math.inf
    loss = _counts(reports, epsilon0).self_compose(rounds)

    def holds(epsilon: float) -> bool:
        return bool(loss.get_delta_for_epsilon(epsilon) * _FLOAT + (1.0 + math.exp(epsilon)) * lost <= delta)

    low, high = 0.0, min(rounds * epsilon0, math.log(room - 1.0), 700.0)
    if high < rounds * epsilon0 and not holds(high):  # at the latter, nothing is left but half of delta
        return math.inf
    while high - low > _INTERVAL / 4.0:
        middle = (low + high) / 2.0
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@lru_cache(maxsize=64)
def shuffled_gaussian_epsilon(*, reports: int, noise_multiplier: float, sampling_rate: float, rounds: int, delta: float) -> float:
    """`shuffled_epsilon` of reports of one unit each: a vector clipped to C by a secret coin, else zero, with Gaussian noise.

    Two vectors differ by up to 2 C, and the zero vector is common to both sides of the coin (Balle, Barthe, Gaboardi 2018,
    Theorem 2), so (e, d) of the Gaussian becomes (log(1 + q (exp(e) - 1)), q d).
    """
    mu, q = 2.0 / noise_multiplier, sampling_rate
    found = math.inf
    for e in _LOCAL:
        d = math.exp(log_ndtr(mu / 2.0 - e / mu)) - math.exp(e + log_ndtr(-mu / 2.0 - e / mu))  # Balle and Wang 2018, Theorem 8
        # 1e-15: rounding of the difference, which may even be negative
        one = {"epsilon0": math.log1p(q * math.expm1(e)), "delta0": q * (max(d, 0.0) + 1e-15)}
        found = min(found, shuffled_epsilon(reports=reports, rounds=rounds, delta=delta, **one))
    return found


@lru_cache(maxsize=64)
def _counts(reports: int, epsilon0: float) -> Any:
    """Privacy loss of the counts of Q and Q', rounded to the pessimistic side.

    Fewer clones never hide more, as others can be added afterwards: their number may be rounded down. Beside m - 1 clones, Q is
    counted k times with probability C(m, k) 2^-m times 2 (a k + (1 - a)(m - k)) / m; the neighbour has k and m - k exchanged.
    """
    share, a = math.exp(-epsilon0), 1.0 / (1.0 + math.exp(-epsilon0))
    least, middle = (int(x) for x in binom.ppf([_TAIL, 0.5], reports - 1, share))
    most = 2 * middle - least
    apart = np.unique(np.linspace(least, most, _CLONES).astype(np.int64))
    weights = np.add.reduceat(binom.pmf(np.arange(least, most + 1), reports - 1, share), apart - least)
    weights[-1] += binom.sf(most, reports - 1, share)
    masses: dict[int, float] = {}
    for m, weight in zip((apart + 1).tolist(), weights.tolist(), strict=True):
        edge = int(binom.ppf(_TAIL, m, 0.5))
        k = np.arange(edge, m - edge + 1)
        first, second = a * k + (1.0 - a) * (m - k), (1.0 - a) * k + a * (m - k)
        losses = np.ceil(np.log(first / second) / _INTERVAL + 1e-6).astype(np.int64)
        values, where = np.unique(losses, return_inverse=True)
        parts = np.bincount(where, weight * binom.pmf(k, m, 0.5) * 2.0 * first / m)
        for value, mass in zip(values.tolist(), parts.tolist(), strict=True):
            masses[value] = masses.get(value, 0.0) + mass
    return PrivacyLossDistribution.create_from_rounded_probability(masses, 8.0 * _TAIL, _INTERVAL, pessimistic_estimate=True)


def _distance(reports: int, epsilon0: float, delta0: float) -> float:
    """Total variation between shuffled (e, d)-reports of one round and ones of a pure e."""
    own = delta0 / (1.0 + math.exp(epsilon0))
    return own + (reports - 1) * math.exp(-epsilon0) * (delta0 + own)
