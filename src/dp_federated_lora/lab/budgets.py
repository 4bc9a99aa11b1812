r"""Personalised budgets: participants declare their own epsilon, and each group pays no more than its own.

Boenisch et al. 2023 (IDP-SGD, arXiv 2303.17046). In both variants the noise on the sum is common to all:

- SAMPLE: group p takes part with its own probability q_p; the noise multiplier z is such that the mean of q_p is q.
- SCALE: all take part with q; group p is clipped to f_p C with f_p <= 1, so its noise multiplier is z / f_p.

Budgets are declared and public. What an individual has really spent depends on its data and is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from scipy.optimize import brentq

from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy import Budget, Tier, calibrate_noise_multiplier, calibrate_sampling_rate


class Personalisation(Enum):
    """What differs between groups: how often they take part, or how hard they are clipped."""

    SAMPLE = "sample"
    SCALE = "scale"


def personal_tiers(
    budgets: Sequence[tuple[Budget, int]], *, variant: Personalisation, sampling_rate: float, rounds: int
) -> tuple[float, tuple[Tier, ...]]:
    """Noise multiplier on the plan's clip norm, and a tier for each `(budget, number of units)`.

    Args:
        budgets: one entry per group.
        variant: SAMPLE or SCALE.
        sampling_rate: q, the mean over units (SAMPLE) or everyone's (SCALE).
        rounds: T.

    Raises:
        IncompatiblePlan: if there is no group or an empty one.
    """
    if not budgets or any(units < 1 for _, units in budgets):
        raise IncompatiblePlan("personal budgets need at least one group, and a positive public number of units in each")
    multipliers = [
        calibrate_noise_multiplier(epsilon=b.epsilon, delta=b.delta, sampling_rate=sampling_rate, rounds=rounds)
        for b, _ in budgets
    ]
    if variant is Personalisation.SCALE:
        least = min(multipliers)
        return least, tuple(
            Tier(budget, units, sampling_rate, least / z) for (budget, units), z in zip(budgets, multipliers, strict=True)
        )
    total = sum(units for _, units in budgets)

    def rates(z: float) -> list[float]:
        return [calibrate_sampling_rate(epsilon=b.epsilon, delta=b.delta, noise_multiplier=z, rounds=rounds) for b, _ in budgets]

    def excess(log_z: float) -> float:  # between logarithms it is nearly a line, which takes a root finder few steps
        mean = sum(q * units for q, (_, units) in zip(rates(math.exp(log_z)), budgets, strict=True)) / total
        return math.log(mean / sampling_rate)

    # Between the noise that the most generous and the most careful budget alone would ask for, the mean rate reaches q.
    # The ends move out by more than the tolerance of rates and multipliers, so that the root lies between them.
    z = math.exp(brentq(excess, math.log(0.998 * min(multipliers)), math.log(1.002 * max(multipliers)), xtol=1e-4))
    return z, tuple(Tier(budget, units, q, 1.0) for (budget, units), q in zip(budgets, rates(z), strict=True))
