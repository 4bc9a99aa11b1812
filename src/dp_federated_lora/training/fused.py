r"""A LoRA layer as one autograd Function, whose backward pass gives the gradients of single examples.

With x `(B, T, n)`, y = x W^T + b + s (x A^T) B^T (Hu et al. 2021, arXiv 2106.09685) and upstream gradient g `(B, T, m)`,
example i has the gradients s (g_i B)^T x_i for A `(r, n)` and s g_i^T (x_i A^T) for B `(m, r)`. The thin matrices x A^T and
g B are kept as their transposes `(r, B T)`, since products of that shape are two to four times faster on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from dp_federated_lora.errors import IncompatiblePlan

Keep = Callable[[Tensor], None]


@final
@dataclass(frozen=True, slots=True)
class LoraLayer:
    """The parts of a PEFT LoRA layer that computes y and nothing else.

    Args:
        module: the layer.
        base: W `(m, n)` and b, of any floating-point type.
        down: A `(r, n)`.
        up: B `(m, r)`.
        scale: s.
    """

    module: nn.Module
    base: nn.Linear
    down: nn.Linear
    up: nn.Linear
    scale: float

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The parts of `module`; None if it computes anything else, as with dropout, DoRA, quantised weights or a core."""
        layer: Any = module
        # First a look at the class, as a module takes long to say what it has not.
        if not (hasattr(type(layer), "active_adapters") and "default" in getattr(layer, "lora_A", ())):
            return None
        parts = (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
        plain = (
            all(type(part) is nn.Linear for part in parts)
            and sum(isinstance(part, nn.Linear) for part in layer.modules()) == len(parts)
            and not any("forward" in vars(part) for part in parts)
            and parts[1].bias is parts[2].bias is None
            and isinstance(layer.lora_dropout["default"], nn.Identity)
            and layer.active_adapters == ["default"]
            and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        )
        return cls(layer, *parts, layer.scaling["default"]) if plain else None

    def swap(self, anchor: Tensor, keep_a: Keep | None, keep_b: Keep | None) -> None:
        """Let the layer run as one Function, until `restore`.

        Args:
            anchor: any tensor that requires a gradient, so that a backward pass reaches layers whose x needs none.
            keep_a: takes the gradients `(B, r, n)` of A, in its type of numbers; None if it is not trained.
            keep_b: takes those `(B, m, r)` of B.

        Raises:
            IncompatiblePlan: if something else runs in its place already.
        """
        if "forward" in vars(self.module):
            raise IncompatiblePlan("a LoRA layer is in use already; its per-example gradients would be lost")
        self.module.forward = partial(_run, anchor, self, keep_a, keep_b)

    def restore(self) -> None:
        """Undo `swap`."""
        del self.module.forward


def _run(anchor: Tensor, layer: LoraLayer, keep_a: Keep | None, keep_b: Keep | None, x: Tensor) -> Tensor:
    result: Tensor = _Lora.apply(x, anchor, layer, keep_a, keep_b)  # type: ignore[no-untyped-call]
    return result


class _Lora(torch.autograd.Function):
    """Types of numbers as in PEFT: the branch is computed in that of A and B and added in it; the result has that of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, layer: LoraLayer, keep_a: Keep | None, keep_b: Keep | None) -> Tensor:
        a, b, w = layer.down.weight, layer.up.weight, layer.base.weight
        flat = x.reshape(-1, x.shape[-1])  # (B T, n)
        h = (a @ flat.to(a.dtype).T).mul_(layer.scale)  # (r, B T)
        y = nn.functional.linear(flat, w, layer.base.bias).to(b.dtype).addmm_(h.T, b.T).to(w.dtype)
        ctx.save_for_backward(x if keep_a else None, h if keep_b else None)
        ctx.layer, ctx.keep_a, ctx.keep_b = layer, keep_a, keep_b
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (g,), (x, h), layer = gradients, ctx.saved_tensors, ctx.layer
        a, b, w = layer.down.weight, layer.up.weight, layer.base.weight
        flat = g.reshape(-1, g.shape[-1])  # (B T, m)
        wide = flat.to(b.dtype)
        if ctx.keep_b:
            ctx.keep_b(torch.bmm(_by_example(h, len(g)), wide.reshape(len(g), -1, g.shape[-1])).mT)
        if not (ctx.keep_a or ctx.needs_input_grad[0]):
            return None, None, None, None, None
        gh = (b.T @ wide.T).mul_(layer.scale)  # (r, B T)
        if ctx.keep_a:
            ctx.keep_a(torch.bmm(_by_example(gh, len(g)), x.reshape(len(g), -1, x.shape[-1]).to(a.dtype)))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        gx = (flat @ w).to(a.dtype).addmm_(gh.T, a).to(w.dtype)
        return gx.reshape(*g.shape[:-1], -1), None, None, None, None


def _by_example(thin: Tensor, batch: int) -> Tensor:
    """View `(r, B T)` as `(B, r, T)`."""
    return thin.reshape(len(thin), batch, -1).transpose(0, 1)
