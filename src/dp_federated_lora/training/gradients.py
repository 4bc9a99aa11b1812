r"""Per-example gradients of linear layers in one backward pass.

For y = x W^T + b with x `(B, T, n)` and upstream gradient g `(B, T, m)`, example i has the gradient
g_i^T x_i for W and sum_t g_it for b. LoRA factors and heads are small linear layers, so the B x d matrix of
per-example gradients is a few per cent of a step and a second (ghost) pass would only cost
(Goodfellow 2015, arXiv 1510.01799; Opacus, arXiv 2109.12298).

LoRA layers that compute nothing else run as one Function each (`fused.py`); hooks collect from all others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self, final

import torch
from torch import Tensor, nn

from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.training.fused import LoraLayer
from dp_federated_lora.vector import Layout


@final
class ExampleGradients:
    """Collects per-example gradients of the trained parameters of a model while it is open.

    Every trained parameter must be the weight or bias of an `nn.Linear` that is called once per forward pass with
    examples along the first axis; anything else is refused at construction, since its gradients could not be
    separated by example.

    Args:
        model: the module whose forward pass will run.
        trained: the trained parameters, by the names that define the layout.

    Raises:
        IncompatiblePlan: if a trained parameter does not belong to an `nn.Linear`.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self._slices = {name: part for name, _, part in Layout.of(trained).slices()}
        names = {id(parameter): name for name, parameter in trained.items()}
        self._fused: list[tuple[LoraLayer, str | None, str | None]] = []
        self._layers: list[tuple[nn.Linear, str | None, str | None]] = []
        for module in model.modules():  # a LoRA layer comes before the linear layers inside it
            if (lora := LoraLayer.of(module)) and not any(id(parameter) in names for parameter in lora.base.parameters()):
                a, b = names.pop(id(lora.down.weight), None), names.pop(id(lora.up.weight), None)
                if a or b:
                    self._fused.append((lora, a, b))
            elif isinstance(module, nn.Linear):
                weight = names.pop(id(module.weight), None)
                bias = names.pop(id(module.bias), None) if module.bias is not None else None
                if weight or bias:
                    self._layers.append((module, weight, bias))
        if names:
            raise IncompatiblePlan(
                f"per-example gradients exist for nn.Linear layers only; {sorted(names.values())} belong to others: "
                "choose other lora.targets"
            )
        self._anchor = torch.zeros((), device=next(iter(trained.values())).device, requires_grad=True)
        self._count = 0
        self._parts: dict[str, Tensor] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for lora, a, b in self._fused:
                lora.swap(self._anchor, partial(self._store, a) if a else None, partial(self._store, b) if b else None)
                undo.callback(lora.restore)
            for layer, weight, bias in self._layers:
                undo.callback(layer.register_forward_hook(self._recorder(weight, bias)).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo.close()
        self._count, self._parts = 0, {}

    def _recorder(self, weight: str | None, bias: str | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            recorded = inputs[0].detach()

            def after_backward(gradient: Tensor) -> None:
                x = recorded.reshape(recorded.shape[0], -1, recorded.shape[-1])  # (B, T, n)
                g = gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])  # (B, T, m)
                if weight:
                    # Of two orders the one whose left factor is the thinner matrix is several times faster on a CPU.
                    wide = g.shape[-1] > x.shape[-1]
                    self._store(weight, torch.bmm(x.mT, g).mT if wide else torch.bmm(g.mT, x))
                if bias:
                    self._store(bias, g.sum(dim=1))

            output.register_hook(after_backward)  # type: ignore[no-untyped-call]

        return after_forward

    def _store(self, name: str, gradients: Tensor) -> None:
        """Keep the gradients `(B, ...)` of one parameter."""
        if name in self._parts or not self._count:
            raise IncompatiblePlan(f"{name} is used twice in one forward pass; its per-example gradients would be lost")
        if len(gradients) != self._count:
            raise IncompatiblePlan(
                f"{name} saw {len(gradients)} rows of {self._count} examples; gradients can be told apart only "
                "where each example is one row: choose other lora.targets"
            )
        self._parts[name] = gradients

    def rows(self, losses: Tensor) -> Tensor:
        """Gradients `(B, d)` of `losses` `(B,)`, one row per example, in the layout's order; float64 if losses are, else float32.

        Raises:
            IncompatiblePlan: if a layer ran on anything but one row for each example, or twice.
        """
        self._count, self._parts = len(losses), {}
        inputs = [layer.weight if weight else layer.bias for layer, weight, _ in self._layers]
        # The parameter gradients that autograd returns are the un-clipped batch sums: dropped here, never seen again.
        torch.autograd.grad(losses.sum(), [self._anchor, *inputs], allow_unused=True)
        # Only now, when the activations are gone: it would be on top of them.
        size = max(part.stop for part in self._slices.values())
        rows = losses.new_empty((len(losses), size), dtype=torch.promote_types(losses.dtype, torch.float32))
        for name, place in self._slices.items():
            gradients = self._parts.pop(name, None)
            if gradients is None:
                rows[:, place] = 0.0
            else:
                rows[:, place].view(gradients.shape).copy_(gradients)
        self._count = 0
        return rows
