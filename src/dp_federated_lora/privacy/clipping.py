r"""Clipping onto the lattice: the only road from raw vectors to bounded ones.

**Guarantee.** For any input whatsoever (NaN, infinities, huge, empty) each unit contributes an integer vector k
with ||k||_2 <= 2^22, that is ||k C / 2^22||_2 <= C. Scaling uses floating point, but rounding is towards zero and
the integer norm is checked exactly, so the bound does not rest on floating-point arithmetic. Non-finite
contributions become zero, silently: an error or a count would tell something about the unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from dp_federated_lora.errors import PrivacyError
from dp_federated_lora.privacy.bounded import LATTICE_BITS, Bounded, BoundedSum, UnitId, seal, seal_sum

_SQUARED_BOUND: Final = 4**LATTICE_BITS


def resolution(clip_norm: float) -> float:
    """Distance of neighbouring lattice points, C / 2^22.

    Raises:
        PrivacyError: if the clip norm is not positive and finite.
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise PrivacyError(f"the clip norm must be positive and finite, got {clip_norm}")
    return math.ldexp(clip_norm, -LATTICE_BITS)


def clip_to(vector: Tensor, clip_norm: float, unit_id: UnitId) -> Bounded:
    """Scale `vector` `(d,)` to norm <= clip_norm and put it on the lattice.

    Raises:
        PrivacyError: if the vector is not one-dimensional.
    """
    if vector.ndim != 1:
        raise PrivacyError(f"a contribution is one flat vector, got shape {tuple(vector.shape)}")
    return seal(_to_lattice(vector[None], clip_norm)[0], clip_norm, unit_id)


def clip_examples(rows: Tensor, clip_norm: float, units: Sequence[UnitId]) -> BoundedSum:
    """Clip every row of `rows` `(B, d)`, one per unit, and sum them.

    Raises:
        PrivacyError: if rows and units differ in number or units repeat.
    """
    distinct = frozenset(units)
    if rows.ndim != 2 or rows.shape[0] != len(units) or len(distinct) != len(units):
        raise PrivacyError(
            f"{tuple(rows.shape)} rows for {len(units)} units of which {len(distinct)} are distinct: "
            "each unit gives exactly one row"
        )
    return seal_sum(_to_lattice(rows, clip_norm).sum(dim=0), clip_norm, distinct)


def _to_lattice(rows: Tensor, clip_norm: float) -> Tensor:
    """Integers (B, d): each row scaled to norm <= 2^22, rounded towards zero, verified exactly."""
    rows = rows.detach()
    # Squares of float32 values overflow float32 from 1e19 on, never float64.
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    scale = torch.where(norms > clip_norm, clip_norm / norms, torch.ones_like(norms)) / resolution(clip_norm)
    scaled = rows.to(torch.float64) * scale[:, None]
    usable = torch.isfinite(norms)  # the norm is non-finite if any coordinate is
    lattice = torch.where(usable[:, None], scaled, 0.0).trunc().to(torch.int64)
    too_long = (lattice * lattice).sum(dim=1) > _SQUARED_BOUND
    # Rounding of the scale can leave an excess of parts in 1e16; one lattice step off every coordinate removes it.
    shrunk = lattice - lattice.sign()
    return torch.where(too_long[:, None], shrunk, lattice)
