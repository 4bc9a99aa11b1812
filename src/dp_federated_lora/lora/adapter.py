"""PEFT's LoRA on a backbone: which tensors can be trained, what they are called, and saving them.

PEFT puts the layers in place and defines the file format, so an adapter trained here loads with
`peft.PeftModel.from_pretrained(AutoModel..., "adapter")` on the plain backbone, without this package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dp_federated_lora.errors import ModelError
from dp_federated_lora.lora.cores import cores_of, insert_cores, without_cores
from dp_federated_lora.lora.increments import INCREMENT, as_components, from_components, insert_increments
from dp_federated_lora.lora.models import Classifier, Pooling, Task


class Factor(Enum):
    """The kinds of tensors an adapter has."""

    A = "lora_A"
    B = "lora_B"
    CORE = "core"
    HEAD = "head"
    INCREMENT = INCREMENT

    @classmethod
    def of(cls, name: str) -> Factor | None:
        """The kind of the parameter called `name`; None for those of the base model."""
        parts = name.split(".")
        if parts[0] == cls.HEAD.value:
            return cls.HEAD
        if parts[-2:-1] == [INCREMENT]:
            return cls.INCREMENT
        kind = next((kind for kind in (cls.A, cls.B) if kind.value in parts), None)
        return cls.CORE if kind and cls.CORE.value in parts else kind


def block_list(backbone: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a backbone, or of its language model where it has one: the longest ModuleList.

    Raises:
        ModelError: if there is none.
    """
    lists = [module for module in _language_model(backbone).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError("the backbone has no list of blocks; leave lora.last_layers out")
    return max(lists, key=len)


def _language_model(backbone: nn.Module) -> nn.Module:
    """The part of a vision-language model that reads text, or all of another model."""
    return next((module for name, module in backbone.named_modules() if name.endswith("language_model")), backbone)


@final
class AdaptedModel:
    """A frozen base model with a LoRA adapter (and head) whose tensors go by name.

    Args:
        module: what runs the forward pass: the `Classifier`, or the causal language model with its adapter.
        peft_model: the PEFT model inside.
        task: what it computes.
        base_parameters: number of parameters of the base model.
    """

    def __init__(self, module: nn.Module, peft_model: Any, task: Task, base_parameters: int) -> None:
        self.module = module
        self.task = task
        self.base_parameters = base_parameters
        self._peft = peft_model
        self._parameters = {name: parameter for name, parameter in module.named_parameters() if Factor.of(name) is not None}

    def parameters(self, factors: frozenset[Factor]) -> dict[str, nn.Parameter]:
        """Adapter tensors of the given kinds, by name, in model order."""
        return {name: p for name, p in self._parameters.items() if Factor.of(name) in factors}

    def train_only(self, factors: frozenset[Factor]) -> dict[str, nn.Parameter]:
        """Let gradients flow to the given kinds and to nothing else; returns their parameters."""
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(Factor.of(name) in factors)
        return self.parameters(factors)

    @property
    def device(self) -> torch.device:
        """Where the model computes; adapters come and go as tensors of the CPU."""
        return next(iter(self._parameters.values())).device

    def state(self) -> dict[str, Tensor]:
        """Copies of all adapter tensors, on the CPU."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self._parameters.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set adapter tensors; names left out stay as they are.

        Raises:
            ModelError: on an unknown name or another shape.
        """
        with torch.no_grad():
            for name, value in tensors.items():
                target = self._parameters.get(name)
                if target is None or target.shape != value.shape:
                    raise ModelError(
                        f"adapter tensor {name} {tuple(value.shape)} does not fit this model: "
                        f"{'no such tensor' if target is None else f'expected {tuple(target.shape)}'}"
                    )
                target.copy_(value)

    def save(self, folder: Path, *, source: str, note: str = "") -> None:
        """Write a PEFT adapter of the plain backbone, the head, and how to load them, with a `note` for its reader."""
        self._peft.peft_config["default"].base_model_name_or_path = source
        config = self._peft.peft_config["default"]
        plain, more = as_components(without_cores(self._peft.state_dict()))
        rank, alpha = config.r, config.lora_alpha
        try:  # more components of the same scale alpha / r
            config.r, config.lora_alpha = rank + more, alpha * (rank + more) / rank
            self._peft.save_pretrained(folder, state_dict=plain, safe_serialization=True, save_embedding_layers=False)
        finally:
            config.r, config.lora_alpha = rank, alpha
        head = {n.removeprefix("head."): t for n, t in self.state().items() if Factor.of(n) is Factor.HEAD}
        if head:
            save_file(head, folder / "head.safetensors")
        (folder / "README.md").write_text(_card(source, self.task, bool(head), more, note), encoding="utf-8")

    def load_saved(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            ModelError: if a file is missing, damaged or of another model.
        """
        from peft import set_peft_model_state_dict  # noqa: PLC0415  (imports transformers)

        try:
            saved = load_file(folder / "adapter_model.safetensors")
            if cores := cores_of(saved, self._peft.state_dict()):
                self._peft.load_state_dict(cores, strict=False)
                saved = {name: tensor for name, tensor in saved.items() if Factor.of(name) is Factor.A}
            saved, increments = from_components(saved, self._peft.state_dict())
            self._peft.load_state_dict(increments, strict=False)
            result: Any = set_peft_model_state_dict(self._peft, saved)
            if result.unexpected_keys:
                raise ModelError(f"{folder} belongs to another model: unexpected {result.unexpected_keys[:3]}")
            if self.parameters(frozenset((Factor.HEAD,))):
                self.load({f"head.{n}": t for n, t in load_file(folder / "head.safetensors").items()})
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise ModelError(f"the adapter in {folder} cannot be read: {error}") from error


def adapt(
    backbone: nn.Module,
    *,
    task: Task,
    classes: int = 0,
    pooling: Pooling = "mean",
    rank: int,
    alpha: float,
    targets: Sequence[str],
    last_layers: int | None,
    seed: int,
    cores: bool = False,
    increments: bool = False,
    vision_tower: bool = False,
) -> AdaptedModel:
    """Put LoRA (and for classification a head) on a frozen backbone.

    A is drawn with orthonormal rows from the public `seed`, so that it passes a fixed share of any input's energy;
    B and the head start at zero, so training starts from the base model.

    Args:
        backbone: from `load_backbone`; changed in place.
        task: what it learns.
        classes: number of classes (classification).
        pooling: how the classifier pools.
        rank: r.
        alpha: the branch is scaled by alpha / r.
        targets: names of the linear layers to adapt, as in PEFT's `target_modules`.
        last_layers: adapt the last k blocks only; None for all.
        seed: public randomness of A.
        cores: put a trainable r x r core between fixed factors from the base weights, instead of drawing A.
        increments: put a dense increment beside each pair, for what a method merges into the frozen weights.
        vision_tower: adapt the vision tower of a vision-language model too.

    Raises:
        ModelError: if no layer matches, or a target cannot carry LoRA or not of this rank.
    """
    from peft import LoraConfig, TaskType, get_peft_model  # noqa: PLC0415  (imports transformers)

    base: Any = backbone
    base_parameters: int = base.num_parameters()  # of quantised weights it counts the numbers, not the bytes
    part: nn.Module = backbone if vision_tower else _language_model(backbone)
    if last_layers is not None:
        blocks = block_list(backbone)
        if not 1 <= last_layers <= len(blocks):
            raise ModelError(f"lora.last_layers must lie in 1..{len(blocks)} for this model, got {last_layers}")
        part = blocks[-last_layers:]
    scale: Any = alpha  # peft takes any number and annotates an int
    try:
        config = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION if task is Task.CLASSIFICATION else TaskType.CAUSAL_LM,
            r=rank,
            lora_alpha=scale,
            lora_dropout=0.0,
            target_modules=list(targets) if part is backbone else _names_within(part, backbone, targets),
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in backbone.modules()),
        )
        with warnings.catch_warnings():
            # peft asks transformers for a name that transformers is renaming; nothing a user could act on.
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing")
            peft_model: Any = get_peft_model(backbone, config)
    except ValueError as error:
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in backbone.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(f"lora.targets {list(targets)}: {error}. Linear layers of this model: {linear}") from error
    peft_model.eval()
    _require_rank(peft_model, rank)
    if cores:
        insert_cores(peft_model)
    if increments:
        insert_increments(peft_model)
    module: nn.Module = Classifier(peft_model, classes, pooling) if task is Task.CLASSIFICATION else peft_model
    adapted = AdaptedModel(module, peft_model, task, base_parameters)
    if not cores:
        adapted.load(orthonormal(adapted.parameters(frozenset((Factor.A,))), seed))
    return adapted


def _require_rank(peft_model: nn.Module, rank: int) -> None:
    """Raise ModelError if an adapted layer is too small for products of that rank."""
    small = {min(m.in_features, m.out_features): n for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    if rank > min(small):
        raise ModelError(
            f"lora.rank {rank} is above the smaller side of {small[min(small)]}, {min(small)}: no product of that layer has it; "
            f"use a rank of at most {min(small)}, or leave the layer out of lora.targets"
        )


def _names_within(part: nn.Module, backbone: nn.Module, targets: Sequence[str]) -> list[str]:
    """Full names of the layers called `targets` in a part of the backbone, so that PEFT adapts no other of the same name."""
    inside = set(part.modules())
    names = [name for name, module in backbone.named_modules() if module in inside]
    found = [name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)]
    if not found:
        raise ValueError("no layer is called so where the adapter goes")
    return found


def orthonormal(factors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Factors A of the shapes `(r, n)` of these, drawn with orthonormal rows from a public seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.linalg.qr(torch.randn(*factor.shape[::-1], generator=generator, dtype=torch.float64))[0].T.float()
        for name, factor in factors.items()
        if math.prod(factor.shape)
    }


def _card(source: str, task: Task, head: bool, more: int, note: str) -> str:
    kind = task.loader
    lines = [
        "# Adapter",
        "",
        f"A LoRA adapter of `{source}`, trained with differential privacy. See `../privacy.json` for the guarantee.",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {kind}",
        f'model = PeftModel.from_pretrained({kind}.from_pretrained(BASE), "adapter")',
        "```",
    ]
    if more:
        lines += ["", f"The last {more} of its components are what rounds have merged into the frozen weights."]
    if head:
        lines += [
            "",
            "The classifier is `head.safetensors` (`weight`, `bias`): logits = weight @ normalize(pooled) + bias, where `pooled`",
            "is the mean of `last_hidden_state` over tokens (or its last token, see `pooling` in `../config.toml`).",
        ]
    lines += ["", note] if note else []
    return "\n".join(lines) + "\n"
