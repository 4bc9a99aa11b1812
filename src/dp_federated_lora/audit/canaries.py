"""Canaries: known contributions that take part in a run by a coin, so that guessing the coin measures what the run reveals.

A canary is a fixed random direction of the trained space. It contributes like any other unit (through the clip, the server's
sampler and the noise) and far longer than the clip norm, so a clip that fails shows too. The model does not see it. Private data
are protected as always and the run is charged as usual; only the canaries are known, to the auditor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_federated_lora.aggregation import ServerOptimizer
from dp_federated_lora.audit.bounds import Guesses
from dp_federated_lora.errors import AuditError
from dp_federated_lora.federated import Exchange, Purpose, Request, Server, Sites
from dp_federated_lora.privacy import (
    BoundedSum,
    GaussianMechanism,
    PrivacyUnit,
    Released,
    SecureRandom,
    Trust,
    UnitId,
)
from dp_federated_lora.vector import Layout

AUDITOR: Final = "auditor"
_SEEDS: Final = 2**32  # torch's generator on the CPU uses 32 bits of its seed
_ROWS: Final = 64


@final
class CanaryAudit:
    """Canaries of one run, what the run released about them, and the guesses.

    Args:
        count: m; each takes part with probability 1/2.
        rng: the auditor's stream.

    Raises:
        AuditError: if there are fewer than 20 canaries: then nothing could ever be shown.
    """

    def __init__(self, count: int, rng: SecureRandom) -> None:
        if count < 20:
            raise AuditError(f"{count} canaries can show nothing whatever they score: use at least 20, better 1000")
        self.included: NDArray[np.bool_] = rng.derive("coins").bernoulli(0.5, count)
        self._first_seed = int(rng.derive("directions").uint64(1)[0])
        self._released: Tensor | None = None

    def wrap(self, exchange: Exchange, server: Server) -> tuple[Exchange, Server]:
        """The same engine with the canaries that take part as further participants, and a server whose releases are noted.

        Raises:
            AuditError: if a participant has the name of a canary, participants have budgets of their own or add the
                noise, it is correlated, or there is a defence against liars.
        """
        self._released = torch.zeros(server.layout.size, dtype=torch.float64)
        return _WithCanaries(exchange, server, self), replace(server, optimizer=_Noting(server, self._released))

    def direction(self, index: int, size: int) -> Tensor:
        """Independent standard normal numbers `(size,)` float32: a uniform direction, always the same for a canary."""
        # Consecutive seeds, as two canaries of the same direction would tell each other's coin.
        generator = torch.Generator().manual_seed((self._first_seed + index) % _SEEDS)
        return torch.randn(size, generator=generator)

    def scores(self) -> NDArray[np.float64]:
        """Of all canaries `(m,)`: inner product of direction and releases, over its standard deviation for the excluded.

        For a canary that did not take part, direction and releases are independent, so its score is N(0, 1) exactly; for one
        layout it is the cosine times sqrt(d).

        Raises:
            AuditError: if nothing was released.
        """
        released = self._released
        if released is None or not float(norm := torch.linalg.vector_norm(released)) > 0:
            raise AuditError("nothing was released, so canaries have no scores: run the wrapped engine first")
        unit = released / norm
        return np.array([float(self.direction(i, unit.numel()).double() @ unit) for i in range(len(self.included))])

    def guesses(self, scores: NDArray[np.float64], *, top: float = 0.1, bottom: float = 0.1) -> Guesses:
        """Guess "in" for the highest scores and "out" for the lowest; abstain on the rest.

        Args:
            scores: of all canaries `(m,)`.
            top: share of all canaries guessed in; fixed before the run.
            bottom: share guessed out; fixed before the run.
        """
        m, order = len(self.included), np.argsort(scores)
        high, low = order[m - round(top * m) :], order[: round(bottom * m)]
        correct = int(self.included[high].sum()) + int((~self.included[low]).sum())
        return Guesses(m, len(high) + len(low), correct)


@final
class _WithCanaries:
    """An exchange with further participants: one for each canary, or one auditor who holds them as examples."""

    def __init__(self, inner: Exchange, server: Server, audit: CanaryAudit) -> None:
        self._inner, self._server, self._audit = inner, server, audit
        self._members = np.flatnonzero(audit.included).tolist()
        if server.plan.unit is PrivacyUnit.CLIENT:
            self._extra = [f"{AUDITOR}/{index}" for index in self._members]
        else:
            self._extra = [AUDITOR]
        if server.plan.trust is not Trust.CENTRAL:
            raise AuditError(
                "canaries are guessed from one sum with noise of its own, and here each of them would add noise: audit "
                "the configuration with trust = central"
            )
        if server.plan.tiers:
            raise AuditError("canaries belong to no declared group of budgets: audit the configuration without privacy.groups")
        if not isinstance(server.plan.mechanism, GaussianMechanism):
            raise AuditError("canaries are judged against independent noise: audit the configuration without privacy.correlated")
        if server.defence.active:
            raise AuditError("canaries are guessed from plain means of releases: audit the configuration without [robust]")
        if taken := set(self._extra) & set(inner.names):
            raise AuditError(f"a participant is called {sorted(taken)[0]!r}, as a canary is: rename it")

    @property
    def names(self) -> Sequence[str]:
        """All participants, the canaries last."""
        return [*self._inner.names, *self._extra]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Replies of those drawn."""
        count = len(self._inner.names)
        yield from self._inner(request, [i for i in clients if i < count], rng)
        if request.purpose is not Purpose.TRAINING:
            return
        layout, plan = self._server.layout_in(request.round), self._server.plan
        encode = partial(self._server.method.sketch.encode, number=request.round)
        drawn = [i - count for i in clients if i >= count]
        if plan.unit is PrivacyUnit.CLIENT:
            for member in drawn:
                row = encode(self._vector(self._members[member], layout, request.clip_norm)[None])
                yield plan.clip(row, request.clip_norm, [UnitId(self._extra[member])])
        elif drawn:
            stream = rng.derive(AUDITOR).derive("sample")
            chosen = plan.draw(range(len(self._members)), stream, number=request.round).tolist()
            for start in range(0, len(chosen), _ROWS):
                indices = [self._members[i] for i in chosen[start : start + _ROWS]]
                rows = encode(torch.stack([self._vector(index, layout, request.clip_norm) for index in indices]))
                yield plan.clip(rows, request.clip_norm, [UnitId(f"{AUDITOR}/{index}") for index in indices])

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        """Replies of the inner exchange: `wrap` refuses plans under which canaries would report themselves."""
        return self._inner.reports(request, sites, size=size)

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        """Secure sum of the inner exchange: refused like reports."""
        return self._inner.opened(request, sites, members, size=size)

    def _vector(self, index: int, layout: Layout, clip_norm: float) -> Tensor:
        """What a canary sends: its direction in the round's layout, sqrt(d) times as long as the clip norm."""
        parts = self._server.layout.unflatten(self._audit.direction(index, self._server.layout.size))
        return layout.flatten({name: parts[name] for name, _ in layout.entries}) * clip_norm


@final
class _Noting:
    """A server optimiser that adds up what is released, each round weighted so that its noise counts the same."""

    def __init__(self, server: Server, released: Tensor) -> None:
        self._inner: ServerOptimizer = server.optimizer
        self._server, self._released, self._round = server, released, 0

    def init(self, size: int) -> Mapping[str, Tensor]:
        """State of the inner optimiser."""
        return self._inner.init(size)

    def update(self, mean: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Step of the inner optimiser."""
        self._round += 1
        # A direction restricted to d coordinates has length sqrt(d).
        self._released[self._server.positions_in(self._round)] += mean / mean.numel() ** 0.5
        return self._inner.update(mean, state)
