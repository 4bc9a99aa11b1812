"""What a client computes on its own examples: a local update, or a sum of clipped example gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from dp_federated_lora.data import Examples
from dp_federated_lora.privacy import BoundedSum, PrivacyPlan, UnitId
from dp_federated_lora.training.gradients import ExampleGradients
from dp_federated_lora.training.learner import Learner
from dp_federated_lora.vector import Layout


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSteps:
    """Plain SGD at the client.

    Args:
        steps: number of local steps.
        batch_size: examples per step, drawn without replacement (all, where a client has fewer).
        learning_rate: step size.
    """

    steps: int
    batch_size: int
    learning_rate: float


def local_update(
    learner: Learner,
    trained: Mapping[str, nn.Parameter],
    examples: Examples,
    local: LocalSteps,
    generator: torch.Generator,
) -> Tensor:
    """Change `(d,)` of the trained parameters after local steps; zero for a client without examples.

    The parameters are left changed: the caller loads the global adapter before each use.
    """
    layout = Layout.of(trained)
    start = layout.flatten({name: p.detach() for name, p in trained.items()})
    for _ in range(local.steps if len(examples) else 0):
        chosen = torch.randperm(len(examples), generator=generator)[: local.batch_size].tolist()
        gradients = [torch.zeros_like(p) for p in trained.values()]
        for batch in learner.batches(examples, chosen):
            parts = torch.autograd.grad(learner.losses(examples, batch).sum(), list(trained.values()), materialize_grads=True)
            for total, part in zip(gradients, parts, strict=True):
                total.add_(part)
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter.sub_(gradient, alpha=local.learning_rate / len(chosen))
    return layout.flatten({name: p.detach() for name, p in trained.items()}) - start


def example_gradient_sum(
    learner: Learner,
    trained: Mapping[str, nn.Parameter],
    examples: Examples,
    chosen: Sequence[int],
    *,
    plan: PrivacyPlan,
    clip_norm: float,
    owner: str,
    tier: int = 0,
) -> BoundedSum:
    """Sum over `chosen` examples of NEGATIVE gradients, each clipped as the plan says: a step, like a local update.

    Args:
        learner: the model at the global adapter.
        trained: trained parameters by name; they define the layout.
        examples: the client's examples.
        chosen: indices of the sampled ones.
        plan: how contributions are bounded.
        clip_norm: C of this round.
        owner: the client's name, so that its units differ from everyone else's.
        tier: the group of budgets of the client.
    """
    size = Layout.of(trained).size + plan.extra_coordinates
    sums = []
    with ExampleGradients(learner.model.module, trained) as gradients:
        for batch in learner.batches(examples, chosen):
            units = [UnitId(f"{owner}/{examples.units[i]}") for i in batch]
            sums.append(plan.clip(gradients.rows(-learner.losses(examples, batch)), clip_norm, units, tier=tier))
    return BoundedSum.merge(sums, size=size, clip_norm=plan.sensitivity(clip_norm))
