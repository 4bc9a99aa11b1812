"""A group of units with a budget of its own: how often its units take part, and how hard they are clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from dp_federated_lora.privacy.ledger import Budget


@final
@dataclass(frozen=True, slots=True)
class Tier:
    """Units with one declared budget.

    Args:
        budget: declared, public.
        units: declared, public number of units.
        sampling_rate: q_p of their Poisson sampling.
        clip_share: f_p in (0, 1], their clip norm as a share of the plan's.
    """

    budget: Budget
    units: int
    sampling_rate: float
    clip_share: float
