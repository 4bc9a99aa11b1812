"""The results of a study as a document: one table per block, and plots of score against epsilon."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from scipy.stats import norm as normal
from scipy.stats import t as student

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.plans import private_evaluation
from dp_federated_lora.lab.study.grid import Cell
from dp_federated_lora.lab.study.runner import RESULTS

_EPSILON: Final = "privacy.epsilon"
_SCORES: Final = {"accuracy": "Accuracy", "macro_f1": "Macro-F1", "loss": "Loss"}


@final
@dataclass(frozen=True, slots=True)
class Row:
    """All results of one combination of settings.

    Args:
        cell: one of its cells.
        results: as `run_study` wrote them.
    """

    cell: Cell
    results: Sequence[dict[str, Any]]

    @property
    def label(self) -> str:
        """What it is, budget aside."""
        if self.cell.baseline:
            return {"probe": "DP linear probe", "not-private": "LoRA, not private"}[self.cell.baseline]
        varied = {key: value for key, value in self.cell.settings.items() if key != _EPSILON}
        method = varied.pop("method.name", self.cell.config.method.name)
        return ", ".join([str(method), *(f"{key.rpartition('.')[2]} {value}" for key, value in varied.items())])

    def interval(self, score: str) -> tuple[float, float]:
        """Mean of a score, and half the width of its 95 % interval (Student's t; of one repeat by its own noise, or nan)."""
        values = [result["scores"][score] for result in self.results]
        if len(values) < 2:
            return values[0], self._noise(score)
        width = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
        return statistics.mean(values), width

    def _noise(self, score: str) -> float:
        """Half the width of a 95 % interval by the noise of a private evaluation alone, to first order; nan without one."""
        evaluation = None if self.cell.baseline else private_evaluation(self.cell.config)
        if evaluation is None:
            return math.nan
        found = self.results[0]["scores"]
        unit = evaluation.loss_cap if score == "loss" else 1.0  # what one unit adds at most to the sum
        of_ratio: float = math.hypot(unit, found[score]) * evaluation.BOUND * evaluation.noise_multiplier / found["units"]
        return float(normal.ppf(0.975)) * of_ratio


def write_study(cells: Sequence[Cell], folder: Path, document: Path, *, command: str) -> None:
    """Write `document` (Markdown) and its plots beside it, from the results in `folder`; cells without one are counted.

    Args:
        cells: from `read_grid`.
        folder: as `run_study`.
        document: the file; plots are called after it.
        command: how it was made, for its first line.

    Raises:
        ConfigError: if nothing has been measured, or matplotlib is not installed.
    """
    found = {cell.name: folder / RESULTS / f"{cell.name}.json" for cell in cells}
    results = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}
    if not results:
        raise ConfigError(f"{folder} has no results yet; run the study first")
    missing = len(found) - len(results)
    lines = [
        f"# {document.stem.capitalize()}",
        "",
        f"Written by `{command}`. Test scores in per cent: mean over repeats, and half the width of a 95 %",
        "interval (Student's t). Repeats differ in noise and samples; partition and frozen factors are those of one public seed.",
        "Epsilon is at delta = 1e-5. The probe takes the best of four learning rates on the test table.",
        "Where no test data are public, scores are of what participants hold out: noised, or exact without privacy; the interval",
        "of a single noised score is that of its own noise.",
        *([f"{missing} of {len(found)} runs are not made yet: their rows are missing or have fewer repeats."] if missing else []),
    ]
    anchors = _anchors(cells, results)
    for title in dict.fromkeys(cell.block for cell in cells):
        rows = _rows([cell for cell in cells if cell.block == title], results)
        if rows:
            lines += ["", f"## {title}", "", *_table(rows, anchors.get(_kind(rows[0].cell))), *_plot(title, rows, document)]
    threads = torch.get_num_threads()
    lines += ["", f"Machine: {platform.processor() or platform.machine()}, {threads} threads, torch {torch.__version__}.", ""]
    document.write_text("\n".join(lines), encoding="utf-8")


def _rows(cells: Sequence[Cell], results: dict[str, Any]) -> list[Row]:
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.name in results:
            groups.setdefault(repr((cell.baseline, cell.settings)), []).append(cell)
    return [Row(group[0], [results[cell.name] for cell in group]) for group in groups.values()]


def _kind(cell: Cell) -> tuple[str, int]:
    """What cells share with the training without privacy that they are compared with: recipe and length of examples."""
    return cell.recipe, cell.config.model.max_tokens


def _anchors(cells: Sequence[Cell], results: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Accuracy of training without privacy, by kind."""
    whole = [cell for cell in cells if cell.baseline == "not-private"]
    rows = [row for kind in {*map(_kind, whole)} for row in _rows([cell for cell in whole if _kind(cell) == kind], results)]
    return {_kind(row.cell): row.interval("accuracy")[0] for row in rows}


def _table(rows: Sequence[Row], anchor: float | None) -> list[str]:
    scores = [score for score in _SCORES if score in rows[0].results[0]["scores"]]
    titles = [
        "Training",
        "Epsilon",
        *(_SCORES[s] for s in scores),
        "Kept of not private",
        "Bytes per participant and round",
        "Repeats",
        "Minutes",
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in rows:
        values = [_in_words(*row.interval(score), score) for score in scores]
        kept = "" if anchor is None or "accuracy" not in scores else f"{100 * row.interval('accuracy')[0] / anchor:.1f} %"
        epsilon = "none" if row.cell.baseline == "not-private" else f"{row.cell.config.privacy.epsilon:g}"
        size = row.results[0]["scores"].get("bytes_per_client")
        sent = "" if size is None else f"{size:,}"
        minutes = f"{statistics.median(result['minutes'] for result in row.results):.1f}"
        lines.append("| " + " | ".join([row.label, epsilon, *values, kept, sent, str(len(row.results)), minutes]) + " |")
    return lines


def _in_words(mean: float, width: float, score: str) -> str:
    scale, digits = (1.0, 3) if score == "loss" else (100.0, 1)
    return f"{scale * mean:.{digits}f}" + ("" if math.isnan(width) else f" ± {scale * width:.{digits}f}")


def _plot(title: str, rows: Sequence[Row], document: Path) -> list[str]:
    """Accuracy against epsilon, one line per label, where a block varies epsilon."""
    if len({row.cell.config.privacy.epsilon for row in rows}) < 2 or "accuracy" not in rows[0].results[0]["scores"]:
        return []
    try:
        import matplotlib as mpl  # noqa: PLC0415  (an optional dependency)
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'dp-federated-lora-lab[bench]'") from error
    mpl.rcParams["svg.hashsalt"] = title  # the same results give the same file
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot(xlabel="epsilon", ylabel="test accuracy (%)", xscale="log", title=title)
    for label in dict.fromkeys(row.label for row in rows):
        line = sorted((row for row in rows if row.label == label), key=lambda row: row.cell.config.privacy.epsilon)
        means, widths = zip(*(row.interval("accuracy") for row in line), strict=True)
        epsilons = [row.cell.config.privacy.epsilon for row in line]
        bars = [0.0 if math.isnan(width) else 100 * width for width in widths]
        axes.errorbar(epsilons, [100 * mean for mean in means], yerr=bars, label=label, marker="o", capsize=3)
    ticks = sorted({row.cell.config.privacy.epsilon for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    words = "".join(c if c.isalnum() else " " for c in title.lower()).split()
    picture = document.with_name(f"{document.stem}-{'-'.join(words)}.svg")
    figure.savefig(picture, metadata={"Date": None})
    return ["", f"![{title}]({picture.name})"]
