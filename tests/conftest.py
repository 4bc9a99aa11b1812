"""Tiny real models and tables on disk; nothing here touches a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

from databases import database, place, postgres  # noqa: F401  (fixtures)

WORDS = "oil crude barrel wheat grain corn bank rate money stock share profit the of and said".split()
TOPICS = {"crude": WORDS[:3], "grain": WORDS[3:6], "money": WORDS[6:9]}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three blocks with a word tokenizer, as a transformers directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
        )
        BertModel(config).save_pretrained(folder)
    return folder


def write_table(path: Path, rows: int, seed: int) -> Path:
    """A CSV of short texts whose words give the topic away."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options: list[str]) -> str:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    lines = ["text,topic,author"]
    for _ in range(rows):
        topic = pick(sorted(TOPICS))
        count = 3 + int(torch.randint(6, (1,), generator=generator))
        words = [pick(TOPICS[topic]) if i % 2 else pick(WORDS) for i in range(count)]
        lines.append(f"{' '.join(words)},{topic},author{pick(list('abcd'))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and test tables."""
    folder = tmp_path_factory.mktemp("tables")
    return write_table(folder / "train.csv", 120, 1), write_table(folder / "test.csv", 60, 2)


@pytest.fixture
def raw_config(tiny_model: Path, tables: tuple[Path, Path], tmp_path: Path) -> dict[str, dict[str, object]]:
    """A small, possible configuration (unit = example) as nested dictionaries."""
    train, test = tables
    return {
        "model": {"source": str(tiny_model), "task": "classification", "max_tokens": 16},
        "lora": {"rank": 2, "alpha": 4.0, "targets": ["query", "value"], "last_layers": 2},
        "data": {
            "train": str(train),
            "test": str(test),
            "test_is_public": True,
            "label_column": "topic",
            "labels": sorted(TOPICS),
        },
        "federation": {"clients": 4, "partition": "dirichlet", "alpha": 0.5},
        "privacy": {"unit": "example", "epsilon": 8.0, "sampling_rate": 0.3, "rounds": 4, "population": 120},
        "training": {"server_learning_rate": 4.0, "batch_tokens": 256},
        "run": {"out": str(tmp_path / "run"), "evaluate_every": 2, "evaluate_examples": 20},
    }


@pytest.fixture
def client_config(raw_config: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """The same for unit = client."""
    raw_config["privacy"] = {"unit": "client", "epsilon": 8.0, "sampling_rate": 0.5, "rounds": 3}
    raw_config["federation"] = {"clients": 4, "partition": "column", "columns": ["author"]}
    raw_config["training"] |= {"local_steps": 2, "local_batch_size": 8, "local_learning_rate": 0.5}
    return raw_config
