"""A client's local training in one round, from the global adapter and from what it kept of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dp_federated_lora.aggregation import control_after
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.training import Learner, LocalSteps, local_update
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
    method, number, own = client.method, request.round, load_own(client, learner, before=request.round)
    sent, kept = (learner.model.parameters(factors) for factors in (method.factors_in(number), method.kept_in(number)))
    trained = learner.model.train_only(method.trained_in(number))
    if local.control and request.control.keys() != sent.keys():
        raise IncompatiblePlan(
            f"{client.name} agreed to control variates, and the request of round {number} has them for {sorted(request.control)} "
            f"instead of {sorted(sent)}: the server needs a Scaffold optimiser; nothing was computed"
        )
    own_controls = {n: own.get(n, torch.zeros_like(c)) for n, c in request.control.items()} if local.control else {}
    correction = {name: request.control[name] - c for name, c in own_controls.items()}
    turns = [learner.model.parameters(factors) for factors in method.local_factors(number)]
    update = local_update(learner, trained, client.examples, local, generator, turns=turns, correction=correction)
    changes = Layout.of(trained).unflatten(update)
    projected = method.project and method.project(request.adapter, changes, method.factors_in(number), request.clip_norm)
    change = Layout.of(sent).flatten({name: (projected or changes)[name] for name in sent})
    following = {name: p.detach().clone() for name, p in kept.items()}
    if local.control:  # of the change as it is clipped, which is what the server's c follows
        counted = Layout.of(sent).unflatten(change.to(torch.float64) * client.clip_factor(change, request.clip_norm))
        for name, c in own_controls.items():
            following[name] = control_after(c, request.control[name], counted[name], local.length)
    if following and client.memory is not None and all(bool(torch.isfinite(t).all()) for t in following.values()):
        client.memory.keep(client.name, number, {**own, **following})
    return change
