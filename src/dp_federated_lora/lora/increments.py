r"""A dense public increment of the frozen weights beside each LoRA pair: W = W0 + s (M + B A).

Methods that merge what clients have learnt into the base model (FLoRA, FedEx-LoRA) keep it in M, which starts at zero and is
never trained. W0 stays as it is, whatever its type, and so does what others load: on disk M is further components of a plain
LoRA adapter, as many as its numerical rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

INCREMENT: Final = "increment"
_SUFFIX, _A, _B = f".{INCREMENT}.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def insert_increments(peft_model: nn.Module) -> None:
    """Give every LoRA layer a linear layer `increment` of its own shape, at zero, that adds to its output; changed in place."""
    for module in peft_model.modules():
        if getattr(module, "lora_B", None):
            layer: Any = module
            place = layer.get_base_layer().weight.device
            increment = nn.Linear(layer.in_features, layer.out_features, bias=False, device=place, dtype=torch.float32)
            nn.init.zeros_(increment.weight)
            layer.add_module(INCREMENT, increment.requires_grad_(False))
            layer.register_forward_hook(_add)


def _add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    added: Tensor = layer.increment(inputs[0].to(torch.float32))
    scale: float = layer.scaling["default"]
    return output + (scale * added).to(output.dtype)


def as_components(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """The state of the plain LoRA model that computes the same, and the number of components that each pair got more.

    M = U S V^T by SVD; U S goes behind B and V^T behind A. All pairs get as many as the largest rank needs.
    """
    plain = {name: value for name, value in state.items() if not name.endswith(_SUFFIX)}
    parts = {name.removesuffix(_SUFFIX): _components(value) for name, value in state.items() if name.endswith(_SUFFIX)}
    more = max((len(right) for _, right in parts.values()), default=0)
    for stem, (left, right) in parts.items():
        missing = more - len(right)
        plain[stem + _B] = torch.cat([plain[stem + _B], nn.functional.pad(left, (0, missing))], dim=1)
        plain[stem + _A] = torch.cat([plain[stem + _A], nn.functional.pad(right, (0, 0, 0, missing))])
    return plain, more


def from_components(saved: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `as_components` put on disk, for the model of this `state`: its pairs, and its increments by name.

    Raises:
        KeyError: if the adapter is of other layers.
    """
    pairs, increments = dict(saved), {}
    for name in state:
        if name.endswith(_SUFFIX):
            stem = name.removesuffix(_SUFFIX)
            rank = len(state[stem + _A])
            a, b = saved[f"{stem}.lora_A.weight"], saved[f"{stem}.lora_B.weight"]
            pairs |= {f"{stem}.lora_A.weight": a[:rank], f"{stem}.lora_B.weight": b[:, :rank]}
            increments[name] = (b[:, rank:].to(torch.float64) @ a[rank:].to(torch.float64)).to(torch.float32)
    return pairs, increments


def _components(increment: Tensor) -> tuple[Tensor, Tensor]:
    """U S `(m, q)` and V^T `(q, n)` of an `(m, n)` matrix of numerical rank q."""
    u, s, vt = torch.linalg.svd(increment.to(torch.float64), full_matrices=False)
    rank = int((s > torch.finfo(torch.float32).eps * max(increment.shape) * s[0]).sum())
    return (u[:, :rank] * s[:rank]).to(torch.float32), vt[:rank].to(torch.float32)
