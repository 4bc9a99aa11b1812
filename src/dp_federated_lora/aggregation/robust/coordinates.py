"""Rules that look at each coordinate by itself.

Columns of the `(n, d)` matrix lie far apart in memory: blocks of them are turned into rows that fit the processor's cache and
sorted there, each thread with blocks of its own. Sorting does more than a median needs, but numpy sorts floats with vector
instructions: finding two ranks takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_federated_lora.aggregation.robust.updates import Points

Block = NDArray[np.float32]

_WIDTH: Final = 128  # columns of a thousand updates that fit the second cache


def coordinatewise(points: Points, reduce: Callable[[Block], Block]) -> Tensor:
    """Apply `reduce` to the values of every coordinate: `(d,)` float64.

    Args:
        points: m points in d dimensions.
        reduce: `(coordinates, m)`, which it may reorder, to `(coordinates,)`; it commutes with adding a constant.
    """
    result = torch.empty(points.size, dtype=torch.float64)

    def work(start: int) -> None:
        block = points.columns(slice(start, start + _WIDTH)).contiguous()
        result[start : start + _WIDTH] = torch.from_numpy(reduce(block.t().contiguous().numpy()))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(work, range(0, points.size, _WIDTH)))
    return result + points.centre


def median(points: Points, f: int) -> Tensor:
    """Coordinate-wise median (Yin et al. 2018, arXiv 1803.01498); the mean of the middle two where m is even."""

    def reduce(block: Block) -> Block:
        block.sort(axis=1)
        return _middle(block)

    return coordinatewise(points, reduce)


def trimmed_mean(points: Points, f: int) -> Tensor:
    """Coordinate-wise mean without the f largest and the f smallest values (Yin et al. 2018, arXiv 1803.01498)."""

    def reduce(block: Block) -> Block:
        block.sort(axis=1)
        kept: Block = np.mean(block[:, f : block.shape[1] - f], axis=1)
        return kept

    return coordinatewise(points, reduce)


def meamed(points: Points, f: int) -> Tensor:
    """Coordinate-wise mean of the m - f values nearest to the median (Xie et al. 2018, arXiv 1802.10116)."""
    return coordinatewise(points, lambda block: mean_near_median(block, points.count - f))


def mean_near_median(block: Block, keep: int) -> Block:
    """Mean of the `keep` values nearest to the median of each row `(coordinates, m)`; it sorts the rows.

    The values kept are neighbours in sorted order. A window moves up while the value that it would lose is further from the
    median than the one that it would gain.
    """
    block.sort(axis=1)
    middle = _middle(block)[:, None]
    moves = middle - block[:, : block.shape[1] - keep] > block[:, keep:] - middle
    windows = np.lib.stride_tricks.sliding_window_view(block, keep, axis=1)
    kept: Block = np.mean(windows[np.arange(len(block)), moves.sum(axis=1)], axis=1)
    return kept


def _middle(block: Block) -> Block:
    """Median of each sorted row `(coordinates, m)`."""
    m = block.shape[1]
    middle: Block = np.mean(block[:, (m - 1) // 2 : m // 2 + 1], axis=1)
    return middle
