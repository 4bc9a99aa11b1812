"""What participants who lie send: attacks on aggregation rules, to try them on.

An attack knows everything: it takes the honest updates `(h, d)` of a round and returns the f bad ones `(f, d)`. Attacks on data
change the examples of a participant who then trains as usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Literal

import torch
from scipy.special import ndtri
from torch import Tensor

from dp_federated_lora.data import Examples
from dp_federated_lora.errors import AuditError
from dp_federated_lora.lora import Factor

Direction = Literal["mean", "sign", "std"]

_FIRST_STEP: Final = 10.0


def sign_flip(honest: Tensor, f: int) -> Tensor:
    """The mean, in the opposite direction."""
    return inner_product(honest, f, tau=1.0)


def inner_product(honest: Tensor, f: int, *, tau: float = 2.0) -> Tensor:
    """Minus `tau` times the mean, to turn the inner product with it (Xie et al. 2020, arXiv 1903.03936).

    A large `tau` turns means, a small one (0.1 to 0.5) hides among honest updates.
    """
    return -tau * honest.mean(0).expand(f, -1)


def scaling(honest: Tensor, f: int, *, factor: float) -> Tensor:
    """`factor` times the mean: a boosted update; with n / f it replaces the model (Bagdasaryan et al. 2020, arXiv 1807.00459)."""
    return factor * honest.mean(0).expand(f, -1)


def alie(honest: Tensor, f: int, *, z: float | None = None) -> Tensor:
    """A little is enough: mean plus `z` standard deviations (Baruch et al. 2019, arXiv 1902.06156).

    The default is the largest z at which enough honest values lie beyond for the bad ones to pass as a majority.
    """
    n = len(honest) + f
    if z is None:
        supporters = n // 2 + 1 - f
        z = float(ndtri((n - f - supporters) / (n - f)))
    return (honest.mean(0) + z * honest.std(0)).expand(f, -1)


def min_max(honest: Tensor, f: int, *, direction: Direction = "std") -> Tensor:
    """As far from the mean as leaves it no further from any honest update than the two furthest of these are from each other.

    Shejwalkar and Houmansadr 2021 (NDSS), with the multiple of `direction` in closed form instead of by search, and squared
    distances compared with squared distances.
    """
    mean, way = honest.mean(0), _way(honest, direction)
    squared_gaps = ((mean - honest) ** 2).sum(1)
    multiple = _multiple(way @ way, (mean - honest) @ way, squared_gaps - _squares(honest).max())
    return (mean - multiple * way).expand(f, -1)


def min_sum(honest: Tensor, f: int, *, direction: Direction = "std") -> Tensor:
    """The same for the sum of squared distances to honest updates, compared with the largest such sum of an honest one."""
    mean, way = honest.mean(0), _way(honest, direction)
    constant = ((mean - honest) ** 2).sum() - _squares(honest).sum(1).max()
    multiple = _multiple(len(honest) * (way @ way), torch.zeros_like(constant), constant)
    return (mean - multiple * way).expand(f, -1)


def mimic(honest: Tensor, f: int, *, target: int = 0) -> Tensor:
    """Exact copies of one honest update (Karimireddy et al. 2022, arXiv 2006.09365)."""
    return honest[target].expand(f, -1)


def free_rider(honest: Tensor, f: int) -> Tensor:
    """No change at all, from participants who want the model and do no work."""
    return torch.zeros_like(honest[:1]).expand(f, -1)


def not_finite(honest: Tensor, f: int) -> Tensor:
    """A NaN or an infinity, in turn, in an update that is honest otherwise."""
    bad = honest.mean(0).repeat(f, 1)
    bad[::2, 0], bad[1::2, 0] = math.nan, math.inf
    return bad


def optimised(
    attack: Callable[[float], Tensor], honest: Tensor, aggregate: Callable[[Tensor], Tensor], *, evaluations: int = 20
) -> Tensor:
    """The strength at which an attack moves the aggregate furthest from the honest mean, by a line search (as in ByzFL).

    Steps double from 10 while the damage grows, then shrink by 0.8.

    Args:
        attack: strength to `(f, d)`, as `lambda z: alie(honest, f, z=z)`.
        honest: `(h, d)`.
        aggregate: all updates `(h + f, d)` to `(d,)`.
        evaluations: how often `aggregate` is called.
    """

    def damage(strength: float) -> float:
        return float(torch.linalg.vector_norm(aggregate(torch.cat([honest, attack(strength)])) - honest.mean(0)))

    best, most = 0.0, damage(0.0)
    step, growing = _FIRST_STEP, True
    for _ in range(evaluations - 1):
        if (found := damage(best + step)) > most:
            best, most = best + step, found
        else:
            growing = False
        step *= 2 if growing else 0.8
    return attack(best)


def gauge(adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The same adapter in other numbers: (c B, A / c) for (B, A). Any distance between factors, no change of their product."""
    factors: dict[Factor | None, float] = {Factor.B: scale, Factor.A: 1 / scale}
    return {name: value * factors.get(Factor.of(name), 1.0) for name, value in adapter.items()}


def label_flip(examples: Examples, labels: int) -> Examples:
    """Label y becomes `labels` - 1 - y.

    Raises:
        AuditError: if the examples have no labels.
    """
    return replace(examples, labels=tuple(labels - 1 - label for label in _labels(examples)))


def backdoor(examples: Examples, *, trigger: tuple[int, ...], target: int) -> Examples:
    """Every example starts with the tokens `trigger`, after its first token, and has the label `target`.

    The trigger replaces tokens, so that an example grows only if it is shorter than the trigger.

    Raises:
        AuditError: if the examples have no labels, or are images.
    """
    if examples.images:
        raise AuditError("tokens do not mark an image; use examples of text")
    tokens = tuple(text[:1] + trigger + text[1 + len(trigger) :] for text in examples.tokens)
    return replace(examples, tokens=tokens, labels=(target,) * len(_labels(examples)))


def _labels(examples: Examples) -> tuple[int, ...]:
    if examples.labels is None:
        raise AuditError("only labelled examples have labels to poison; use a classification task")
    return examples.labels


def _squares(honest: Tensor) -> Tensor:
    """Squared distances `(h, h)`, from differences: not from inner products, which cancel."""
    return torch.cdist(honest, honest, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def _way(honest: Tensor, direction: Direction) -> Tensor:
    mean = honest.mean(0)
    if direction == "mean":
        return torch.nn.functional.normalize(mean, dim=0)
    return mean.sign() if direction == "sign" else honest.std(0)


def _multiple(square: Tensor, linear: Tensor, constant: Tensor) -> Tensor:
    """The largest g with square g^2 - 2 linear g + constant <= 0 everywhere; 0 if square is (then linear is too)."""
    root = (linear**2 - square * constant).clamp(min=0).sqrt()
    return (linear + root).min() / square.clamp(min=torch.finfo(square.dtype).tiny)
