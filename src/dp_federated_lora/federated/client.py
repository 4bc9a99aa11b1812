"""The one function a client runs, whatever engine carries its request and its reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dp_federated_lora.aggregation import LinearMethod
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.privacy import BoundedSum, PrivacyPlan, PrivacyUnit, SecureRandom, UnitId
from dp_federated_lora.training import Learner, LocalSteps, example_gradient_sum, local_update


@final
@dataclass(frozen=True, slots=True)
class Request:
    """What the server sends: the round, the plan it follows, and the global adapter.

    Args:
        round: 1-based.
        plan_id: `PrivacyPlan.content_id` of the server's plan.
        adapter: global adapter tensors by name.
        clip_norm: C of this round.
    """

    round: int
    plan_id: str
    adapter: Mapping[str, Tensor]
    clip_norm: float


@final
@dataclass(frozen=True, slots=True)
class Client:
    """A participant: its name, its examples, and the plan, method and local steps it agreed to.

    Args:
        name: unique among participants.
        examples: private data.
        plan: the privacy plan that this client agreed to.
        method: which factors are trained.
        local: local steps (client unit); None for the example unit.
    """

    name: str
    examples: Examples
    plan: PrivacyPlan
    method: LinearMethod
    local: LocalSteps | None


def handle(request: Request, client: Client, learner: Learner, rng: SecureRandom) -> BoundedSum:
    """Compute a client's bounded contribution to a round.

    Client unit: local steps, then the whole update is clipped. Example unit: the client tosses a secret coin for
    each of its examples and sums their clipped gradients; an empty sample gives the zero sum, like any other.

    Args:
        request: from the server.
        client: the participant.
        learner: a model to compute with; its adapter is overwritten.
        rng: this client's stream for this round.

    Raises:
        IncompatiblePlan: if the request follows another plan than the one agreed to.
    """
    plan = client.plan
    if request.plan_id != plan.content_id:
        raise IncompatiblePlan(
            f"{client.name} agreed to plan {plan.content_id[:12]}, the request of round {request.round} follows "
            f"{request.plan_id[:12]}: refused, nothing was computed"
        )
    learner.model.load(request.adapter)
    trained = learner.model.train_only(client.method.factors_in(request.round))
    if plan.unit is PrivacyUnit.EXAMPLE:
        chosen = plan.sampler.draw(len(client.examples), rng.derive("sample")).tolist()
        return example_gradient_sum(
            learner, trained, client.examples, chosen, plan=plan, clip_norm=request.clip_norm, owner=client.name
        )
    if client.local is None:
        raise IncompatiblePlan("unit = client trains locally; [training] needs local steps")
    generator = torch.Generator().manual_seed(int(rng.derive("batches").uint64(1)[0] >> 1))
    update = local_update(learner, trained, client.examples, client.local, generator)
    return plan.clip(update[None], request.clip_norm, [UnitId(client.name)])
