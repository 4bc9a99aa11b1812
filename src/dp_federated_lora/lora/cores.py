r"""An r x r core between fixed factors: W = W0 + s B R A (Fed-SB, arXiv 2502.15436).

B and A are the r leading left and right singular vectors of W0: public, since W0 is, and orthonormal, so that
||B R A||_F = ||R||_F. R starts at zero and is all that is trained. On disk it is a plain LoRA adapter whose B is B R.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor, nn

_CORE, _BASIS = ".lora_B.default.core.weight", ".lora_B.default.basis.weight"


def insert_cores(peft_model: nn.Module) -> None:
    """Split every B of a PEFT LoRA model in two linear layers, core and basis, and set both factors; changed in place."""
    for module in peft_model.modules():
        factors: Any = getattr(module, "lora_B", None)
        if not factors:
            continue
        layer: Any = module
        down, weight = layer.lora_A["default"], layer.get_base_layer().weight.detach().to(torch.float64)
        if layer.fan_in_fan_out:  # GPT-2 keeps its weights transposed
            weight = weight.T
        rank = down.out_features
        left, values, right = svds(weight.cpu().numpy(), k=rank, v0=np.ones(min(weight.shape)))
        order = np.argsort(-values)
        core = nn.Linear(rank, rank, bias=False, device=weight.device)
        basis = nn.Linear(rank, len(weight), bias=False, device=weight.device)
        nn.init.zeros_(core.weight)
        with torch.no_grad():
            basis.weight.copy_(torch.from_numpy(left[:, order].copy()))
            down.weight.copy_(torch.from_numpy(right[order].copy()))
        factors["default"] = nn.Sequential(OrderedDict(core=core, basis=basis))


def without_cores(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the plain LoRA model that computes the same: each core multiplied into its basis."""
    plain = {name: value for name, value in state.items() if not name.endswith((_CORE, _BASIS))}
    for name in state:
        if name.endswith(_CORE):
            stem = name.removesuffix(_CORE)
            plain[f"{stem}.lora_B.default.weight"] = state[stem + _BASIS] @ state[name]
    return plain


def cores_of(saved: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The cores R = B^T (B R) of a saved adapter, for the model of this `state`; empty if it has none.

    Raises:
        KeyError: if the adapter is of other layers.
    """
    bases = {name.removesuffix(_BASIS): basis for name, basis in state.items() if name.endswith(_BASIS)}
    return {stem + _CORE: basis.T @ saved[f"{stem}.lora_B.weight"] for stem, basis in bases.items()}
