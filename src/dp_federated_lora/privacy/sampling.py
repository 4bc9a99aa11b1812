"""Who takes part: secret, independent coins, and the event that such a sample earns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from numpy.typing import NDArray

from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy.accounting import DpEvent
from dp_federated_lora.privacy.rng import SecureRandom


@final
@dataclass(frozen=True, slots=True)
class PoissonSampler:
    """Every unit takes part with probability q, independently, by a coin nobody else sees.

    The sampler alone wraps a mechanism's event in the amplification that it earns, so an accountant that
    assumes Poisson sampling cannot be combined with any other way of drawing.

    Args:
        sampling_rate: q in (0, 1]; public.
    """

    sampling_rate: float

    def __post_init__(self) -> None:
        if not 0.0 < self.sampling_rate <= 1.0:
            raise IncompatiblePlan(f"sampling_rate must lie in (0, 1], got {self.sampling_rate}")

    def draw(self, population: int, rng: SecureRandom) -> NDArray[np.int64]:
        """Indices of the units that take part, increasing; may be empty, and then the round runs all the same."""
        return np.flatnonzero(rng.bernoulli(self.sampling_rate, population)).astype(np.int64)

    def amplify(self, event: GaussianDpEvent) -> DpEvent:
        """The event of the mechanism on a Poisson sample (Zhu and Wang 2019; Koskela et al. 2020)."""
        return event if self.sampling_rate == 1.0 else PoissonSampledDpEvent(self.sampling_rate, event)
