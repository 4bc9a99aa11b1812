"""Sealed values between private data and a release.

`Bounded` is one unit's contribution, `BoundedSum` a sum over distinct units. Both live on the integer lattice
of resolution clip_norm / 2^22 and have no arithmetic, no array view and no serialisation: scaling, weighting,
averaging or logging a clipped value is not something they can do. Only the kernel makes or opens them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NewType, NoReturn, Self, final

import torch
from torch import Tensor

from dp_federated_lora.errors import DuplicateContribution, PrivacyError

UnitId = NewType("UnitId", str)

LATTICE_BITS: Final = 22
_SEAL: Final = object()


class _Sealed:
    """Refuses every way out that Python offers by default."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise PrivacyError(f"{type(self).__name__} holds private data and cannot be pickled or copied")

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise PrivacyError(f"{type(self).__name__} holds private data and has no array view")

    def __bool__(self) -> NoReturn:
        raise PrivacyError(f"{type(self).__name__} holds private data and cannot steer control flow")

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: sealed>"


@final
class Bounded(_Sealed):
    """One unit's vector with L2 norm <= clip_norm, as lattice integers.

    Made by `clip_to` only.
    """

    __slots__ = ("_value", "clip_norm", "unit_id")

    def __init__(self, seal: object, value: Tensor, clip_norm: float, unit_id: UnitId) -> None:
        if seal is not _SEAL:
            raise PrivacyError("a Bounded value is made by clip_to, never by hand")
        self._value = value
        self.clip_norm = clip_norm
        self.unit_id = unit_id


@final
class BoundedSum(_Sealed):
    """Sum over distinct units; adding or removing one unit moves it by at most clip_norm in L2.

    Made by `collect`, `clip_examples`, `merge` and `in_blocks` only.
    """

    __slots__ = ("_units", "_value", "clip_norm")

    def __init__(self, seal: object, value: Tensor, clip_norm: float, units: frozenset[UnitId]) -> None:
        if seal is not _SEAL:
            raise PrivacyError("a BoundedSum is made by collect or clip_examples, never by hand")
        self._value = value
        self.clip_norm = clip_norm
        self._units = units

    @classmethod
    def collect(cls, contributions: Iterable[Bounded], *, size: int, clip_norm: float) -> Self:
        """Sum contributions of distinct units; none at all gives the zero sum `(size,)`.

        Raises:
            DuplicateContribution: if a unit appears twice.
            PrivacyError: if a contribution has another clip norm or size.
        """
        return cls._sum(((c._value, c.clip_norm, frozenset((c.unit_id,))) for c in contributions), size, clip_norm)

    @classmethod
    def merge(cls, sums: Iterable[BoundedSum], *, size: int, clip_norm: float) -> Self:
        """Sum of sums over disjoint sets of units.

        Raises:
            DuplicateContribution: if a unit appears in two of them.
            PrivacyError: if a sum has another clip norm or size.
        """
        return cls._sum(((s._value, s.clip_norm, s._units) for s in sums), size, clip_norm)

    @classmethod
    def in_blocks(cls, sums: Sequence[BoundedSum], *, size: int, clip_norm: float) -> Self:
        """Sums over disjoint sets of units side by side, `(g size,)`: a unit is in one block, and moves all by clip_norm at most.

        Raises:
            DuplicateContribution, PrivacyError: as `merge`.
        """
        units = cls.merge(sums, size=size, clip_norm=clip_norm)._units
        return cls(_SEAL, torch.cat([part._value for part in sums]), clip_norm, units)

    @classmethod
    def _sum(cls, parts: Iterable[tuple[Tensor, float, frozenset[UnitId]]], size: int, clip_norm: float) -> Self:
        total = torch.zeros(size, dtype=torch.int64)
        seen: set[UnitId] = set()
        for value, norm, units in parts:
            if norm != clip_norm or value.shape != (size,):
                raise PrivacyError(
                    f"a contribution of clip norm {norm} and shape {tuple(value.shape)} cannot enter a sum of "
                    f"clip norm {clip_norm} and shape ({size},): one plan, one clip norm, one layout"
                )
            if seen & units:
                raise DuplicateContribution(
                    f"unit {sorted(seen & units)[0]!r} appears twice in one sum; its influence would exceed the clip norm"
                )
            seen |= units
            total = total.to(value.device)  # on a GPU for as long as what was clipped there comes in
            total += value
        return cls(_SEAL, total.cpu(), clip_norm, frozenset(seen))


def seal(value: Tensor, clip_norm: float, unit_id: UnitId) -> Bounded:
    """Seal a verified lattice vector (kernel only)."""
    return Bounded(_SEAL, value, clip_norm, unit_id)


def seal_sum(value: Tensor, clip_norm: float, units: frozenset[UnitId]) -> BoundedSum:
    """Seal a sum of verified lattice vectors (kernel only)."""
    return BoundedSum(_SEAL, value, clip_norm, units)


@final
@dataclass(frozen=True, slots=True)
class Released:
    """A paid-for value `(d,)` float64; everything computed from it is post-processing."""

    value: Tensor
    noise_std: float
    insecure: bool
