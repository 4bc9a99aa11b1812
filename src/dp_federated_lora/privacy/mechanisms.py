"""Noise on a bounded sum, against a permit: whole, or in shares that clients add."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from dp_accounting import GaussianDpEvent
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, PermitMismatch
from dp_federated_lora.privacy.accounting import LEAST_NOISE, DpEvent, SharedNoiseDpEvent, gaussian_parts
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
        _require_multiplier(self.noise_multiplier, multiplier)
        permit.burn(charged, rng.commitment, total._units)
        sigma = math.ldexp(self.noise_multiplier, LATTICE_BITS)
        noise = torch.from_numpy(rng.derive("noise").rounded_gaussian(sigma, total._value.numel()))
        value = (total._value + noise).to(torch.float64) * resolution(total.clip_norm)
        return Released(value, self.noise_multiplier * total.clip_norm, rng.insecure)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseShares(ABC):
    """Noise that clients add in shares, where only the sum is ever seen: secure aggregation says how.

    **Guarantee.** A subclass gives integers whose sum, with the shares that are certain to be in it, has Renyi divergences at
    integer orders up to 4,096 of at most a Gaussian's of `noise_multiplier`, for a unit that is added or removed at one client.

    Args:
        noise_multiplier: z of that Gaussian.
    """

    noise_multiplier: float

    @property
    def event(self) -> SharedNoiseDpEvent:
        """The event of one sum without sampling."""
        return SharedNoiseDpEvent(self.noise_multiplier)

    @property
    @abstractmethod
    def excess(self) -> float:
        """Standard deviation of the noise if nobody drops out, over that which is certain."""

    @property
    @abstractmethod
    def statement(self) -> str:
        """What the guarantee rests on, in a sentence for the privacy statement."""

    def release(self, total: BoundedSum, *, charged: DpEvent, permit: Permit, rng: SecureRandom, rotation: bytes) -> Tensor:
        """Burn the permit, then give the integers that a client hands to secure aggregation, its share of noise included.

        Args:
            total: of the client's units, `(d,)`.
            charged: the event that the sum costs, as the plan states it.
            permit: proof that it is in the ledger for the stream `rng`.
            rng: the client's secret stream of this sum.
            rotation: 32 public bytes, the same for all clients of the sum.

        Raises:
            PermitSpent, PermitMismatch, DuplicateContribution: as `GaussianMechanism.release`.
        """
        _require_multiplier(self.noise_multiplier, gaussian_parts(charged)[1])
        permit.burn(charged, rng.commitment, total._units)
        return self.shared(total._value.to(torch.float64) * resolution(1.0), rng, rotation)

    @abstractmethod
    def shared(self, vector: Tensor, rng: SecureRandom, rotation: bytes) -> Tensor:
        """Integers for a sum `(d,)` over units of norm 1 at most."""


def _require_multiplier(own: float, charged: float) -> None:
    if own != charged:
        raise PermitMismatch(f"noise multiplier {own} but {charged} was charged; one plan yields both")
