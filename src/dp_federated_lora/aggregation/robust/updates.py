"""Updates as they arrive, and the inner products that grow with them.

Every rule that looks at distances needs n x n numbers and ends in one weighted sum of updates. A row of these numbers is computed
when its update arrives, so that little is left to do after the last one.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_federated_lora.aggregation.lora.methods import LinearMethod
from dp_federated_lora.errors import AggregationError, IncompatiblePlan
from dp_federated_lora.privacy import Released

Array = NDArray[np.float64]

LONGEST: Final = 1e18  # squares of longer vectors overflow float32; no honest update is near it
_WIDTH: Final = 8192  # float32 inner products of this length, added in float64: relative error 1e-8, a third of the speed lost
_CANCELLED: Final = 0.01  # squared distances below this share of squared lengths have lost too many digits


@final
class Points:
    """Updates as affine combinations of what arrived, with the geometry that rules look at.

    The public reference is point 0 and takes the weight that a combination leaves over, so that no rule depends on where the
    origin is. Made by `Updates.points` and `mixed`.

    Args:
        base: `(n + 1, d)` float32, the reference and the updates, less `centre`.
        centre: `(d,)` float64.
        base_gram: `(n + 1, n + 1)` inner products of the rows of `base`.
        mix: `(m + 1, n + 1)` weights of the rows of `base` in the reference and each point; every row sums to one.
    """

    def __init__(self, base: Tensor, centre: Tensor, base_gram: Array, mix: Array | None = None) -> None:
        self._base, self._centre, self._base_gram, self._mix = base, centre, base_gram, mix

    @property
    def count(self) -> int:
        """Number of points m, without the reference."""
        return (len(self._base) if self._mix is None else len(self._mix)) - 1

    @property
    def size(self) -> int:
        """Number of coordinates d."""
        return len(self._centre)

    @property
    def centre(self) -> Tensor:
        """`(d,)` float64: what `columns` leaves out."""
        return self._centre

    @cached_property
    def _gram(self) -> Array:
        return self._base_gram if self._mix is None else self._mix @ self._base_gram @ self._mix.T

    @cached_property
    def squares(self) -> Array:
        """Squared distances `(m, m)` between points."""
        gram = self._gram[1:, 1:]
        lengths = np.diag(gram)
        squares: Array = -2 * gram
        squares += lengths[:, None] + lengths
        np.maximum(squares, 0, out=squares)
        np.fill_diagonal(squares, 0)
        return squares

    def gram_around(self, weights: Array) -> Array:
        """Inner products `(m, m)` of the points less the combination with `weights` `(m,)`."""
        full = _full(weights)
        toward = self._gram @ full
        around: Array = self._gram - toward[:, None] - toward + full @ toward
        return around[1:, 1:]

    def distances_to(self, weights: Array) -> Array:
        """Distances `(m,)` of the points to the combination with `weights` `(m,)`; with zeros, to the reference."""
        full = _full(weights)
        toward = self._gram @ full
        squares: Array = np.diag(self._gram) - 2 * toward + full @ toward
        distances: Array = np.sqrt(squares.clip(min=0))
        return distances[1:]

    def inner(self, direction: Tensor) -> Array:
        """Inner products `(m,)` of the points less the reference with `direction` `(d,)`."""
        products = _products(self._base, direction.to(torch.float32))
        products = products if self._mix is None else self._mix @ products
        less: Array = products[1:] - products[0]
        return less

    def combine(self, weights: Array) -> Tensor:
        """The reference and `weights` `(m,)` times the points' differences from it: `(d,)` float64."""
        full = _full(weights)
        base_weights = full if self._mix is None else full @ self._mix
        return self._centre + (torch.from_numpy(base_weights).to(torch.float32) @ self._base)

    def mixed(self, weights: Array) -> Points:
        """The points that are combinations of these with the rows of `weights` `(k, m)`."""
        full = np.zeros((len(weights) + 1, self.count + 1))
        full[0, 0] = 1
        full[1:, 0], full[1:, 1:] = 1 - weights.sum(-1), weights
        return Points(self._base, self._centre, self._base_gram, full if self._mix is None else full @ self._mix)

    def columns(self, which: slice | Tensor) -> Tensor:
        """Some coordinates of all points less `centre`: `(m, coordinates)` float32."""
        base = self._base[:, which]
        return base[1:] if self._mix is None else torch.from_numpy(self._mix[1:]).to(torch.float32) @ base


