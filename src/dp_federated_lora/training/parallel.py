"""One thing computed on each core at a time: the one place that decides how many threads torch has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Final, TypeVar

import torch

Tool = TypeVar("Tool")
Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD: Final = 4
"""Items for each tool that are under way or wait to be taken."""


def in_parallel(tools: Sequence[Tool], work: Callable[[Tool, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`work(tool, item)` of each item, in their order; a thread for each tool, which computes on one core.

    A few results wait at most, whatever the number of items. The first failure is raised when its turn comes; what had not
    begun by then is not begun.

    Args:
        tools: each is used by one call at a time.
        work: runs in another thread, where gradients are on at first.
        items: taken one by one, in the calling thread.
    """
    free = SimpleQueue[Tool]()
    for tool in tools:
        free.put(tool)

    def use_one(item: Item) -> Result:
        tool = free.get()
        try:
            return work(tool, item)
        finally:
            free.put(tool)

    with _one_core_each(), ThreadPoolExecutor(len(tools)) as pool:
        waiting = deque[Future[Result]]()
        try:
            for item in items:
                waiting.append(pool.submit(use_one, item))
                if len(waiting) > _AHEAD * len(tools):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_core_each() -> Iterator[None]:
    """While open, new threads and this one compute on one core each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
