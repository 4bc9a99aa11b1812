"""A study: every cell once, as if it were run alone; baselines that learn; a document that says what is missing."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from scipy.stats import t as student
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from dp_federated_lora import train
from dp_federated_lora.cli.main import app
from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.plans import private_evaluation
from dp_federated_lora.lab.study import Cell, read_grid, run_study, write_study
from dp_federated_lora.lab.study.tables import Row
from dp_federated_lora.monitoring.metrics import read_metrics

Raw = dict[str, dict[str, Any]]


def grid_of(path: Path, raw: Raw, *blocks: dict[str, Any]) -> Path:
    """A study file over a small configuration."""
    recipe = path / "small.toml"
    recipe.write_text(tomli_w.dumps(raw), encoding="utf-8")
    file = path / "grid.toml"
    file.write_text(tomli_w.dumps({"block": [{"recipe": str(recipe), **block} for block in blocks]}), encoding="utf-8")
    return file


def test_the_study_that_ships_is_possible_and_covers_what_it_should() -> None:
    cells = read_grid()
    assert {cell.recipe for cell in cells} == {"newswire", "newsgroups", "dialogue"}
    assert {cell.config.privacy.epsilon for cell in cells if not cell.baseline} >= {1.0, 3.0, 8.0}
    assert {cell.config.privacy.unit for cell in cells} == {"example", "client"}
    assert {cell.baseline for cell in cells} == {None, "probe", "not-private"}


def test_cells_share_a_model_and_give_what_each_gives_alone(raw_config: Raw, tmp_path: Path) -> None:
    raw_config["run"] |= {"insecure_seed": 3, "device": "cpu"}  # a GPU does not promise equal bits
    raw_config["training"]["head_rounds"] = 2
    methods = {"title": "Methods", "across": {"method.name": ["ffa", "fedsb", "fedavg"]}}
    sketches = {"title": "Sketches", "across": {"compression.ratio": [4.0]}}
    cells = read_grid(grid_of(tmp_path, raw_config, methods, sketches))
    run_study(cells, tmp_path / "study")
    for cell in cells:
        scores = json.loads((tmp_path / "study" / "results" / f"{cell.name}.json").read_text())["scores"]
        alone = train(cell.config, out=tmp_path / "alone" / cell.name)
        (*_, last) = read_metrics(alone.path / "metrics.jsonl")
        assert scores == {**alone.metrics, "epsilon": alone.epsilon, "bytes_per_client": last["bytes_per_client"]}
        adapters = [p / "adapter" / "adapter_model.safetensors" for p in (alone.path, tmp_path / "study" / "runs" / cell.name)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_finished_cell_is_not_run_again_and_an_interrupted_one_is(raw_config: Raw, tmp_path: Path) -> None:
    cells = read_grid(grid_of(tmp_path, raw_config, {"title": "Budgets", "across": {"privacy.epsilon": [8.0, 3.0]}}))
    run_study(cells[:1], tmp_path / "study")
    (tmp_path / "study" / "runs" / cells[1].name).mkdir()  # what a killed study leaves
    seen: list[tuple[Cell, int, int]] = []
    run_study([*cells, cells[1]], tmp_path / "study", on_cell=lambda *args: seen.append(args))
    assert seen == [(cells[1], 0, 1)]


def test_baselines_learn_and_the_document_has_shares_intervals_and_gaps(raw_config: Raw, tmp_path: Path) -> None:
    epsilons = {"privacy.epsilon": [8.0, 1.0]}
    raw_config["data"]["test"] = raw_config["data"]["train"]  # what was learnt of 120 texts with a random encoder shows there
    file = grid_of(
        tmp_path,
        raw_config,
        {"title": "Anchor", "baseline": "not-private"},
        {"title": "Probe", "baseline": "probe", "across": epsilons, "repeats": 2},
        {"title": "Runs", "across": epsilons},
    )
    cells = read_grid(file)
    document = tmp_path / "study.md"
    with pytest.raises(ConfigError, match="no results yet"):
        write_study(cells, tmp_path / "study", document, command="dpfl bench utility")
    run_study([cell for cell in cells if cell.baseline], tmp_path / "study")
    write_study(cells, tmp_path / "study", document, command="dpfl bench utility")
    text = document.read_text()
    assert "2 of 7 runs are not made yet" in text and "## Runs" not in text

    results = {cell.name: json.loads((tmp_path / "study" / "results" / f"{cell.name}.json").read_text()) for cell in cells[:5]}
    anchor = results[cells[0].name]["scores"]["accuracy"]
    strong = [results[cell.name]["scores"]["accuracy"] for cell in cells[1:3]]
    topics = [line.split(",")[1] for line in Path(raw_config["data"]["train"]).read_text().splitlines()[1:]]
    assert anchor > max(topics.count(topic) for topic in topics) / len(topics)
    mean, spread = sum(strong) / 2, abs(strong[0] - strong[1]) / math.sqrt(2)
    width = float(student.ppf(0.975, 1)) * spread / math.sqrt(2)
    row = next(line for line in text.splitlines() if line.startswith("| DP linear probe | 8 |"))
    assert f"| {100 * mean:.1f} ± {100 * width:.1f} |" in row and f"| {100 * mean / anchor:.1f} % |" in row
    picture = (tmp_path / "study-probe.svg").read_text()
    assert "study-probe.svg" in text and picture.startswith("<?xml")
    write_study(cells, tmp_path / "study", document, command="dpfl bench utility")
    assert (tmp_path / "study-probe.svg").read_text() == picture


def test_the_interval_of_a_single_noised_score_is_that_of_its_noise(raw_config: Raw, tmp_path: Path) -> None:
    """The deviation of 20,000 draws is known to 0.5 %: five per cent are ten standard errors."""
    raw_config["evaluation"] = {"epsilon": 1.0, "every": 2, "loss_cap": 3.0}
    (cell,) = read_grid(grid_of(tmp_path, raw_config, {"title": "Runs"}))
    true = {"accuracy": 0.3, "loss": 2.0, "units": 1000.0}
    evaluation = private_evaluation(cell.config)
    assert evaluation is not None
    sums = 1000.0 * torch.tensor([0.3, 1.0, 2.0 / 3.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = evaluation.BOUND * evaluation.noise_multiplier * torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    drawn = [evaluation.metrics(sums + row) for row in noise]
    for score in ("accuracy", "loss"):
        mean, width = Row(cell, [{"scores": true}]).interval(score)
        assert mean == true[score]
        assert width == pytest.approx(1.96 * statistics.stdev(each[score] for each in drawn), rel=0.05)


def test_a_language_model_without_test_data_is_scored_on_what_participants_hold_out(
    raw_config: Raw, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    tokenizer.save_pretrained(base)
    ends = tokenizer.eos_token_id
    shape = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=ends, eos_token_id=ends)).save_pretrained(base)
    raw_config["model"] |= {"source": str(base), "task": "causal-lm"}
    raw_config["lora"]["targets"] = ["c_attn"]
    raw_config["federation"] = {"clients": 4}
    for key in ("label_column", "labels", "test", "test_is_public"):
        raw_config["data"].pop(key, None)
    raw_config["evaluation"] = {"epsilon": 1.0, "every": 2, "holdout": 0.2, "loss_cap": 3.0}
    anchor = {"title": "Anchor", "baseline": "not-private"}
    (cell,) = read_grid(grid_of(tmp_path, raw_config, anchor))
    run_study([cell], tmp_path / "study")
    scores = json.loads((tmp_path / "study" / "results" / f"{cell.name}.json").read_text())["scores"]
    assert 0.0 <= scores["accuracy"] <= 1.0 and 0.0 < scores["loss"] <= 3.0
    del raw_config["evaluation"]
    (cell,) = read_grid(grid_of(tmp_path, raw_config, anchor))
    with pytest.raises(ConfigError, match="neither test data nor"):
        run_study([cell], tmp_path / "other")


def test_each_table_is_compared_with_training_without_privacy_on_examples_of_the_same_length(
    raw_config: Raw, tmp_path: Path
) -> None:
    longer = {"model.max_tokens": 12}
    file = grid_of(
        tmp_path,
        raw_config,
        {"title": "Short", "baseline": "not-private"},
        {"title": "Short runs"},
        {"title": "Long runs", "set": longer},
        {"title": "Long", "set": longer, "baseline": "not-private"},
    )
    cells, results = read_grid(file), tmp_path / "study" / "results"
    results.mkdir(parents=True)
    for cell, accuracy in zip(cells, (0.8, 0.4, 0.6, 0.9), strict=True):
        result = {"scores": {"accuracy": accuracy}, "minutes": 1.0}
        (results / f"{cell.name}.json").write_text(json.dumps(result))
    write_study(cells, tmp_path / "study", tmp_path / "study.md", command="dpfl bench utility")
    text = (tmp_path / "study.md").read_text()
    assert [line.split(" | ")[3] for line in text.splitlines() if line.startswith(("| LoRA", "| ffa"))] == [
        "100.0 %",
        "50.0 %",
        "66.7 %",
        "100.0 %",
    ]


def test_the_command_runs_chosen_tables_and_names_what_is_wrong(raw_config: Raw, tmp_path: Path) -> None:
    file = grid_of(tmp_path, raw_config, {"title": "First"}, {"title": "Second", "set": {"privacy.epsilon": 3.0}})
    document = tmp_path / "mine.md"
    arguments = ["bench", "utility", str(file), "--out", str(tmp_path / "out"), "--document", str(document)]
    result = CliRunner().invoke(app, [*arguments, "--only", "Second"], catch_exceptions=False)
    assert result.exit_code == 0 and "1 of 1: Second" in result.output
    assert "## Second" in document.read_text() and "## First" not in document.read_text()

    file.write_text('[[block]]\ntitle = "x"\nrecipe = "newswire"\nset = { "privacy.epsilon" = 99.0 }\n')
    with pytest.raises(ConfigError, match=r"table 'x'.*\n.*weaker than this project stands for"):
        read_grid(file)
    file.write_text('[[block]]\ntitle = "x"\nrecip = "newswire"\n')
    with pytest.raises(ConfigError, match="recip"):
        read_grid(file)
    with pytest.raises(ConfigError, match="there is no recipe"):
        file.write_text('[[block]]\ntitle = "x"\nrecipe = "nothing"\n')
        read_grid(file)
    with pytest.raises(ConfigError, match="cannot read the study"):
        read_grid(tmp_path / "absent.toml")
    file.write_text("[[block")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_grid(file)