@final
class Updates:
    """The released updates of one round: checked, kept as float32, their inner products computed as they arrive.

    Only what a privacy mechanism has released comes in, so everything that a rule does is post-processing: noised updates of
    single clients, or noised sums of groups. What comes in must mean the same for everybody: of a method that sends both factors,
    (c B, A / c) is the same adapter as (B, A), and whoever sends it moves distances and averages at will.

    Args:
        method: says which factors the updates are changes of.
        reference: `(d,)` public vector that rules start at and that lengths are measured from: zeros, or the last aggregate.
        capacity: the most updates that a round can have; memory is 4 d bytes for each.

    Raises:
        IncompatiblePlan: if the method sends both factors.
    """

    def __init__(self, method: LinearMethod, reference: Tensor, capacity: int) -> None:
        if not method.fixed_gauge:
            raise IncompatiblePlan(
                f"robust rules compare updates, and method {method.name!r} sends both factors: (c B, A / c) is the same adapter "
                "as (B, A), so a client could choose how far from the others it seems and pull the average; use a method that "
                "sends one factor, as 'ffa' does"
            )
        self._centre = reference.detach().to(torch.float64, copy=True)
        self._rows = torch.empty(capacity + 1, len(reference))
        self._rows[0] = 0
        self._gram = np.zeros((capacity + 1, capacity + 1))
        self._seen: set[bytes] = set()
        self.non_finite = 0
        self.duplicates = 0

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, update: Released) -> None:
        """Take in the update of one client or group.

        A non-finite update (or one longer than 1e18) is left out and counted; so is an exact copy of an earlier one: two releases
        have their own noise, so equal ones are one release twice. That is hygiene, not a defence: a copy with one bit changed is
        for the rule to bear.

        Raises:
            AggregationError: if it is not a floating-point vector `(d,)`, or there is no room; nothing has changed then.
        """
        value, count = update.value, len(self)
        if value.shape != self._centre.shape or not value.is_floating_point():
            raise AggregationError(
                f"an update must be a floating-point vector of shape {tuple(self._centre.shape)}, got {value.dtype} of shape "
                f"{tuple(value.shape)}; leave its sender out of the round"
            )
        if count + 1 == len(self._rows):
            raise AggregationError(f"there is room for {count} updates and all have arrived; a client sends one in a round")
        difference = value.to(torch.float64) - self._centre
        if not float(torch.linalg.vector_norm(difference)) < LONGEST:
            self.non_finite += 1
            return
        digest = hashlib.sha256(value.to(torch.float64).contiguous().numpy().data).digest()
        if digest in self._seen:
            self.duplicates += 1
            return
        self._seen.add(digest)
        self._rows[count + 1] = difference
        products = _products(self._rows[: count + 2], self._rows[count + 1])
        self._gram[count + 1, : count + 2] = self._gram[: count + 2, count + 1] = products

    def points(self) -> Points:
        """What rules work on: the updates that have arrived.

        Where updates are much closer to each other than to the reference, their distances are lost in rounding: then all are
        centred anew on the most central of them, and their inner products computed again (seconds for a thousand updates; a
        better reference avoids it).
        """
        n = len(self) + 1
        points = Points(self._rows[:n], self._centre, self._gram[:n, :n])
        if n < 3:
            return points
        # Whether most have most others close by: a minority moves neither.
        close = _CANCELLED * np.median(np.diag(self._gram)[1:n])
        half = n // 2
        if 2 * np.count_nonzero((points.squares < close).sum(axis=1) >= half) <= n - 1:
            return points
        typical = np.partition(points.squares, half - 1, axis=1)[:, half - 1]
        middle = self._rows[1 + int(typical.argmin())].clone()
        self._centre = self._centre + middle
        self._rows = self._rows - middle
        self._gram[:n, :n] = _products(self._rows[:n], self._rows[:n].T)
        return Points(self._rows[:n], self._centre, self._gram[:n, :n])


def _full(weights: Array) -> Array:
    """Weights `(.., m + 1)` with the reference's in front, so that they sum to one."""
    return np.concatenate([1 - weights.sum(-1, keepdims=True), weights], axis=-1)


def _products(rows: Tensor, other: Tensor) -> Array:
    """`rows` `(n, d)` times `other` `(d,)` or `(d, k)`, in float64."""
    parts = (rows[:, at : at + _WIDTH] @ other[at : at + _WIDTH] for at in range(0, len(other), _WIDTH))
    total: Array = sum(part.to(torch.float64) for part in parts).numpy()  # type: ignore[union-attr]
    return total
