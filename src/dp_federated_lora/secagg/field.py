r"""From a client's vector to integers modulo 2^b, and from their sum back: the lattice pipeline of distributed noise.

Rotate, clip, scale, round at random, add a noise share, reduce; the server adds, recentres, scales and rotates back
(Kairouz, Liu and Steinke 2021, arXiv 2102.06387, algorithms 1 and 2). The rotation is public and makes coordinates alike,
so that a sum fits 2^b; rounding and noise are secret.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, final

import numpy as np
import torch
from torch import Tensor

from dp_federated_lora.errors import PrivacyError
from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg.mechanisms import DistributedMechanism

# A redraw fails with probability exp(-1/2) at most, so the last resort is reached once in 10^17 contributions.
_REDRAWS: Final = 80


@final
@dataclass(frozen=True, slots=True)
class Field:
    """The maps between vectors `(size,)` and `(d,)` integers modulo 2^b, d the padded size.

    **Guarantee.** For any input whatsoever a client's integers before noise have an L2 norm of at most
    `mechanism.total.l2`: the squared norm is computed and compared in integers.

    Args:
        mechanism: noise shares and, in `mechanism.total`, clip norm, scale and modulus.
        rotation_seed: 32 public bytes, the same for all clients of a round.
    """

    mechanism: DistributedMechanism
    rotation_seed: bytes

    def contribution(self, vector: Tensor, rng: SecureRandom) -> Tensor:
        """What a client hands to secure aggregation: `(d,)` int64 in [0, 2^b), noise included.

        Args:
            vector: `(size,)`; a vector that is not finite, or whose norm is not, counts as zero.
            rng: the client's secret stream of this round.

        Raises:
            PrivacyError: if the vector has another shape.
        """
        return self.wrap(self.encode(vector, rng) + self.mechanism.noise_share(rng))

    def encode(self, vector: Tensor, rng: SecureRandom) -> Tensor:
        """The same without noise and reduction: `(d,)` int64; one unit moves its squared norm by at most `squared_bound`."""
        total = self.mechanism.total
        if vector.shape != (total.size,):
            raise PrivacyError(f"a contribution has shape ({total.size},), got {tuple(vector.shape)}")
        rotated = hadamard(self._signs() * _padded(vector, total.padded_size))
        if total.units is not None:
            return (
                torch.where(rotated.isfinite().all(), rotated * (total.scale / math.sqrt(len(rotated))), 0.0)
                .round()
                .to(torch.int64)
            )
        rotated /= math.sqrt(len(rotated))
        norm = torch.linalg.vector_norm(rotated)
        scaled = torch.where(torch.isfinite(norm), rotated * (total.scale * (total.clip_norm / norm).clamp(max=1.0)), 0.0)
        return next(k for k in roundings(scaled, rng.derive("rounding")) if int((k * k).sum()) <= total.squared_bound)

    def wrap(self, values: Tensor) -> Tensor:
        """Integers modulo 2^b, in [0, 2^b)."""
        return values & ((1 << self.mechanism.total.bits) - 1)

    def unwrap(self, values: Tensor) -> Tensor:
        """The integers in [-2^(b-1), 2^(b-1)) that are congruent to `values`."""
        half = 1 << (self.mechanism.total.bits - 1)
        return self.wrap(values + half) - half

    def sum(self, contributions: Iterable[Tensor]) -> Tensor:
        """Sum modulo 2^b `(d,)` int64; none at all gives zeros."""
        result = torch.zeros(self.mechanism.total.padded_size, dtype=torch.int64)
        for contribution in contributions:
            result = self.wrap(result + contribution)
        return result

    def decode(self, summed: Tensor) -> Tensor:
        """The sum of clipped vectors and noise, `(size,)` float64, from `(d,)` integers modulo 2^b.

        A coordinate of the rotated sum outside [-2^(b-1), 2^(b-1)) wraps: an error, not a leak, of probability 1e-4 at most
        per coordinate for a cohort of `max_cohort`.
        """
        total = self.mechanism.total
        rotated = hadamard(self.unwrap(summed)) / (total.scale * math.sqrt(total.padded_size))
        return (self._signs() * rotated)[: total.size]

    def _signs(self) -> Tensor:
        """Public signs `(d,)` float64 from the rotation seed."""
        size = self.mechanism.total.padded_size
        words = SecureRandom(self.rotation_seed).derive("rotation").uint64(-(-size // 64))
        return 1.0 - 2.0 * torch.from_numpy(np.unpackbits(words.view(np.uint8))[:size]).to(torch.float64)


def hadamard(vector: Tensor) -> Tensor:
    """Walsh-Hadamard transform of `(d,)`, d a power of two; sqrt(d) times an orthogonal one, its own inverse times d.

    Exact where all sums are (integers below 2^53).

    Each of the log2(d) steps transforms the leading bit of the index and makes it the last one.
    """
    result = vector.to(torch.float64)
    for _ in range(vector.numel().bit_length() - 1):
        low, high = result.reshape(2, -1)
        result = torch.stack((low + high, low - high), dim=1)
    return result.reshape(-1)


def roundings(scaled: Tensor, rng: SecureRandom) -> Iterator[Tensor]:
    """Independent unbiased roundings of `scaled` `(d,)` to integers; after too many, the one towards zero."""
    below = scaled.floor()
    fraction = scaled - below
    for _ in range(_REDRAWS):
        coins = torch.from_numpy((rng.uint64(scaled.numel()) >> np.uint64(11)) * 2.0**-53)
        yield (below + (coins < fraction)).to(torch.int64)
    yield scaled.trunc().to(torch.int64)


def _padded(vector: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(vector.detach().to(torch.float64), (0, size - vector.numel()))
