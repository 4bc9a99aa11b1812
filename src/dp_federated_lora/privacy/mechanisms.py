"""Noise on a bounded sum, against a permit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from dp_accounting import GaussianDpEvent

from dp_federated_lora.errors import IncompatiblePlan, PermitMismatch
from dp_federated_lora.privacy.accounting import LEAST_NOISE, DpEvent, gaussian_parts
from dp_federated_lora.privacy.bounded import LATTICE_BITS, BoundedSum, Released
from dp_federated_lora.privacy.clipping import resolution
from dp_federated_lora.privacy.permits import Permit
from dp_federated_lora.privacy.rng import SecureRandom


@final
@dataclass(frozen=True, slots=True)
class GaussianMechanism:
    """Gaussian noise of standard deviation noise_multiplier x clip_norm on the SUM, on the lattice.

    **Guarantee.** The sum is an integer vector of L2 sensitivity 2^22 lattice units (add or remove one unit). The
    noise is the exact rounding of N(0, sigma^2). As the sum is integral, sum + round(N) = round(sum + N): a
    post-processing of the Gaussian mechanism, hence never more than its epsilon.

    Args:
        noise_multiplier: z >= `LEAST_NOISE`, standard deviation over sensitivity.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= LEAST_NOISE):
            raise IncompatiblePlan(
                f"a noise_multiplier is finite and at least {LEAST_NOISE:g}, got {self.noise_multiplier:g}: less protects nobody"
            )

    @property
    def event(self) -> GaussianDpEvent:
        """The event of one release without sampling."""
        return GaussianDpEvent(self.noise_multiplier)

    def release(self, total: BoundedSum, *, charged: DpEvent, permit: Permit, rng: SecureRandom) -> Released:
        """Burn the permit, then draw noise and return the noised sum `(d,)` float64.

        Args:
            total: the sealed sum.
            charged: the event that this release costs, as the plan states it.
            permit: proof that exactly this event is in the ledger for the stream `rng`.
            rng: the round's stream.

        Raises:
            PermitSpent: if the permit bought a release already.
            PermitMismatch: if it was issued for another event, another stream or another noise multiplier.
            DuplicateContribution: if a unit is in the release of another site under the same charge.
        """
        _, multiplier = gaussian_parts(charged)
        if multiplier != self.noise_multiplier:
            raise PermitMismatch(f"noise multiplier {self.noise_multiplier} but {multiplier} was charged; one plan yields both")
        permit.burn(charged, rng.commitment, total._units)
        sigma = math.ldexp(self.noise_multiplier, LATTICE_BITS)
        noise = torch.from_numpy(rng.derive("noise").rounded_gaussian(sigma, total._value.numel()))
        value = (total._value + noise).to(torch.float64) * resolution(total.clip_norm)
        return Released(value, self.noise_multiplier * total.clip_norm, rng.insecure)
