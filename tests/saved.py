"""Adapters on disk, to compare."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file


def adapter(run: Path) -> dict[str, torch.Tensor]:
    """All tensors, of the head too."""
    return load_file(run / "adapter" / "adapter_model.safetensors") | load_file(run / "adapter" / "head.safetensors")


def with_peft(base: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The base model with a saved adapter, as somebody without this package loads it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
        return PeftModel.from_pretrained(base, folder).eval()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """To the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
