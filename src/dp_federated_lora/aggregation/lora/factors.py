"""Pairs of factors in an adapter: which tensors belong together, their product's singular values, and their first components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dp_federated_lora.lora import Factor
from dp_federated_lora.vector import Layout


class Pair(NamedTuple):
    """Names of a layer's A `(r, n)`, B `(m, r)`, and of its increment `(m, n)`, which few adapters have."""

    a: str
    b: str
    increment: str


def pairs(names: Iterable[str]) -> list[Pair]:
    """The pairs among the names of an adapter's tensors."""
    found = []
    for name in names:
        stem, a, rest = name.partition(f".{Factor.A.value}.")
        if a:
            found.append(Pair(name, f"{stem}.{Factor.B.value}.{rest}", f"{stem}.{Factor.INCREMENT.value}.weight"))
    return found


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U `(m, p)`, S `(p,)` and V^T `(p, n)` of the product of `(m, k)` and `(k, n)`, in float64; p = min(m, k, n).

    QR of both factors and the SVD of a k x k matrix: no m x n matrix is formed.
    """
    first, second = (torch.linalg.qr(t.to(torch.float64)) for t in (left, right.T))
    u, s, vt = torch.linalg.svd(first.R @ second.R.T, full_matrices=False)
    return first.Q @ u, s, vt @ second.Q.T


def truncated(adapter: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The adapter of a participant with `rank`: the first components of each pair, the others zero.

    A component whose row of A and column of B are both zero has no gradient, so that it also stays what it is.
    """
    result = dict(adapter)
    for name, tensor in adapter.items():
        kind = Factor.of(name)
        if kind in (Factor.A, Factor.CORE):
            result[name] = tensor * (torch.arange(len(tensor)) < rank)[:, None]
        if kind in (Factor.B, Factor.CORE):
            result[name] = result[name] * (torch.arange(tensor.shape[1]) < rank)
    return result


def components(layout: Layout, rank: int) -> Tensor:
    """Which coordinates `(d,)` a participant with `rank` trains and sends, as true and false; the head is always among them."""
    ones = {name: torch.ones(shape) for name, shape in layout.entries}
    return layout.flatten(truncated(ones, rank)) > 0
