"""All participants in one process, sharing one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

from torch import Tensor

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.federated import Client, Request, Sites, pieces, report, share
from dp_federated_lora.privacy import BoundedSum, Released, SecureRandom
from dp_federated_lora.runtime.secure_sums import SecureSums
from dp_federated_lora.runtime.wire import decode_request
from dp_federated_lora.training import Learner


@final
class Simulator:
    """An `Exchange` that computes what `handle` does, on all cores of its learner, for one client each or for stacks of them.

    Args:
        clients: all participants; names are unique.
        learner: the model that every client computes with.
        stack_tokens: most tokens of a local step of clients that are computed together, as `pieces`; None for each client alone,
            whose numbers then depend on nobody else's.
        dropout_rate: chance that a member of a secure sum falls silent.

    Raises:
        ConfigError: if two clients have one name.
    """

    def __init__(
        self, clients: Sequence[Client], learner: Learner, *, stack_tokens: int | None = None, dropout_rate: float = 0.0
    ) -> None:
        if len({client.name for client in clients}) != len(clients):
            raise ConfigError("client names must be unique: one participant would count twice in a sum")
        self.clients = tuple(clients)
        self.learner = learner
        self.stack_tokens = stack_tokens
        self.dropout_rate = dropout_rate

    @cached_property
    def secure_sums(self) -> SecureSums:
        """The secure sums of these clients, with keys that are made when the first is asked for."""
        return SecureSums(self.names, dropout_rate=self.dropout_rate)

    @property
    def names(self) -> Sequence[str]:
        """All participants, in order."""
        return [client.name for client in self.clients]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Sums of a client or more, a few at a time, so that memory does not grow with the cohort."""
        asked = [self.clients[index] for index in clients]
        work = pieces(request, asked, rng, stack_tokens=self.stack_tokens, threads=self.learner.threads)
        yield from self.learner.spread(lambda learner, piece: piece(learner), work)

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        """Noised replies one at a time.

        A client's permit and stream are made of the round's, so that a killed round is re-created; they stand for an entry in
        the client's own ledger and for entropy of its own machine.
        """

        def answer(learner: Learner, client: Client) -> Released:
            permit, rng = sites[client.name]
            return report(request, client, learner, permit, rng)

        yield from self.learner.spread(answer, (client for client in self.clients if client.name in sites))

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        """A secure sum by its real messages; permits and streams are as in `reports`."""
        asked = {client.name: client for client in self.clients if client.name in members}

        def contributions(sent: bytes, names: Sequence[str]) -> Iterator[Tensor]:
            def answer(learner: Learner, name: str) -> Tensor:
                permit, rng = sites[name]
                return share(decode_request(sent), asked[name], learner, permit=permit, rng=rng)

            return self.learner.spread(answer, names)

        streams = {name: sites[name][1] for name in members}
        return self.secure_sums.open(request, self.clients[0].plan, streams, contributions, size=size)
