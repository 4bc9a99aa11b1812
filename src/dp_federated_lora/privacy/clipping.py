r"""Clipping onto the lattice: the only road from raw vectors to bounded ones.

**Guarantee.** For any input whatsoever (NaN, infinities, huge, empty) each unit contributes an integer vector k
with ||k||_2 <= 2^22, that is ||k C / 2^22||_2 <= C. Scaling uses floating point, but rounding is towards zero and
the integer norm is checked exactly, so the bound does not rest on floating-point arithmetic. Non-finite
contributions become zero, silently: an error or a count would tell something about the unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, final

import torch
from torch import Tensor

from dp_federated_lora.errors import IncompatiblePlan, PrivacyError
from dp_federated_lora.privacy.bounded import LATTICE_BITS, Bounded, BoundedSum, UnitId, seal, seal_sum

_SQUARED_BOUND: Final = 4**LATTICE_BITS

_LEAST: Final = 1e-100

_BLOCK: Final = 2**24
"""Numbers that are clipped at a time on a GPU."""


def resolution(clip_norm: float) -> float:
    """Distance of neighbouring lattice points, C / 2^22.

    Raises:
        PrivacyError: if the clip norm is not finite, or below 1e-100, where squares of numbers as small as it underflow.
    """
    if not (math.isfinite(clip_norm) and clip_norm >= _LEAST):
        raise PrivacyError(f"the clip norm must be finite and at least {_LEAST:g}, got {clip_norm}")
    return math.ldexp(clip_norm, -LATTICE_BITS)


def clip_to(vector: Tensor, clip_norm: float, unit_id: UnitId) -> Bounded:
    """Scale `vector` `(d,)` to norm <= clip_norm and put it on the lattice.

    Raises:
        PrivacyError: if the vector is not one-dimensional.
    """
    if vector.ndim != 1:
        raise PrivacyError(f"a contribution is one flat vector, got shape {tuple(vector.shape)}")
    return seal(_to_lattice(vector, clip_norm).to("cpu", torch.int64), clip_norm, unit_id)


def clip_examples(rows: Tensor, clip_norm: float, units: Sequence[UnitId], *, share: float = 1.0) -> BoundedSum:
    """Clip every row of `rows` `(B, d)`, one per unit, to `share` of the clip norm, and sum them.

    Args:
        rows: one per unit; they are clipped and summed where they are, on a CPU or a GPU; `BoundedSum.merge` brings it here.
        clip_norm: of the whole sum; sets the lattice.
        units: distinct.
        share: in (0, 1]; below 1 for units that pay less than others.

    Raises:
        PrivacyError: if rows and units differ in number, units repeat, or the share is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise PrivacyError(f"a share of the clip norm lies in (0, 1], got {share}")
    distinct = frozenset(units)
    if rows.ndim != 2 or rows.shape[0] != len(units) or len(distinct) != len(units):
        raise PrivacyError(
            f"{tuple(rows.shape)} rows for {len(units)} units of which {len(distinct)} are distinct: "
            "each unit gives exactly one row"
        )
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)  # exact below 2^31 units
    if rows.device.type == "cpu":
        for row in rows:  # one at a time, in place: many times faster than all at once, whose temporaries leave the caches
            total += _to_lattice(row, clip_norm, share)
    else:
        for block in torch.split(rows, max(1, _BLOCK // max(1, rows.shape[1]))):
            total += _to_lattice(block, clip_norm, share).sum(dim=0)
    return seal_sum(total.to(torch.int64), clip_norm, distinct)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptiveClip:
    r"""A clip norm that follows a quantile of the units' norms (Andrew et al. 2021, arXiv 1905.03871).

    A unit sends its clipped vector and the bit b = [norm <= C_t], as +-1/2. The bit is one more coordinate of the vector, scaled
    so that the pair has sensitivity K_t = C_t / sqrt(1 - s^2) with s = z / (2 sigma_b): ONE Gaussian release with multiplier z
    pays for both. Noise z K_t is z_D C_t on the vector, with the paper's z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2), and sigma_b on the
    sum of bits. C_t is fixed before round t; C_{t+1} follows from what round t released.

    Args:
        quantile: gamma in (0, 1), the share of units that should stay unclipped.
        learning_rate: eta of the geometric step C <- C exp(-eta (b - gamma)).
        bit_noise: sigma_b, standard deviation of the noise on the sum of bits; the paper takes a twentieth of the cohort.
    """

    quantile: float
    learning_rate: float
    bit_noise: float

    def __post_init__(self) -> None:
        if not (0.0 < self.quantile < 1.0 and self.learning_rate > 0.0 and self.bit_noise > 0.0):
            raise IncompatiblePlan(f"an adaptive clip has a quantile in (0, 1) and positive rate and bit noise, got {self}")

    def share(self, noise_multiplier: float) -> float:
        """S = z / (2 sigma_b), the bit's share of the sensitivity.

        Raises:
            IncompatiblePlan: if s >= 1: the bit alone would cost more than the round may.
        """
        share = noise_multiplier / (2.0 * self.bit_noise)
        if share >= 1.0:
            raise IncompatiblePlan(
                f"bit noise {self.bit_noise:g} is at most half the noise multiplier {noise_multiplier:g}, so the quantile bit "
                "alone costs more than a round may: raise the cohort (sampling rate, population) or use a fixed clip norm"
            )
        return share

    def sensitivity(self, clip_norm: float, noise_multiplier: float) -> float:
        """K, the L2 norm of vector and bit together."""
        return clip_norm / math.sqrt(1.0 - self.share(noise_multiplier) ** 2)

    def clip(
        self, rows: Tensor, clip_norm: float, noise_multiplier: float, units: Sequence[UnitId], *, weight: float = 1.0
    ) -> BoundedSum:
        """Sum over units of `weight` times clipped rows `(B, d)`, and their bits, `(d + 1,)`; a non-finite row gives neither."""
        bound = self.sensitivity(clip_norm, noise_multiplier)
        half_bit = bound * self.share(noise_multiplier)
        norms = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.float64)
        within = norms <= clip_norm
        clipped = rows.detach().to(torch.float64) * (weight * torch.where(within, 1.0, clip_norm / norms))[:, None]
        bits = torch.where(within, half_bit, -half_bit)[:, None]
        joined = torch.cat([clipped, bits], dim=1)
        return clip_examples(torch.where(torch.isfinite(norms)[:, None], joined, 0.0), bound, units)

    def following(self, clip_norm: float, mean_bit: float, noise_multiplier: float) -> float:
        """C_{t+1} from the released last coordinate divided by the expected cohort: post-processing."""
        half_bit = self.sensitivity(clip_norm, noise_multiplier) * self.share(noise_multiplier)
        unclipped = min(max(mean_bit / (2.0 * half_bit) + 0.5, 0.0), 1.0)
        return clip_norm * math.exp(-self.learning_rate * (unclipped - self.quantile))


def _to_lattice(rows: Tensor, clip_norm: float, share: float = 1.0) -> Tensor:
    """Integers as float64: rows `(d,)` or `(B, d)` each scaled to norm <= share 2^22, rounded towards zero, verified exactly.

    Float64 holds integers below 2^53. A computed sum of squares of integers is out by less than a factor of two, whatever the
    order of its terms, so one that is at most 2^44 had terms and partial sums below 2^53, and is exact.
    """
    values = rows.detach().to(torch.float64, copy=True)  # squares of float32 values overflow float32 from 1e19 on
    norms, bound = torch.linalg.vector_norm(values, dim=-1, keepdim=values.ndim > 1), share * clip_norm
    # An infinite coordinate times a scale of zero is NaN, as is all of a row with a NaN: its sum of squares tells.
    lattice = values.mul_((bound / norms).clamp_(max=1.0).div_(resolution(clip_norm))).trunc_()
    squared = torch.linalg.vecdot(lattice, lattice)[..., None]
    limit = math.floor(Fraction(share) ** 2 * _SQUARED_BOUND)
    if not bool((squared <= limit).all()):
        # Rounding of the scale can leave an excess of parts in 1e16; one lattice step off every coordinate removes it.
        lattice -= lattice.sign() * (squared > limit)
        lattice.masked_fill_(~(torch.linalg.vecdot(lattice, lattice)[..., None] <= limit), 0.0)
    return lattice
