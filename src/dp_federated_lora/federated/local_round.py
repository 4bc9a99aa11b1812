"""A client's local training in one round, from the global adapter and from what it kept of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from dp_federated_lora.aggregation import HEAD_ALONE, control_after, truncated
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.lora import Factor
from dp_federated_lora.training import Learner, LocalSteps, local_update, local_updates
from dp_federated_lora.vector import Layout

if TYPE_CHECKING:
    from dp_federated_lora.federated.client import Client, Request


def load_own(client: Client, learner: Learner, *, before: int) -> Mapping[str, Tensor]:
    """Set the factors that `client` kept before round `before`; returns all that it kept, c_k by the name of what it corrects.

    Raises:
        CheckpointError: if its state is missing or damaged.
    """
    if client.memory is None or not client.keeps_state:
        return {}
    own = client.memory.before(client.name, before)
    learner.model.load({name: own[name] for name in learner.model.parameters(client.method.kept) if name in own})
    return own


def local_change(request: Request, client: Client, learner: Learner, local: LocalSteps, generator: torch.Generator) -> Tensor:
    """Change `(d,)` of what the method sends, after local steps; what the client keeps is saved.

    A state with a non-finite number is not kept: the one before stays.

    Args:
        request: of the round.
        client: who trains.
        learner: at the global adapter; left changed.
        local: the client's steps in this round.
        generator: draws batches.

    Raises:
        IncompatiblePlan: if the client corrects its steps by c and is sent none.
        CheckpointError: if its state is missing or damaged.
        StorageError: if the state cannot be saved.
    """
    begun = LocalRound.begin(request, client, learner)
    trained = learner.model.train_only(client.method.trained_in(request.round))
    turns = [learner.model.parameters(factors) for factors in client.method.local_factors(request.round)]
    update = local_update(learner, trained, client.examples, local, generator, turns=turns, correction=begun.correction)
    return begun.finish(local, update, trained)


def stacked_changes(
    request: Request, clients: Sequence[Client], learner: Learner, local: LocalSteps, generators: Sequence[torch.Generator]
) -> Iterator[Tensor]:
    """As `local_change` of each of `clients`, of one method, by `local_updates`: equal to the rounding of floats.

    Args:
        request: of the round.
        clients: who trains.
        learner: its adapter is overwritten.
        local: the clients' steps in this round.
        generators: draw the clients' batches.

    Raises:
        As `local_change`.
    """
    model, method = learner.model, clients[0].method
    model.load(adapter_of(request, clients[0]))
    begun = [LocalRound.begin(request, client, learner) for client in clients]
    kept = model.parameters(method.kept)
    starts = [{**adapter_of(request, each.client), **{n: t for n, t in each.own.items() if n in kept}} for each in begun]
    trained = list(model.train_only(method.trained_in(request.round)))
    turns = [model.parameters(factors) for factors in method.local_factors(request.round)]
    updates = local_updates(
        learner,
        starts,
        [client.examples for client in clients],
        local,
        generators,
        trained=trained,
        turns=turns,
        corrections=[each.correction for each in begun],
    )
    for each, (update, after) in zip(begun, updates, strict=True):
        yield each.finish(local, update, after)


@final
@dataclass(frozen=True, slots=True)
class LocalRound:
    """What a client has at hand while it trains.

    Args:
        request: of the round.
        client: who trains.
        own: what it kept of earlier rounds, c_k by the name of what it corrects.
        own_controls: its c_k of what the round sends, zero where it has none yet; empty without SCAFFOLD.
        sent: layout of what it sends.
    """

    request: Request
    client: Client
    own: Mapping[str, Tensor]
    own_controls: Mapping[str, Tensor]
    sent: Layout

    @classmethod
    def begin(cls, request: Request, client: Client, learner: Learner) -> LocalRound:
        """Put the client's own factors into the model, which is at the global adapter.

        Raises:
            IncompatiblePlan, CheckpointError: as `local_change`.
        """
        own, number = load_own(client, learner, before=request.round), request.round
        sent = learner.model.parameters(client.method.factors_in(number))
        controlled = client.local is not None and client.local.control
        if controlled and request.control.keys() != sent.keys():
            raise IncompatiblePlan(
                f"{client.name} agreed to control variates, and the request of round {number} has them for "
                f"{sorted(request.control)} instead of {sorted(sent)}: the server needs a Scaffold optimiser; nothing was "
                "computed"
            )
        own_controls = {n: own.get(n, torch.zeros_like(c)) for n, c in request.control.items()} if controlled else {}
        return cls(request, client, own, own_controls, Layout.of(sent))

    @property
    def correction(self) -> Mapping[str, Tensor]:
        """What SCAFFOLD adds to gradients, c - c_k, by name."""
        return {name: self.request.control[name] - c for name, c in self.own_controls.items()}

    def finish(self, local: LocalSteps, update: Tensor, after: Mapping[str, Tensor]) -> Tensor:
        """What is sent of `update` `(d,)`; what the client keeps, of the trained parameters `after`, is saved.

        Raises:
            StorageError: if it cannot be saved.
        """
        request, client, method, number = self.request, self.client, self.client.method, self.request.round
        changes = Layout.of(after).unflatten(update)
        projected = method.project and method.project(request.adapter, changes, method.factors_in(number), request.clip_norm)
        change = self.sent.flatten({name: (projected or changes)[name] for name, _ in self.sent.entries})
        kept = method.kept_in(number)
        following = {name: tensor.detach().to("cpu", copy=True) for name, tensor in after.items() if Factor.of(name) in kept}
        if self.own_controls:  # of the change as it is clipped, which is what the server's c follows
            counted = self.sent.unflatten(change.to(torch.float64) * client.clip_factor(change, request.clip_norm))
            for name, c in self.own_controls.items():
                following[name] = control_after(c, request.control[name], counted[name], local.length)
        if following and client.memory is not None and all(bool(torch.isfinite(t).all()) for t in following.values()):
            client.memory.keep(client.name, number, {**self.own, **following})
        return change


def adapter_of(request: Request, client: Client) -> Mapping[str, Tensor]:
    """The global adapter as `client` gets it: up to its rank.

    Rounds of the head alone send no factors, and the features kept for them are those of the whole adapter.
    """
    if client.rank is None or client.method.factors_in(request.round) == HEAD_ALONE:
        return request.adapter
    return truncated(request.adapter, client.rank)
