"""Adapters on disk, to compare."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """All tensors, of the head too."""
    return load_file(run / "adapter" / "adapter_model.safetensors") | load_file(run / "adapter" / "head.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
