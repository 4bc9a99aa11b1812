r"""Contributions made shorter by a public linear map: the map of a sum is the sum of the maps, so it passes through any sum.

A count-sketch (Charikar, Chen and Farach-Colton 2002) of one row: S `(k, d)` adds each coordinate with a sign s_i to a bucket.
Buckets are filled equally, by ceil(d / k) coordinates at most, and over the signs

    E S^T S x = x,    E ||S x||^2 = ||x||^2,    E ||S^T S x - x||^2 <= (ceil(d / k) - 1) ||x||^2.

What is sent is S x, clipped like any contribution: one bound C, whatever S makes of a norm. Decoding writes the noise of a
bucket to each of its coordinates, so noise in the adapter is as large as without a sketch, and the error of the sketch comes on
top. That error is the smaller of the two while k exceeds (n / z)^2, n the divisor and z the noise multiplier: private sums need
no more than some min(n^2 epsilon^2, d) numbers of each client (Chen, Choquette-Choo, Kairouz and Suresh 2022, arXiv 2203.03761).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Sketch:
    """One public map for each round, all drawn from one public seed, so that their errors average out over rounds.

    Args:
        ratio: d / k >= 1; at 1 vectors are sent as they are.
        seed: public and fixed before any data is touched.
    """

    ratio: float
    seed: int

    def size(self, d: int) -> int:
        """K, the number of coordinates that are sent of a vector `(d,)`."""
        return math.ceil(d / self.ratio)

    def encode(self, rows: Tensor, number: int) -> Tensor:
        """S x of each row x: `(B, d)` to `(B, k)`, in round `number`."""
        if self.ratio == 1.0:
            return rows
        buckets, signs = (t.to(rows.device) for t in _drawn(self.seed, number, rows.shape[1], self.size(rows.shape[1])))
        return rows.new_zeros(len(rows), self.size(rows.shape[1])).index_add_(1, buckets, rows * signs)

    def decode(self, sent: Tensor, d: int, number: int) -> Tensor:
        """S^T y `(d,)`, the unbiased estimate of a vector from y = S x `(k,)`, or from a noised sum of such."""
        if self.ratio == 1.0:
            return sent
        buckets, signs = _drawn(self.seed, number, d, self.size(d))
        return signs * sent[buckets]


NO_SKETCH: Final = Sketch(ratio=1.0, seed=0)


@lru_cache(maxsize=2)
def _drawn(seed: int, number: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """Buckets and signs of all coordinates, both `(d,)`."""
    digest = hashlib.sha256(f"dpfl sketch {seed} {number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    buckets = torch.randperm(d, generator=generator) % k
    return buckets, 1 - 2 * torch.randint(2, (d,), generator=generator, dtype=torch.int8)
