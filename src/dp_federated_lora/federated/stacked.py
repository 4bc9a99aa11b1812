"""What clients of one process contribute to a round, in pieces for several cores: clients one by one, or stacks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

from dp_federated_lora.data import Examples
from dp_federated_lora.federated.client import WHOLE, Client, Purpose, Request, batch_stream, handle
from dp_federated_lora.federated.local_round import adapter_of, stacked_changes
from dp_federated_lora.privacy import BoundedSum, PrivacyUnit, SecureRandom, Trust, UnitId
from dp_federated_lora.training import Learner, example_gradients

Piece = Callable[[Learner], BoundedSum]
"""Part of a round's sum, computed with any learner, whose adapter is overwritten; raises what `handle` raises."""


def pieces(
    request: Request, clients: Sequence[Client], rng: SecureRandom, *, stack_tokens: int | None, threads: int
) -> Iterator[Piece]:
    """Pieces whose sums merge to what the sums of `handle` merge to: to the bit for clients one by one.

    With `stack_tokens`, to the rounding of floats. Client unit: several clients take their local steps in one pass. Example unit:
    the sampled examples of all clients run through the model in common batches. Scores, and noise of a client's own (trust =
    "local"), stay with `handle`. Coins and clips are those of each client. Its float32 numbers are rounded differently in other
    company, so that company moves its contribution at that level; it stays within the clip norm.

    Args:
        request: from the server.
        clients: of one plan and one method.
        rng: of the round; each client's stream comes from its name.
        stack_tokens: most tokens of a local step of clients that are computed together; a larger client is computed alone, as
            everybody is with None.
        threads: how many pieces will be computed at the same time; gradients of few clients' examples are shared out.
    """
    if not clients:
        return
    plan = clients[0].plan
    sampled = request.purpose is Purpose.TRAINING and plan.unit is PrivacyUnit.EXAMPLE
    if stack_tokens is None or request.purpose is Purpose.EVALUATION or plan.trust is Trust.LOCAL:
        shares = _shares(threads, len(clients)) if sampled else [WHOLE]
        for client in clients:
            own = rng.derive(client.name)
            yield from (partial(handle, request, client, rng=own, share=share) for share in shares)
    elif sampled:
        kinds = [list(members) for _, members in groupby(sorted(clients, key=_kind), key=_kind)]
        for members in kinds:
            yield from (partial(_examples, request, members, rng, share) for share in _shares(threads, len(kinds)))
    else:
        yield from (partial(_stack, request, stack, rng) for stack in _stacks(clients, stack_tokens))


def _shares(threads: int, parts: int) -> list[tuple[int, int]]:
    """Shares of each of `parts` such that no thread has long nothing to do."""
    count = -(-2 * threads // parts) if threads > 1 else 1
    return [(place, count) for place in range(count)]


def _kind(client: Client) -> tuple[int, int]:
    return client.tier, client.rank or 0


def _stack(request: Request, stack: Sequence[Client], rng: SecureRandom, learner: Learner) -> BoundedSum:
    """Of clients whose local steps are taken in one pass (unit = client)."""
    for client in stack:
        client.require_plan(request)
    local = stack[0].local_in(request.round)
    streams = [batch_stream(rng.derive(client.name)) for client in stack]
    changes = zip(stack, stacked_changes(request, stack, learner, local, streams), strict=True)
    sums = (client.clip(request, change[None], [UnitId(client.name)]) for client, change in changes)
    return stack[0].merged(request, learner, sums)


def _examples(
    request: Request, members: Sequence[Client], rng: SecureRandom, share: tuple[int, int], learner: Learner
) -> BoundedSum:
    """Of the sampled examples of clients of one kind in common batches (unit = example)."""
    for client in members:
        client.require_plan(request)
    learner.model.load(adapter_of(request, members[0]))
    trained = learner.model.train_only(members[0].method.factors_in(request.round))
    samples = [client.sample(request, rng.derive(client.name)) for client in members]
    together = Examples.joined([(picked, range(len(picked))) for picked, _ in samples])
    units = [unit for _, some in samples for unit in some]
    rows = example_gradients(learner, trained, together, units, share=share)
    return members[0].merged(request, learner, (members[0].clip(request, *each) for each in rows))


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
