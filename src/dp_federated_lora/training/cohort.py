"""Local training of several clients in one forward and backward pass: the frozen weights are shared, each has its own factors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from dp_federated_lora.data import Examples
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.training.learner import Learner
from dp_federated_lora.training.local import LocalSteps
from dp_federated_lora.vector import Layout


def local_updates(
    learner: Learner,
    starts: Sequence[Mapping[str, Tensor]],
    examples: Sequence[Examples],
    local: LocalSteps,
    generators: Sequence[torch.Generator],
    *,
    trained: Sequence[str],
    turns: Sequence[Collection[str]] = (),
    corrections: Sequence[Mapping[str, Tensor]] = (),
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """As `local_update` for each client, to the rounding of floats; also what the trained parameters have become.

    Every example of a pass meets the factors of its own client: their rows are picked per example, so clients may have any
    number of examples of any length, and no client waits for the longest of another. A client's numbers depend on those of the
    others by no more than the rounding of sums that are split in another way.

    Args:
        learner: the model; parameters that do not train and are the same for all are used as they are in it.
        starts: adapter of each client, all tensors by name.
        examples: of each client; one without any does not move.
        local: how all optimise.
        generators: draw the batches of each client, as `local_update` does.
        trained: names of the trained parameters; their order is that of the update.
        turns: names that one step after the other trains, over and over; all of `trained` if empty.
        corrections: of each client, added to its gradients by name; nothing for names left out, none at all if empty.

    Returns:
        For each client the change `(d,)` and the trained parameters by name, on the CPU.
    """
    layout = Layout.of({name: starts[0][name] for name in trained})
    own = [n for n in starts[0] if n in trained or any(not torch.equal(start[n], starts[0][n]) for start in starts)]
    after = [{name: start[name].clone() for name in trained} for start in starts]
    if busy := [number for number, each in enumerate(examples) if len(each)]:
        there = learner.model.device
        stacks = {name: nn.Parameter(torch.stack([starts[n][name] for n in busy]).to(there), name in trained) for name in own}
        corrected = corrections[0] if corrections else ()
        added = {name: torch.stack([corrections[n][name] for n in busy]).to(there) for name in corrected}
        draws = [(examples[number], generators[number]) for number in busy]
        _take_steps(learner, stacks, draws, local, turns=turns or [trained], added=added)
        ends = {name: stacks[name].detach().cpu() for name in trained}
        for place, number in enumerate(busy):
            after[number] = {name: end[place].clone() for name, end in ends.items()}
    return [
        (layout.flatten(end) - layout.flatten({name: start[name] for name in trained}), end)
        for start, end in zip(starts, after, strict=True)
    ]


def _take_steps(
    learner: Learner,
    stacks: Mapping[str, nn.Parameter],
    draws: Sequence[tuple[Examples, torch.Generator]],
    local: LocalSteps,
    *,
    turns: Sequence[Collection[str]],
    added: Mapping[str, Tensor],
) -> None:
    """Change the trained ones of `stacks` `(C, ...)` in place; every client has examples."""
    trained = {name: stack for name, stack in stacks.items() if stack.requires_grad}
    begin = {name: stack.detach().clone() for name, stack in trained.items()}
    optimizer = local.optimizer_of(list(trained.values()))
    for step in range(local.steps):
        turn = {name: stack for name, stack in trained.items() if name in turns[step % len(turns)]}
        chosen = [torch.randperm(len(own), generator=stream)[: local.batch_size].tolist() for own, stream in draws]
        together = Examples.joined([(own, picked) for (own, _), picked in zip(draws, chosen, strict=True)])
        there = learner.model.device
        owners = torch.tensor([place for place, picked in enumerate(chosen) for _ in picked], device=there)
        shares = torch.tensor([1.0 / len(picked) for picked in chosen], dtype=torch.float64, device=there)[owners]
        gradients = {name: local.proximal * (stack.detach() - begin[name]) for name, stack in turn.items()}
        for name in added.keys() & gradients.keys():
            gradients[name] += added[name]
        for batch in learner.batches(together, range(len(together))):
            with own_weights(learner.model.module, stacks, owners[batch]):
                losses = learner.losses(together, batch)
            loss = (losses * shares[batch].to(losses.dtype)).sum()
            for name, part in zip(turn, torch.autograd.grad(loss, list(turn.values()), materialize_grads=True), strict=True):
                gradients[name] += part
        for name, stack in trained.items():
            stack.grad = gradients.get(name)
        optimizer.step()


@contextmanager
def own_weights(model: nn.Module, stacks: Mapping[str, Tensor], owners: Tensor) -> Iterator[None]:
    """While open, linear layers compute example i of a pass with the weights of client `owners[i]`.

    Args:
        model: whose layers they are.
        stacks: `(C, out, in)` weights and `(C, out)` biases, by the names they have in the model.
        owners: `(B,)` positions in the stacks.

    Raises:
        IncompatiblePlan: if a name belongs to another kind of layer, or a layer sees other rows than one for each example.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, stack in stacks.items():
        path, _, kind = name.rpartition(".")
        layers.setdefault(path, {})[kind] = stack if stack.shape[0] == 1 else stack.index_select(0, owners)
    changed = []
    try:
        for path, tensors in layers.items():
            layer = model.get_submodule(path)
            if not isinstance(layer, nn.Linear):
                raise IncompatiblePlan(f"clients can be stacked where they train nn.Linear layers only; {path} is none")
            weight = tensors.get("weight", layer.weight[None])
            bias = tensors.get("bias", None if layer.bias is None else layer.bias[None])
            layer.forward = partial(_linear, path, weight, bias, len(owners))  # type: ignore[method-assign]
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _linear(path: str, weight: Tensor, bias: Tensor | None, count: int, x: Tensor) -> Tensor:
    if len(x) != count:
        raise IncompatiblePlan(
            f"{path} saw {len(x)} rows of {count} examples; clients can be told apart only where each example is one row: choose "
            "other lora.targets, or remove run.stack_tokens"
        )
    if len(weight) == 1 and (bias is None or len(bias) == 1):
        return nn.functional.linear(x, weight[0], None if bias is None else bias[0])
    result = torch.bmm(x.reshape(count, -1, x.shape[-1]), weight.expand(count, -1, -1).mT)
    if bias is not None:
        result = result + bias[:, None]
    return result.reshape(*x.shape[:-1], result.shape[-1])
