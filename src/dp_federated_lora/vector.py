"""Named tensors as one flat vector, and back.

Everything privacy-critical sees a flat vector; the `Layout` is the public description of what its
slices mean. Two sides that agree on `Layout.content_id` agree on the meaning of every coordinate.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

from dp_federated_lora.errors import ModelError

Shape = tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class Layout:
    """Order, names and shapes of the tensors that make up a flat vector of length `size`.

    Args:
        entries: `(name, shape)` in the order of the slices; names are unique.
    """

    entries: tuple[tuple[str, Shape], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.entries]
        if not names:
            raise ModelError("a layout needs at least one tensor; the model has nothing to train")
        if len(set(names)) != len(names):
            raise ModelError(f"tensor names must be unique, got {names}")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The layout of `tensors`, in their iteration order."""
        return cls(tuple((name, tuple(value.shape)) for name, value in tensors.items()))

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is part of the vector."""
        return any(name == known for known, _ in self.entries)

    @property
    def size(self) -> int:
        """Number of scalars d of the flat vector."""
        return sum(math.prod(shape) for _, shape in self.entries)

    @property
    def content_id(self) -> str:
        """SHA-256 of names and shapes, hexadecimal."""
        return hashlib.sha256(json.dumps(self.entries).encode()).hexdigest()

    def slices(self) -> Iterator[tuple[str, Shape, slice]]:
        """Yield `(name, shape, slice of the flat vector)` in order."""
        start = 0
        for name, shape in self.entries:
            stop = start + math.prod(shape)
            yield name, shape, slice(start, stop)
            start = stop

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate `tensors` to one vector `(d,)`.

        Raises:
            ModelError: if names or shapes differ from the layout.
        """
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != dict(self.entries):
            raise ModelError(f"tensors {found} do not match the layout {dict(self.entries)}")
        return torch.cat([tensors[name].reshape(-1) for name, _ in self.entries])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of `vector` `(d,)` by name.

        Raises:
            ModelError: if the vector has another length.
        """
        if vector.shape != (self.size,):
            raise ModelError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")
        return {name: vector[part].reshape(shape) for name, shape, part in self.slices()}
