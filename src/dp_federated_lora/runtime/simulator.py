"""All participants in one process, sharing one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.federated import Client, Request, handle, handle_together, report
from dp_federated_lora.privacy import BoundedSum, Permit, Released, SecureRandom
from dp_federated_lora.training import Learner


@final
class Simulator:
    """An `Exchange` that is a loop over `handle`, or over stacks of clients.

    Args:
        clients: all participants; names are unique.
        learner: the model that every client computes with.
        stack_tokens: most tokens of a local step of clients that are computed together, as `handle_together`; None for one client
            after the other, whose numbers then depend on nobody else's.

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
        """Replies one at a time, so that memory does not grow with the cohort."""
        if self.stack_tokens is not None:
            asked = [self.clients[index] for index in clients]
            yield from handle_together(request, asked, self.learner, rng, tokens=self.stack_tokens)
            return
        for index in clients:
            client = self.clients[index]
            yield handle(request, client, self.learner, rng.derive(client.name))

    def reports(self, request: Request, sites: Mapping[str, tuple[Permit, SecureRandom]]) -> Iterator[Released]:
        """Noised replies one at a time.

        A client's permit and stream are made of the round's, so that a killed round is re-created; they stand for an entry in
        the client's own ledger and for entropy of its own machine.
        """
        for client in (client for client in self.clients if client.name in sites):
            permit, rng = sites[client.name]
            yield report(request, client, self.learner, permit, rng)
