"""All participants in one process, one after the other, sharing one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.federated import Client, Request, handle, report
from dp_federated_lora.privacy import BoundedSum, Permit, Released, SecureRandom
from dp_federated_lora.training import Learner


@final
class Simulator:
    """An `Exchange` that is a loop over `handle`.

    Args:
        clients: all participants; names are unique.
        learner: the model that every client computes with in turn.

    Raises:
        ConfigError: if two clients have one name.
    """

    def __init__(self, clients: Sequence[Client], learner: Learner) -> None:
        if len({client.name for client in clients}) != len(clients):
            raise ConfigError("client names must be unique: one participant would count twice in a sum")
        self.clients = tuple(clients)
        self.learner = learner

    @property
    def names(self) -> Sequence[str]:
        """All participants, in order."""
        return [client.name for client in self.clients]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Replies one at a time, so that memory does not grow with the cohort."""
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
