"""Which client holds which example: index lists, where every example has exactly one client.

A partition is part of a simulated experiment, not of its privacy: the seed is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from dp_federated_lora.errors import ConfigError

_ALPHA: Final = (1e-9, 1e9)  # outside, the logarithms of the gamma draws leave float64


def iid(n: int, clients: int, seed: int) -> list[list[int]]:
    """Deal n shuffled examples to the clients; sizes differ by at most one.

    Args:
        n: number of examples.
        clients: number of clients; those beyond n get nothing.
        seed: public seed, `0 <= seed < 2**63`.

    Returns:
        Ascending example indices of each client.

    Raises:
        ConfigError: if an argument is out of range.

    """
    generator = _generator(n, clients, seed)
    order = torch.randperm(n, generator=generator).tolist()
    return [sorted(order[client::clients]) for client in range(clients)]


def dirichlet(labels: Sequence[int], clients: int, alpha: float, seed: int) -> list[list[int]]:
    r"""Split each label in proportions `p ~ Dirichlet(alpha, ..., alpha)` over the clients.

    A small alpha gives each label to few clients; a large one approaches `iid`. Clients may be empty.
    Source: Yurochkin et al. 2019, arXiv:1905.12022, section 4.

    Args:
        labels: `(n,)` label of each example.
        clients: number of clients.
        alpha: concentration, from 1e-9 (one client a label) to 1e9 (equal shares).
        seed: public seed, `0 <= seed < 2**63`.

    Returns:
        Ascending example indices of each client.

    Raises:
        ConfigError: if an argument is out of range.

    """
    generator = _generator(len(labels), clients, seed)
    if not _ALPHA[0] <= alpha <= _ALPHA[1]:
        raise ConfigError(f"alpha of a Dirichlet partition must be in {list(_ALPHA)}, got {alpha}")
    parts: list[list[int]] = [[] for _ in range(clients)]
    members_of: dict[int, list[int]] = {label: [] for label in sorted(set(labels))}
    for index, label in enumerate(labels):
        members_of[label].append(index)
    for members in members_of.values():
        order = torch.randperm(len(members), generator=generator).tolist()
        cuts = (_proportions(clients, alpha, generator).cumsum(0) * len(members)).round().long().tolist()
        cuts[-1] = len(members)  # the cumulative sum ends at 1 only up to rounding
        start = 0
        for part, stop in zip(parts, cuts, strict=True):
            part.extend(members[place] for place in order[start:stop])
            start = stop
    return [sorted(part) for part in parts]


def by_column(keys: Sequence[str]) -> list[list[int]]:
    """Give each distinct key a client of its own: client i holds the examples of `sorted(set(keys))[i]`.

    Args:
        keys: `(n,)` key of each example, for instance its author.

    Returns:
        Ascending example indices of each client.

    Raises:
        ConfigError: if there is no example.

    """
    if not keys:
        raise ConfigError("a partition needs at least one example, got none; check the table")
    parts: dict[str, list[int]] = {key: [] for key in sorted(set(keys))}
    for index, key in enumerate(keys):
        parts[key].append(index)
    return list(parts.values())


def _proportions(clients: int, alpha: float, generator: torch.Generator) -> torch.Tensor:
    """Draw `(clients,)` float64 from a symmetric Dirichlet.

    In logarithms, as `Gamma(alpha) = Gamma(alpha + 1) * U ** (1 / alpha)` underflows to 0 for small alpha.
    """
    shape = torch.full((clients,), alpha + 1.0, dtype=torch.float64)
    uniform = 1.0 - torch.rand(clients, dtype=torch.float64, generator=generator)  # in (0, 1]: a finite log
    logs = torch._standard_gamma(shape, generator=generator).log() + uniform.log() / alpha
    return logs.softmax(0)


def _generator(n: int, clients: int, seed: int) -> torch.Generator:
    """Check the arguments that all seeded partitions share, and seed their generator."""
    if n < 1:
        raise ConfigError(f"a partition needs at least one example, got {n}; check the table")
    if clients < 1:
        raise ConfigError(f"a partition needs at least one client, got {clients}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed of a partition must be in [0, 2**63), got {seed}")
    return torch.Generator().manual_seed(seed)
