"""What a client computes on its own examples: a local update, or gradients of single examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor, nn

from dp_federated_lora.data import Examples
from dp_federated_lora.privacy import UnitId
from dp_federated_lora.training.gradients import ExampleGradients
from dp_federated_lora.training.learner import Learner
from dp_federated_lora.vector import Layout


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSteps:
    """Optimisation at the client; its state begins anew in every round.

    Args:
        steps: number of local steps.
        batch_size: examples per step, drawn without replacement (all, where a client has fewer).
        learning_rate: step size.
        optimizer: plain SGD, or AdamW without weight decay.
        proximal: mu of FedProx (Li et al. 2020, arXiv 1812.06127): mu / 2 times the squared distance from the global adapter
            is added to the loss.
        schedule: how the step size falls over rounds: towards zero along a line or half a cosine, or not at all.
        rounds: at the end of which it would be zero.
        steps_end: the number of steps goes from `steps` towards this along the same curve; None keeps it.
        control: whether SCAFFOLD's control variates correct each gradient.
    """

    steps: int
    batch_size: int
    learning_rate: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    proximal: float = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    rounds: int = 1
    steps_end: int | None = None
    control: bool = False

    def in_round(self, number: int) -> LocalSteps:
        """Step size and number of steps of round `number` (1-based); a function of public numbers."""
        if self.schedule == "constant":
            return self
        done = (number - 1) / self.rounds
        left = 1.0 - done if self.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
        end = self.steps if self.steps_end is None else self.steps_end
        steps = round(end + left * (self.steps - end))
        return replace(self, schedule="constant", learning_rate=left * self.learning_rate, steps=steps)

    @property
    def length(self) -> float:
        """K eta: how far the steps go along a gradient of norm 1."""
        return self.steps * self.learning_rate

    def optimizer_of(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser; a parameter without a gradient is not moved."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        return torch.optim.SGD(parameters, lr=self.learning_rate)


def local_update(
    learner: Learner,
    trained: Mapping[str, nn.Parameter],
    examples: Examples,
    local: LocalSteps,
    generator: torch.Generator,
    *,
    turns: Sequence[Mapping[str, nn.Parameter]] = (),
    correction: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Change `(d,)` of the trained parameters after local steps, on the CPU; zero for a client without examples.

    The parameters are left changed: the caller loads the global adapter before each use.

    Args:
        learner: the model at the global adapter.
        trained: trained parameters by name; they define the layout.
        examples: the client's examples.
        local: how it optimises.
        generator: draws batches.
        turns: which of them one step after the other trains, over and over; all if empty.
        correction: added to every gradient, by name; nothing for names left out.
    """
    layout = Layout.of(trained)
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = local.optimizer_of(list(trained.values()))
    for step in range(local.steps if len(examples) else 0):
        turn = turns[step % len(turns)] if turns else trained
        chosen = torch.randperm(len(examples), generator=generator)[: local.batch_size].tolist()
        gradients = {name: local.proximal * (p.detach() - start[name]) for name, p in turn.items()}
        for name, term in (correction or {}).items():
            if name in gradients:
                gradients[name].add_(term.to(learner.model.device))
        for batch in learner.batches(examples, chosen):
            loss = learner.losses(examples, batch).sum() / len(chosen)
            parts = torch.autograd.grad(loss, list(turn.values()), materialize_grads=True)
            for gradient, part in zip(gradients.values(), parts, strict=True):
                gradient.add_(part)
        optimizer.zero_grad()
        for name, parameter in turn.items():
            parameter.grad = gradients[name]
        optimizer.step()
    optimizer.zero_grad()
    return (layout.flatten({name: p.detach() for name, p in trained.items()}) - layout.flatten(start)).cpu()


def example_gradients(
    learner: Learner,
    trained: Mapping[str, nn.Parameter],
    examples: Examples,
    units: Sequence[UnitId],
    *,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, list[UnitId]]]:
    """NEGATIVE gradients `(B, d)` of all `examples`, steps like local updates, batch by batch with their units.

    They stay where the model computes until they are clipped: what is left then is B times smaller.

    Args:
        learner: the model at the global adapter.
        trained: trained parameters by name; they define the layout.
        examples: the sampled ones.
        units: of each example.
        share: (k, n) for the k-th of n shares of the batches, neighbours in length.
    """
    place, shares = share
    batches = list(learner.batches(examples, range(len(examples))))
    mine = batches[len(batches) * place // shares : len(batches) * (place + 1) // shares]
    with ExampleGradients(learner.model.module, trained) as gradients:
        for batch in mine:
            yield gradients.rows(-learner.losses(examples, batch)), [units[index] for index in batch]
