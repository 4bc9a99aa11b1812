"""Pretrained backbones from local files, and the classification head on top."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from enum import Enum
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dp_federated_lora.errors import ModelError

Pooling = Literal["mean", "last"]


class Task(Enum):
    """What is learnt: a class of a text, or the next token."""

    CLASSIFICATION = "classification"
    CAUSAL_LM = "causal-lm"


def native_dtype() -> Literal["float32", "bfloat16"]:
    """The frozen weights' fastest type here: bfloat16 on a CPU that multiplies it natively (AMX or AVX-512), else float32."""
    capabilities = torch.cpu.get_capabilities()
    return "bfloat16" if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else "float32"


def load_backbone(path: Path, task: Task, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a transformers model from a directory or a `.gguf` file, frozen and without dropout.

    Args:
        path: the model directory or file.
        task: classification takes the bare encoder or decoder, language modelling the one with its output layer.
        dtype: of the frozen weights. Adapter, head, clipping and noise are float32 or finer whatever it is.

    Raises:
        ModelError: if transformers cannot read it.
    """
    from transformers import AutoModel, AutoModelForCausalLM  # noqa: PLC0415  (seconds to import; only runs need it)
    from transformers.utils import logging  # noqa: PLC0415

    quieten: Any = logging.disable_progress_bar
    quieten()  # the run has a progress display of its own

    kind: Any = AutoModelForCausalLM if task is Task.CAUSAL_LM else AutoModel
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    # Reading GGUF draws a bar of its own that no setting turns off.
    quiet = redirect_stderr(StringIO()) if options else nullcontext()
    try:
        with quiet:
            model: nn.Module = kind.from_pretrained(
                folder, dtype=dtype, attn_implementation="eager", local_files_only=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"[model] source: {path} is not a model that transformers can load for task {task.value!r}: {error}"
        ) from error
    # eval() stays on during training: dropout would make the cached trunk wrong and DP runs do not need it.
    return model.eval().requires_grad_(False)


class TextClassifier(nn.Module):
    """Backbone -> pooled, L2-normalised features -> linear head.

    Pooling follows the pretraining (mask mean for encoders, last token for decoders); normalised features bound the
    head's gradient, so that one clip norm fits every example; the head starts at zero, so that no class is favoured.

    Args:
        backbone: module with `config.hidden_size` whose output has `last_hidden_state`.
        classes: number of classes.
        pooling: "mean" or "last".
    """

    def __init__(self, backbone: nn.Module, classes: int, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        hidden: Any = backbone.config
        self.head = nn.Linear(int(hidden.hidden_size), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Pooled features `(B, h)` of length 1."""
        states: Tensor = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        states = states.to(self.head.weight.dtype)  # frozen weights may be coarser than the head
        if self.pooling == "last":
            pooled = states[torch.arange(len(states)), attention_mask.sum(dim=1) - 1]
        else:
            mask = attention_mask[..., None].to(states.dtype)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return nn.functional.normalize(pooled, dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `(B, classes)` of token ids and mask `(B, T)`."""
        logits: Tensor = self.head(self.features(input_ids, attention_mask))
        return logits
