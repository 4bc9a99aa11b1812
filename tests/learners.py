"""Small models of every kind in float64, with a few examples each."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from dp_federated_lora.data import Examples
from dp_federated_lora.lora import Task, adapt
from dp_federated_lora.training import Learner
from vision import LLAVA_IMAGES, VIT_IMAGES, llava_backbone, some_images

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> tuple[torch.nn.Module, Task, list[str]]:
    return BertModel(BertConfig(**SMALL)), Task.CLASSIFICATION, ["query", "value"]


def llama() -> tuple[torch.nn.Module, Task, list[str]]:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **SMALL)), Task.CAUSAL_LM, ["q_proj", "v_proj"]


def gpt2() -> tuple[torch.nn.Module, Task, list[str]]:
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32)
    return GPT2LMHeadModel(config), Task.CAUSAL_LM, ["c_attn"]


def vit() -> tuple[torch.nn.Module, Task, list[str]]:
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **shape)), Task.CLASSIFICATION, ["q_proj", "v_proj"]


def llava() -> tuple[torch.nn.Module, Task, list[str]]:
    return llava_backbone(), Task.IMAGE_TEXT, ["q_proj", "v_proj"]


IMAGES = {vit: VIT_IMAGES, llava: LLAVA_IMAGES}


def learner_of(
    make,
    *,
    cached: bool,
    last_layers: int | None = 1,
    keep_features: bool = False,
    cache: Path | None = None,
    threads: int = 1,
    device: str = "cpu",
) -> tuple[Learner, Examples]:
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(3)
        backbone, task, targets = make()
    model = adapt(
        backbone.double().eval().requires_grad_(False),
        task=task,
        classes=3,
        rank=2,
        alpha=4.0,
        targets=targets,
        last_layers=last_layers,
        seed=0,
    )
    model.module.double().to(device)
    generator = torch.Generator().manual_seed(1)
    model.load({n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in model.state().items()})
    lengths = [3, 7, 5, 9, 2]
    tokens = tuple(tuple(torch.randint(1, 50, (n,), generator=generator).tolist()) for n in lengths)
    images = IMAGES.get(make)
    text = Examples(tokens, (0, 1, 2, 1, 0) if task is Task.CLASSIFICATION else None)
    examples = some_images(images, task) if images else text
    depth = last_layers if cached else None
    learner = Learner(
        model,
        pad_id=0,
        batch_tokens=18,
        last_layers=depth,
        keep_features=keep_features,
        images=images,
        cache=cache,
        threads=threads,
    )
    learner.prepare(examples)
    return learner, examples
