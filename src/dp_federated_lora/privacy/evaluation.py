"""Scores on participants' own held-out data, as noisy sums.

A unit contributes (correct, 1, loss / cap), each coordinate in [0, 1], so adding or removing it moves the sum by at most sqrt(3)
in L2. The three sums are released by one Gaussian mechanism in the same ledger as training; ratios of them are post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy.accounting import DpEvent
from dp_federated_lora.privacy.bounded import BoundedSum, Released, UnitId
from dp_federated_lora.privacy.clipping import clip_examples
from dp_federated_lora.privacy.mechanisms import GaussianMechanism, NoiseShares
from dp_federated_lora.privacy.permits import Permit
from dp_federated_lora.privacy.rng import SecureRandom


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateEvaluation:
    """When held-out data are scored, and with how much noise.

    Args:
        noise_multiplier: standard deviation of the noise on each sum over sqrt(3).
        every: rounds from one evaluation to the next.
        loss_cap: public bound; a larger loss counts as this.
        shares: of the same noise, where participants add it (trust = "distributed").
    """

    SIZE: ClassVar[int] = 3
    BOUND: ClassVar[float] = math.sqrt(3.0)

    noise_multiplier: float
    every: int
    loss_cap: float
    shares: NoiseShares | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or not (math.isfinite(self.loss_cap) and self.loss_cap > 0):
            raise IncompatiblePlan(f"an evaluation has a period of at least one round and a positive loss cap, got {self}")

    @property
    def mechanism(self) -> GaussianMechanism | NoiseShares:
        """The mechanism of one evaluation; everyone takes part, so nothing amplifies it."""
        return self.shares or GaussianMechanism(self.noise_multiplier)

    @property
    def event(self) -> DpEvent:
        """What one evaluation costs."""
        return self.mechanism.event

    def release(self, total: BoundedSum, *, permit: Permit, rng: SecureRandom) -> Released:
        """The noised sums `(3,)` of one evaluation; errors are those of `GaussianMechanism.release`."""
        mechanism = GaussianMechanism(self.noise_multiplier)
        return mechanism.release(total, charged=mechanism.event, permit=permit, rng=rng)

    def due(self, number: int) -> bool:
        """Whether held-out data are scored after round `number`."""
        return number % self.every == 0

    def tally(self, correct: Tensor, losses: Tensor, units: Sequence[UnitId]) -> BoundedSum:
        """Sum of contributions of distinct units; `correct` in [0, 1] and `losses`, both `(B,)`; NaN contributes nothing."""
        ones = torch.ones_like(losses)
        rows = torch.stack([correct.clamp(0.0, 1.0), ones, (losses / self.loss_cap).clamp(0.0, 1.0)], dim=1)
        return clip_examples(rows, self.BOUND, units)

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Accuracy, loss (capped) and number of units from released sums `(3,)`; ratios are cut to their possible range."""
        correct, count, loss = (float(value) for value in sums)
        scored = max(count, 1.0)
        return {
            "accuracy": min(max(correct / scored, 0.0), 1.0),
            "loss": self.loss_cap * min(max(loss / scored, 0.0), 1.0),
            "units": max(count, 0.0),
        }
