"""What every system of simulate.py is given and computes: one model, the same clients, and how they learn.

Needs torch, transformers, peft and safetensors, and nothing of any of the systems.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

CLASSES: Final = 8
RANK: Final = 8
ALPHA: Final = 16
TARGETS: Final = ("query", "value")
STEPS: Final = 2
LEARNING_RATE: Final = 0.1
CLIP_NORM: Final = 0.13
"""Cuts about half of the clients' changes."""
WARM_UP: Final = 32
"""Clients of the round before the one that is timed."""


@dataclass(frozen=True)
class Work:
    """The global adapter by name, and the clients' tokens `(D, B, T)` and labels `(D, B)`; client k has the data k mod D."""

    adapter: dict[str, Tensor]
    tokens: Tensor
    labels: Tensor

    @classmethod
    def drawn(cls, adapter: dict[str, Tensor], clients: int, examples: int, tokens: int) -> Work:
        """Random tensors of the adapter's shapes, so that no factor is zero, and random data."""
        generator = torch.Generator().manual_seed(1)
        return cls(
            {name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in adapter.items()},
            torch.randint(1000, 20_000, (clients, examples, tokens), generator=generator),
            torch.randint(CLASSES, (clients, examples), generator=generator),
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"tokens": self.tokens, "labels": self.labels} | self.adapter, path)

    @classmethod
    def load(cls, path: Path) -> Work:
        """Read what `save` wrote."""
        tensors = load_file(path)
        tokens, labels = tensors.pop("tokens"), tensors.pop("labels")
        return cls(tensors, tokens, labels)

    @property
    def examples(self) -> int:
        """B: a client's examples, and the size of its batches."""
        return self.labels.shape[1]

    def of(self, client: int) -> tuple[Tensor, Tensor]:
        """Tokens `(B, T)` and labels `(B,)` of a client."""
        place = client % len(self.tokens)
        return self.tokens[place], self.labels[place]


class Classifier(nn.Module):
    """LoRA on a frozen encoder, the normalised mean of its states, and a linear head; as the project's, in plain PEFT."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        encoder: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS))
        self.backbone = get_peft_model(encoder, config)
        self.head = nn.Linear(encoder.config.hidden_size, CLASSES)
        self.eval()
        self.trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch without padding."""
        states = self.backbone(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return nn.functional.cross_entropy(self.head(nn.functional.normalize(states.mean(dim=1), dim=1)), labels)

    @torch.no_grad()
    def load(self, adapter: dict[str, Tensor]) -> None:
        """Set the trained parameters."""
        for name, parameter in self.trained.items():
            parameter.copy_(adapter[name])

    def learn(self, tokens: Tensor, labels: Tensor) -> None:
        """A client's local steps, each on all of its examples."""
        optimizer = torch.optim.SGD(self.trained.values(), lr=LEARNING_RATE)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.loss(tokens, labels).backward()
            optimizer.step()


@lru_cache(maxsize=1)
def loaded(work: Path, model: Path) -> tuple[Work, Classifier]:
    """Both read once in a process."""
    return Work.load(work), Classifier(model)


def arguments(doc: str | None) -> argparse.Namespace:
    """The command line that all systems share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="safetensors file of adapter and data")
    parser.add_argument("model", type=Path, help="directory of the encoder")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--noise", type=float, default=0.0, help="multiplier; 0 to compare sums")
    parser.add_argument("--stack", type=int, help="tokens computed together, this project only")
    parser.add_argument("--bfloat16", action="store_true", help="frozen weights in it, this project only")
    parser.add_argument("--update", type=Path, help="where the mean update goes, by name")
    return parser.parse_args()


def tell(options: argparse.Namespace, package: str, seconds: float, update: dict[str, Tensor], **more: float) -> None:
    """Print one line of JSON, with the version of the package that was measured; write the update."""
    if options.update:
        save_file({name: value.contiguous() for name, value in update.items()}, options.update)
    print(json.dumps({"seconds": seconds, "version": version(package), **more}), flush=True)
