"""What choices made in view of earlier outputs may cost: a Renyi filter at one order.

A schedule fixed in advance composes by PLD. Over many runs the next is chosen after the last one's result; the curve-wise
filter is then invalid (arXiv 2602.06756), while the sum of Renyi divergences at one order that was fixed before the first
event is a valid one (Feldman and Zrnic 2021, arXiv 2008.11193, Theorem 4.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Self, final

from dp_accounting import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from dp_federated_lora.errors import UnsupportedEvent
from dp_federated_lora.privacy.accounting import DpEvent, SharedNoiseDpEvent, divergences, repeated

# Integer orders: the divergence of the sampled Gaussian is then a finite sum (Mironov et al. 2019, arXiv 1908.10530, 3.3).
_ORDERS: Final = range(2, 4097)


@final
@dataclass(frozen=True, slots=True)
class RenyiFilter:
    """Sum of Renyi divergences at one order; an event fits while the epsilon after it is within the budget.

    Args:
        order: alpha, an integer above 1, fixed before the first event.
        divergence: sum so far, rounded up.
    """

    order: int
    divergence: float = 0.0

    @classmethod
    def for_budget(cls, epsilon: float, delta: float) -> Self:
        """The empty filter at the order that admits the most Gaussian releases; each costs in proportion to the order."""

        def admitted(order: int) -> float:  # conversion: Canonne et al. 2020, arXiv 2004.00010, Proposition 12
            return (epsilon - math.log1p(-1 / order) + math.log(delta * order) / (order - 1)) / order

        return cls(max(_ORDERS, key=admitted))

    def with_event(self, event: DpEvent) -> RenyiFilter:
        """The filter after one more execution of `event`; this one stays as it is.

        Raises:
            UnsupportedEvent: if the event has no Renyi bound under add-or-remove-one: not in the closed table, a capped sample
                (only its PLD is known), or a cohort of fixed size (replace-one).
        """
        once, count = repeated(event)
        if count >= 1 and isinstance(once, NoOpDpEvent):
            return self
        if count < 1 or not isinstance(once, GaussianDpEvent | PoissonSampledDpEvent | SharedNoiseDpEvent):
            raise UnsupportedEvent(
                f"{event} cannot be charged to a lifetime budget, which is a Renyi bound under add-or-remove-one: use Poisson "
                "sampling or none; nothing was charged"
            )
        (divergence,) = divergences(once, range(self.order, self.order + 1))
        added = math.nextafter(count * float(divergence), math.inf)
        return replace(self, divergence=math.nextafter(self.divergence + added, math.inf))

    def epsilon(self, delta: float) -> float:
        """Epsilon so far at `delta`; 0 for no event."""
        return 0.0 if self.divergence == 0.0 else float(compute_epsilon([self.order], [self.divergence], delta)[0])
