r"""Per-example gradients of linear layers by hooks, in one backward pass.

For y = x W^T + b with x `(B, T, n)` and upstream gradient g `(B, T, m)`, example i has the gradient
g_i^T x_i for W and sum_t g_it for b. LoRA factors and heads are small linear layers, so the B x d matrix of
per-example gradients is a few per cent of a step and a second (ghost) pass would only cost
(Goodfellow 2015, arXiv 1510.01799; Opacus, arXiv 2109.12298).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dp_federated_lora.errors import IncompatiblePlan
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
        self._layout = Layout.of(trained)
        names = {id(parameter): name for name, parameter in trained.items()}
        self._layers: list[tuple[nn.Linear, str | None, str | None]] = []
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = names.pop(id(module.weight), None)
                bias = names.pop(id(module.bias), None) if module.bias is not None else None
                if weight or bias:
                    self._layers.append((module, weight, bias))
        if names:
            raise IncompatiblePlan(
                f"per-example gradients exist for nn.Linear layers only; {sorted(names.values())} belong to others: "
                "choose other lora.targets"
            )
        self._rows: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for layer, weight, bias in self._layers:
            self._handles.append(layer.register_forward_hook(self._recorder(weight, bias)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rows.clear()

    def _recorder(self, weight: str | None, bias: str | None) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            recorded = inputs[0].detach()

            def after_backward(gradient: Tensor) -> None:
                x = recorded.reshape(recorded.shape[0], -1, recorded.shape[-1])  # (B, T, n)
                g = gradient.reshape(gradient.shape[0], -1, gradient.shape[-1])  # (B, T, m)
                if weight:
                    self._store(weight, torch.bmm(g.transpose(1, 2), x))
                if bias:
                    self._store(bias, g.sum(dim=1))

            output.register_hook(after_backward)  # type: ignore[no-untyped-call]

        return after_forward

    def _store(self, name: str, rows: Tensor) -> None:
        if name in self._rows:
            raise IncompatiblePlan(f"{name} is used twice in one forward pass; its per-example gradients would be lost")
        self._rows[name] = rows.flatten(1).float()

    def rows(self, losses: Tensor) -> Tensor:
        """Gradients `(B, d)` float32 of `losses` `(B,)`, one row per example, in the order of the layout.

        Raises:
            IncompatiblePlan: if a layer ran on anything but one row for each example, or twice.
        """
        inputs = [layer.weight if weight else layer.bias for layer, weight, _ in self._layers]
        # The parameter gradients that autograd returns are the un-clipped batch sums: dropped here, never seen again.
        torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        batch = losses.shape[0]
        if strange := [name for name, rows in self._rows.items() if len(rows) != batch]:
            raise IncompatiblePlan(
                f"{strange[0]} saw {len(self._rows[strange[0]])} rows of {batch} examples; gradients can be told apart only "
                "where each example is one row: choose other lora.targets"
            )
        rows = [
            self._rows.pop(name).reshape(batch, -1)
            if name in self._rows
            else losses.new_zeros((batch, shape.numel()), dtype=torch.float32)
            for name, shape in ((n, torch.Size(s)) for n, s in self._layout.entries)
        ]
        return torch.cat(rows, dim=1)
