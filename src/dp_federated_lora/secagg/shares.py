"""Noise in shares for a plan, whatever the number of coordinates: a lattice for each that keeps what the plan claims."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Final, Literal, final

import numpy as np
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy import NoiseShares, Released, SecureRandom
from dp_federated_lora.secagg.field import Field
from dp_federated_lora.secagg.mechanisms import DiscreteGaussian, DistributedMechanism, SecureSum, Skellam

_ORDERS: Final = np.arange(2.0, 4097.0)
_STEP: Final = 1.0 + 1e-4
_STEPS: Final = 7000
_MECHANISMS: Final = {"skellam": Skellam, "discrete gaussian": DiscreteGaussian}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SharedNoise(NoiseShares):
    """Skellam or discrete Gaussian shares on integers modulo 2^bits.

    Args:
        noise_multiplier: z of the Gaussian that the noise certain to be in a sum is as good as.
        noise: the law of shares.
        bits: b; at most 32.
        max_cohort: clients of a sum.
        min_cohort: the fewest with which a sum is opened; sizes the shares.
        colluders: clients of a sum that may tell the adversary their share, or add none.
        units: the most units in a sum; None where a client is one.

    Raises:
        IncompatiblePlan: if a field is out of range.
    """

    noise: Literal["skellam", "discrete gaussian"] = "skellam"
    bits: int
    max_cohort: int
    min_cohort: int
    colluders: int
    units: int | None = None

    def __post_init__(self) -> None:
        self.of_size(1)

    def of_size(self, size: int) -> DistributedMechanism:
        """The mechanism for `size` coordinates, in units of the clip norm: the least noise that keeps the claim there.

        Rounding to the lattice makes a unit's influence a little larger than the clip norm, so it is a little more than z.

        Raises:
            IncompatiblePlan: if no noise up to 2 z does: the lattice of so few bits is too coarse.
        """
        return _dominated(self, size)

    def bytes_of(self, size: int) -> int:
        """Bytes of a masked vector of `size` coordinates."""
        return self.of_size(size).total.padded_size * -(-self.bits // 8)

    @property
    def excess(self) -> float:
        """Square root of all shares over those that are certain."""
        return float((self.max_cohort / (self.min_cohort - self.colluders)) ** 0.5)

    @property
    def statement(self) -> str:
        """Whose noise is counted on."""
        counted = self.min_cohort - self.colluders
        return (
            f"only the sum of a round is seen (secure aggregation), of {self.min_cohort:,} participants or more of "
            f"{self.max_cohort:,}; each adds a share of {self.noise} noise, and {counted:,} shares are counted on: of those in a "
            f"sum, at most {self.colluders:,} act with whom the row is about"
        )

    def shared(self, vector: Tensor, rng: SecureRandom, rotation: bytes) -> Tensor:
        """What a client hands to secure aggregation, `(d,)` int64 in [0, 2^b), d the padded size.

        Args:
            vector: `(size,)`, a sum over units of norm 1 at most.
            rng: the client's secret stream.
            rotation: 32 public bytes, the same for all clients of a sum.
        """
        return Field(self.of_size(len(vector)), rotation).contribution(vector, rng)

    def opened(self, summed: Tensor, *, size: int, clip_norm: float, rotation: bytes, insecure: bool) -> Released:
        """The noised sum `(size,)` from the sum of integers `(d,)` modulo 2^b: post-processing."""
        mechanism = self.of_size(size)
        value = Field(mechanism, rotation).decode(summed) * clip_norm
        return Released(value, mechanism.total.noise_multiplier * clip_norm * self.excess, insecure)


@lru_cache(maxsize=64)
def _dominated(shares: SharedNoise, size: int) -> DistributedMechanism:
    """The least noise whose Renyi divergences are at most those of a Gaussian of `shares.noise_multiplier`."""
    facts = {key: value for key, value in asdict(shares).items() if key not in ("noise_multiplier", "noise")}
    allowed = _ORDERS / (2.0 * shares.noise_multiplier**2)

    def at(step: int) -> DistributedMechanism:
        z = shares.noise_multiplier * _STEP**step
        return _MECHANISMS[shares.noise](SecureSum(**facts, size=size, clip_norm=1.0, noise_multiplier=z))

    def keeps(step: int) -> bool:
        return bool((at(step).rdp(_ORDERS) <= allowed).all())

    if not keeps(_STEPS):
        raise IncompatiblePlan(
            f"{shares.bits} bits are too few for a sum of {shares.units or shares.max_cohort:,} units in {size:,} dimensions at "
            f"noise multiplier {shares.noise_multiplier:.4g}: raise secure_sum.bits"
        )
    return at(bisect_left(range(_STEPS), True, key=keeps))
