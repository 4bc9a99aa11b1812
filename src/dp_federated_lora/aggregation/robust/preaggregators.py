"""What may come before a rule: points become other points, and their geometry follows from n x n numbers."""

from __future__ import annotations

import math

import numpy as np

from dp_federated_lora.aggregation.robust.updates import Array, Points
from dp_federated_lora.privacy import SecureRandom


def nnm(points: Points, f: int) -> Points:
    """Every point becomes the mean of its m - f nearest, itself included (Allouah et al. 2023, arXiv 2302.01772)."""
    keep = points.count - f
    nearest = np.argpartition(points.squares, keep - 1, axis=1)[:, :keep]
    weights = np.zeros((points.count, points.count))
    np.put_along_axis(weights, nearest, 1 / keep, axis=1)
    return points.mixed(weights)


def bucketing(points: Points, f: int, *, bucket: int, rng: SecureRandom) -> Points:
    """Means of `bucket` points each, drawn at random; the last may have fewer (Karimireddy et al. 2022, arXiv 2006.09365).

    Up to f of the m / `bucket` results are bad, so that the rule after it needs more of them.
    """
    order = rng.uint64(points.count).argsort()
    weights = np.zeros((math.ceil(points.count / bucket), points.count))
    weights[np.arange(points.count) // bucket, order] = 1.0
    return points.mixed(weights / weights.sum(axis=1, keepdims=True))


def arc(points: Points, f: int) -> Points:
    """Adaptive clipping: the floor(2 (f / m) (m - f)) longest are clipped to the longest of the others (Allouah et al. 2025).

    Lengths are distances from the reference.
    """
    m = points.count
    clipped = 2 * f * (m - f) // m
    return _clipped(points, float(np.sort(points.distances_to(np.zeros(m)))[m - clipped - 1]))


def clip(points: Points, f: int, *, bound: float) -> Points:
    """Points further than `bound` from the reference come back to it: before `mean` this is norm bounding (Sun et al. 2019)."""
    return _clipped(points, bound)


def _clipped(points: Points, bound: float) -> Points:
    length = points.distances_to(np.zeros(points.count))
    kept: Array = np.divide(bound, length, out=np.ones_like(length), where=length > bound)
    return points.mixed(np.diag(kept))
