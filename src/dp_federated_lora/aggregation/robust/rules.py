"""Rules that look at distances: n x n numbers decide the weights of one sum.

A rule takes points of which at most f are bad. Names of papers' constants and conventions that differ between
implementations are in the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.linalg import eigh
from torch import Tensor

from dp_federated_lora.aggregation.robust.coordinates import coordinatewise, mean_near_median
from dp_federated_lora.aggregation.robust.updates import Array, Points
from dp_federated_lora.errors import AggregationError
from dp_federated_lora.privacy import SecureRandom

MOST_SUBSETS: Final = 50_000
"""What `mda` and `smea` look at in reasonable time."""


def mean(points: Points, f: int) -> Tensor:
    """The mean: no defence, but after `clip` it is norm bounding."""
    return points.combine(_uniform(points.count, np.arange(points.count)))


def krum(points: Points, f: int) -> Tensor:
    """The point nearest to its m - f nearest, itself included (Blanchard et al. 2017).

    Allouah et al. 2023 (arXiv 2302.01772) prove robustness for this count; the first paper leaves one more out and needs
    m > 2 f + 2 for it.
    """
    return points.combine(_uniform(points.count, _krum_scores(points.squares, f).argmin()))


def multi_krum(points: Points, f: int) -> Tensor:
    """Mean of the m - f points with the least Krum scores."""
    best = _krum_scores(points.squares, f).argsort(kind="stable")[: points.count - f]
    return points.combine(_uniform(points.count, best))


def bulyan(points: Points, f: int) -> Tensor:
    """Krum chooses and removes m - 2 f points; their m - 4 f values nearest to the median are averaged (Mhamdi et al. 2018)."""
    left = list(range(points.count))
    chosen = [left.pop(int(_krum_scores(points.squares[np.ix_(left, left)], f).argmin())) for _ in range(points.count - 2 * f)]
    return coordinatewise(points, lambda block: mean_near_median(block[:, chosen], points.count - 4 * f))


def geometric_median(points: Points, f: int, *, nu: float = 1e-6, steps: int = 16) -> Tensor:
    """The point with the least sum of distances, by smoothed Weiszfeld steps from the reference (Pillutla et al. 2022, RFA).

    Args:
        points: m points.
        f: at most (m - 1) / 2 of them are bad.
        nu: distances below it count as it; it must be far below the distances of honest points, or the result is their mean.
        steps: number of steps.
    """
    weights = np.zeros(points.count)
    for _ in range(steps):
        weights = 1 / np.maximum(points.distances_to(weights), nu)
        weights /= weights.sum()
    return points.combine(weights)


def centered_clipping(points: Points, f: int, *, tau: float, steps: int = 1) -> Tensor:
    """Steps by the mean difference from where one stands, each clipped to `tau` (Karimireddy et al. 2021, arXiv 2012.10333).

    It starts at the reference, which should be the last aggregate. In one step f bad points move it by at most 2 `tau` f / m.
    """
    weights = np.zeros(points.count)
    for _ in range(steps):
        kept = tau / np.maximum(points.distances_to(weights), tau)
        weights = weights * (1 - kept.mean()) + kept / points.count
    return points.combine(weights)


def mda(points: Points, f: int) -> Tensor:
    """Mean of the m - f points of least diameter, exactly; of several such sets the first (El Mhamdi et al. 2021)."""
    return _best_subset(points, f, lambda chosen: float(points.squares[np.ix_(chosen, chosen)].max()))


def smea(points: Points, f: int) -> Tensor:
    """Mean of the m - f points whose covariance has the least top eigenvalue, exactly (Allouah et al. 2023, arXiv 2302.04787)."""

    def spread(chosen: tuple[int, ...]) -> float:
        around = points.gram_around(_uniform(points.count, chosen))[np.ix_(chosen, chosen)]
        return float(np.linalg.eigvalsh(around)[-1])

    return _best_subset(points, f, spread)


def caf(points: Points, f: int) -> Tensor:
    """Covariance-bound agnostic filter (Allouah et al. 2025): weights shrink along the direction of most variance.

    Of the weighted means passed while the weights sum to more than m - 2 f, the one of least variance. The eigenvector is exact,
    and the largest projection is that of a point that still has weight, so every step removes a point.
    """
    left = np.ones(points.count)
    best, least = left / left.sum(), math.inf
    while left.sum() > points.count - 2 * f:
        weights = left / left.sum()
        root = np.sqrt(weights)
        variance, vector = _top(root[:, None] * points.gram_around(weights) * root)
        if variance < least:
            best, least = weights, variance
        projections = np.divide(vector**2, weights, out=np.zeros_like(weights), where=weights > 0)
        left = left * (1 - projections / projections.max())
    return points.combine(best)


def dnc(points: Points, f: int, *, rng: SecureRandom, passes: int = 5, coordinates: int = 10_000) -> Tensor:
    """Divide and conquer (Shejwalkar and Houmansadr 2021): mean of the points that no pass drops.

    A pass drops the f points with the largest projections on the direction of most variance, over coordinates that the sender
    could not know.

    Args:
        points: m points.
        f: at most (m - 1) / 2 of them are bad; every pass drops f.
        rng: secret stream that draws the coordinates.
        passes: number of passes; all together may leave no point.
        coordinates: drawn for each pass.

    Raises:
        AggregationError: if no point is left.
    """
    kept = np.ones(points.count, dtype=bool)
    for _ in range(passes):
        drawn = torch.from_numpy(rng.uint64(points.size).argsort()[:coordinates])
        columns = points.columns(drawn).to(torch.float64)
        columns -= columns.mean(0)
        _, vector = _top((columns @ columns.T).numpy())
        kept[np.argsort(vector**2)[points.count - f :]] = False
    if not kept.any():
        raise AggregationError(
            f"dnc dropped all {points.count} updates in {passes} passes of f = {f}: use fewer passes or a smaller f"
        )
    return points.combine(_uniform(points.count, np.flatnonzero(kept)))


def fltrust(points: Points, f: int, *, root: Tensor) -> Tensor:
    """Mean of the points, made as long as the root update, weighted by positive cosines (Cao et al. 2021, arXiv 2012.13995).

    Args:
        points: m points.
        f: any number below m.
        root: `(d,)` the server's own update, from public data, as a difference from the reference.
    """
    length, own = points.distances_to(np.zeros(points.count)), float(torch.linalg.vector_norm(root))
    usable = (length > 0) & (own > 0)
    cosines = np.divide(points.inner(root), length * own, out=np.zeros(points.count), where=usable).clip(min=0)
    scaled = np.divide(cosines * own, length, out=np.zeros(points.count), where=usable)
    return points.combine(scaled / (cosines.sum() or 1.0))


def _uniform(m: int, chosen: ArrayLike) -> Array:
    weights = np.zeros(m)
    weights[np.asarray(chosen)] = 1 / np.size(chosen)
    return weights


def _krum_scores(squares: Array, f: int) -> Array:
    """Sum of squared distances to the m - f nearest, itself included: `(m,)`."""
    nearest = len(squares) - f
    scores: Array = np.partition(squares, nearest - 1, axis=1)[:, :nearest].sum(axis=1)
    return scores


def _top(symmetric: Array) -> tuple[float, Array]:
    """The largest eigenvalue of `(m, m)` and its eigenvector `(m,)`."""
    last = len(symmetric) - 1
    values, vectors = eigh(symmetric, subset_by_index=[last, last])
    return float(values[0]), vectors[:, 0]


def _best_subset(points: Points, f: int, badness: Callable[[tuple[int, ...]], float]) -> Tensor:
    n = points.count
    best = min(combinations(range(n), n - f), key=badness)
    return points.combine(_uniform(n, best))
