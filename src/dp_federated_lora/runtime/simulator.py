"""All participants in one process, sharing one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.federated import Client, Request, pieces, report
from dp_federated_lora.privacy import BoundedSum, Permit, Released, SecureRandom
from dp_federated_lora.training import Learner


@final
class Simulator:
    """An `Exchange` that computes what `handle` does, on all cores of its learner, for one client each or for stacks of them.

    Args:
        clients: all participants; names are unique.
        learner: the model that every client computes with.
        stack_tokens: most tokens of a local step of clients that are computed together, as `pieces`; None for each client alone,
            whose numbers then depend on nobody else's.

    Raises:
        ConfigError: if two clients have one name.
    """

    def __init__(self, clients: Sequence[Client], learner: Learner, *, stack_tokens: int | None = None) -> None:
        if len({client.name for client in clients}) != len(clients):
            raise ConfigError("client names must be unique: one participant would count twice in a sum")
        self.clients = tuple(clients)
        self.learner = learner
        self.stack_tokens = stack_tokens

    @property
    def names(self) -> Sequence[str]:
        """All participants, in order."""
        return [client.name for client in self.clients]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Sums of a client or more, a few at a time, so that memory does not grow with the cohort."""
        asked = [self.clients[index] for index in clients]
        work = pieces(request, asked, rng, stack_tokens=self.stack_tokens, threads=self.learner.threads)
        yield from self.learner.spread(lambda learner, piece: piece(learner), work)

    def reports(self, request: Request, sites: Mapping[str, tuple[Permit, SecureRandom]]) -> Iterator[Released]:
        """Noised replies one at a time.

        A client's permit and stream are made of the round's, so that a killed round is re-created; they stand for an entry in
        the client's own ledger and for entropy of its own machine.
        """

        def answer(learner: Learner, client: Client) -> Released:
            permit, rng = sites[client.name]
            return report(request, client, learner, permit, rng)

        yield from self.learner.spread(answer, (client for client in self.clients if client.name in sites))
