"""What clients of one process contribute to a round, computed together: as `handle` of each, to the rounding of floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from dp_federated_lora.data import Examples
from dp_federated_lora.federated.client import Client, Purpose, Request, batch_stream, handle
from dp_federated_lora.federated.local_round import adapter_of, stacked_changes
from dp_federated_lora.privacy import BoundedSum, PrivacyUnit, SecureRandom, Trust, UnitId
from dp_federated_lora.training import Learner, example_gradients


def handle_together(
    request: Request, clients: Sequence[Client], learner: Learner, rng: SecureRandom, *, tokens: int
) -> Iterator[BoundedSum]:
    """Sums that merge to what the sums of `handle` merge to, one or more at a time, so that memory does not grow with clients.

    Client unit: several clients take their local steps in one pass. Example unit: the sampled examples of all clients run
    through the model in common batches. Scores, and noise of a client's own (trust = "local"), stay with `handle`. Coins and
    clips are those of each client. Its float32 numbers are rounded differently in other company, so that company moves its
    contribution at that level; it stays within the clip norm.

    Args:
        request: from the server.
        clients: of one plan and one method.
        learner: a model to compute with; its adapter is overwritten.
        rng: of the round; each client's stream comes from its name.
        tokens: most tokens of a local step of clients that are computed together; a larger client is computed alone.

    Raises:
        As `handle`.
    """
    if not clients:
        return
    plan = clients[0].plan
    if request.purpose is Purpose.EVALUATION or plan.trust is Trust.LOCAL:
        yield from (handle(request, client, learner, rng.derive(client.name)) for client in clients)
        return
    for client in clients:
        client.require_plan(request)
    if plan.unit is PrivacyUnit.EXAMPLE:
        yield from _examples_together(request, clients, learner, rng)
        return
    for stack in _stacks(clients, tokens):
        local = stack[0].local_in(request.round)
        streams = [batch_stream(rng.derive(client.name)) for client in stack]
        changes = stacked_changes(request, stack, learner, local, streams)
        for client, change in zip(stack, changes, strict=True):
            yield client.clip(request, change[None], [UnitId(client.name)])


def _examples_together(request: Request, clients: Sequence[Client], learner: Learner, rng: SecureRandom) -> Iterator[BoundedSum]:
    def kind(client: Client) -> tuple[int, int]:
        return client.tier, client.rank or 0

    for _, group in groupby(sorted(clients, key=kind), key=kind):
        members = list(group)
        learner.model.load(adapter_of(request, members[0]))
        trained = learner.model.train_only(members[0].method.factors_in(request.round))
        samples = [client.sample(request, rng.derive(client.name)) for client in members]
        together = Examples.joined([(picked, range(len(picked))) for picked, _ in samples])
        for rows, units in example_gradients(learner, trained, together, [unit for _, some in samples for unit in some]):
            yield members[0].clip(request, rows, units)


def _stacks(clients: Sequence[Client], tokens: int) -> Iterator[list[Client]]:
    """Neighbours whose local steps have at most about `tokens` tokens together."""
    stack, room = list[Client](), tokens
    for client in clients:
        count = len(client.examples)
        size = client.local.batch_size if client.local else 0
        own = sum(map(len, client.examples.tokens)) * min(count, size) // max(count, 1)
        if stack and own > room:
            yield stack
            stack, room = [], tokens
        stack.append(client)
        room -= own
    if stack:
        yield stack
