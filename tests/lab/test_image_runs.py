"""Runs on images, on images with text, and over a quantised base: the same engine, from a configuration to an adapter."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dp_federated_lora import evaluate, train
from dp_federated_lora.errors import ConfigError, ModelError
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench, data_id
from dp_federated_lora.lora import Task, load_backbone, vision_of
from saved import adapter
from vision import llava_backbone

Raw = dict[str, dict[str, object]]


@pytest.fixture
def digits_config(raw_config: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Raw:
    """Digits and the random ViT, unit = example, a head that learns in a few rounds."""
    monkeypatch.setenv("DPFL_CACHE", str(tmp_path / "cache"))
    raw_config["model"] = {"source": "builtin:random-vit", "task": "classification"}
    raw_config["lora"] = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"], "last_layers": 1}
    raw_config["data"] = {
        "train": "builtin:digits/train",
        "test": "builtin:digits/test",
        "test_is_public": True,
        "image_column": "image",
        "label_column": "digit",
        "labels": list("0123456789"),
    }
    raw_config["privacy"] |= {"clip_norm": 0.5, "sampling_rate": 0.5, "rounds": 10, "population": 1438}
    raw_config["training"] = {"server_learning_rate": 4.0, "server_head_learning_rate": 64.0, "head_rounds": 8}
    return raw_config


@pytest.fixture
def captions_config(raw_config: Raw, tmp_path: Path) -> Raw:
    """A LLaVA with random weights and grey squares whose captions say how bright they are."""
    from PIL import Image

    folder = tmp_path / "llava"
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        llava_backbone().save_pretrained(folder)
    words = ["[UNK]", "[END]", "dark", "bright", "square"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[END]").save_pretrained(folder)
    lines = ["picture,text"]
    for number in range(24):
        Image.new("L", (9, 7), 10 * number).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{'bright' if number > 11 else 'dark'} square")
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    raw_config["model"] = {"source": str(folder), "task": "image-text", "max_tokens": 8}
    raw_config["lora"] = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"], "last_layers": 1}
    raw_config["data"] = {
        "train": str(tmp_path / "captions.csv"),
        "test": str(tmp_path / "captions.csv"),
        "test_is_public": True,
        "image_column": "picture",
    }
    raw_config["federation"] = {"clients": 4, "partition": "iid"}
    raw_config["privacy"] |= {"population": 24, "rounds": 2}
    return raw_config


def test_a_private_run_on_images_learns_scores_and_can_be_scored_again(digits_config: Raw, tmp_path: Path):
    digits_config["evaluation"] = {"epsilon": 1.0, "every": 10, "holdout": 0.1}
    digits_config["run"] |= {"insecure_seed": 1, "threads": 1}  # the same noise always: no luck in the next line
    result = train(parse_config(digits_config, where="test"))
    assert result.metrics["accuracy"] > 0.25  # guessing finds 0.10
    assert evaluate(result.path) == result.metrics


def test_the_client_unit_trains_on_images(digits_config: Raw):
    digits_config["privacy"] = {"unit": "client", "epsilon": 8.0, "sampling_rate": 0.5, "rounds": 2}
    digits_config["training"] = {"local_steps": 1, "local_batch_size": 4, "local_learning_rate": 0.5}
    result = train(parse_config(digits_config, where="test"))
    assert result.rounds == 2


def test_the_identity_of_the_data_follows_every_pixel(digits_config: Raw):
    config = parse_config(digits_config, where="test")
    clients = Workbench.of(config).clients(privacy_plan(config))
    before = data_id(clients)
    images = list(clients[0].examples.images)
    images[0] = bytes([images[0][0] ^ 1]) + images[0][1:]
    object.__setattr__(clients[0].examples, "images", tuple(images))
    assert data_id(clients) != before


@pytest.mark.parametrize("tower", [False, True])
def test_a_vision_language_model_trains_and_its_adapter_loads_again(captions_config: Raw, tower: bool):
    if tower:
        del captions_config["lora"]["last_layers"]
        captions_config["lora"]["vision_tower"] = True
    result = train(parse_config(captions_config, where="test"))
    assert result.metrics["perplexity"] > 1
    assert evaluate(result.path) == pytest.approx(result.metrics)
    names = (result.path / "adapter" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in names


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("data", {"image_column": None}, "data.image_column"),
        ("model", {"task": "causal-lm"}, "data.image_column"),
        ("lora", {"vision_tower": True}, "without lora.last_layers"),
        ("training", {"head_rounds": 1}, 'task = "image-text" has no head'),
        ("training", {"head_start": "labels"}, "compares texts with names"),
    ],
)
def test_what_makes_no_sense_with_images_is_refused(captions_config: Raw, section: str, changes: dict, message: str):
    captions_config[section] |= changes
    with pytest.raises(ConfigError, match=message):
        parse_config(captions_config, where="test")


def test_models_that_take_no_images_are_refused(tiny_model: Path):
    backbone = load_backbone(tiny_model, Task.CLASSIFICATION)
    with pytest.raises(ModelError, match="'bert' takes no images"):
        vision_of(backbone, Task.CLASSIFICATION)
    with pytest.raises(ModelError, match="models of type 'llava'"):
        vision_of(backbone, Task.IMAGE_TEXT)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantisation_without_its_package_says_what_to_install(
    tiny_model: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"needs bitsandbytes: pip install 'dp-federated-lora-lab\[quantized\]'"):
        load_backbone(tiny_model, Task.CLASSIFICATION, quantization=quantization)


def test_quantised_weights_exclude_methods_that_read_them_and_files_quantised_already(raw_config: Raw, tmp_path: Path):
    raw_config["model"]["quantization"] = "4bit"
    raw_config["method"] = {"name": "fedsb"}
    with pytest.raises(ConfigError, match=r"model\.quantization"):
        parse_config(raw_config, where="test")
    with pytest.raises(ModelError, match="quantised already"):
        load_backbone(tmp_path / "model.gguf", Task.CAUSAL_LM, quantization="4bit")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_run_over_a_quantised_base_trains_the_same_tensors_and_can_be_scored(
    raw_config: Raw, tmp_path: Path, quantization: str
):
    plain = Workbench.of(parse_config(raw_config, where="test"))
    raw_config["model"]["quantization"] = quantization
    raw_config["privacy"]["rounds"] = 2
    config = parse_config(raw_config, where="test")
    bench = Workbench.of(config)
    kinds = {type(module).__name__ for module in bench.model.module.modules()}
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantization] in kinds
    assert bench.model.state().keys() == plain.model.state().keys()
    assert bench.trainable_fraction == plain.trainable_fraction
    result = train(config)
    assert evaluate(result.path) == result.metrics
    assert any(bool(tensor.any()) for name, tensor in adapter(result.path).items() if "lora_B" in name)
