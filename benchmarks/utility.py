"""Quality of federated DP, centralised DP, centralised non-private LoRA and a DP linear probe, side by side.

    python benchmarks/utility.py                       # both data sets, all rows: hours on two cores
    python benchmarks/utility.py --data newswire --rows probe federated
    python benchmarks/utility.py --table-only          # the table again, from results measured earlier

Every row is scored on the same declared-public test table. A result is one JSON file under runs/utility; the table is written
to docs/utility.md from whatever results exist. Studies of many cells: `dpfl bench utility`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from dp_federated_lora import Config, load_config, train
from dp_federated_lora.data import Examples
from dp_federated_lora.lab.recipes import recipe_text
from dp_federated_lora.lab.study.baselines import BASELINES
from dp_federated_lora.lab.workbench import Workbench

RESULTS = Path("runs/utility")
TABLE = Path("docs/utility.md")
SIZES = {"newswire": 5485, "newsgroups": 11293}  # public facts of these public tables, for the centralised example unit


def configuration(data: str, *overrides: str, local_steps: bool = True) -> Config:
    """The recipe with changes; without its local steps where the unit becomes the example."""
    lines = [line for line in recipe_text(data).splitlines() if local_steps or not line.startswith("local_")]
    path = RESULTS / f"{data}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_config(path, overrides=overrides)


def trained(config: Config, name: str) -> dict[str, float]:
    """Test scores of a run of `dpfl train`."""
    out = RESULTS / "run" / name
    shutil.rmtree(out, ignore_errors=True)
    result = train(
        config, out=out, on_round=lambda report: print(f"  {name} round {report.round}", dict(report.public_metrics), flush=True)
    )
    return {**result.metrics, "epsilon": result.epsilon}


def federated(data: str, epsilon: float, seed: int) -> dict[str, float]:
    """The recipe as it is."""
    return trained(configuration(data, f"privacy.epsilon={epsilon}", f"run.seed={seed}"), f"{data}-federated-{epsilon}-{seed}")


def centralised(data: str, epsilon: float, seed: int) -> dict[str, float]:
    """One participant holds everything; every example protected."""
    changes = ["federation.clients=1", 'federation.partition="iid"', f"run.seed={seed}", f"privacy.epsilon={epsilon}"]
    raw = configuration("newswire")
    if data != "newswire":  # the example-unit optimisation of the newswire recipe, on this data
        training = raw.training
        changes += [
            'privacy.unit="example"',
            f"privacy.population={SIZES[data]}",
            *(f"privacy.{key}={getattr(raw.privacy, key)}" for key in ("clip_norm", "sampling_rate", "rounds")),
            *(f"training.{key}={getattr(training, key)}" for key in ("server_learning_rate", "head_rounds")),
            f"training.server_head_learning_rate={training.server_head_learning_rate or training.server_learning_rate}",
        ]
    return trained(configuration(data, *changes, local_steps=False), f"{data}-centralised-{epsilon}-{seed}")


def not_private(data: str, epsilon: float, seed: int) -> dict[str, float]:
    """Both factors and the head, without privacy; the same model, targets and texts."""
    del epsilon
    bench, examples, test = loaded(data, seed)
    untrained = bench.model.state()
    scores = BASELINES["not-private"](bench, examples, test, seed)
    bench.model.load(untrained)
    return dict(scores)


def probe(data: str, epsilon: float, seed: int) -> dict[str, float]:
    """DP-SGD on a linear layer over frozen features."""
    bench, examples, test = loaded(data, seed)
    private = bench.config.privacy.model_copy(update={"epsilon": epsilon})
    bench = replace(bench, config=bench.config.model_copy(update={"privacy": private}))
    return dict(BASELINES["probe"](bench, examples, test, seed))


@cache
def loaded(data: str, seed: int) -> tuple[Workbench, Examples, Examples]:
    """Model, the whole training table and the test table; what never changes is computed once for all rows."""
    bench = Workbench.of(configuration(data, f"run.seed={seed}"))
    whole, test = bench.tokenize(bench.training_table()), bench.test_examples()
    if test is None:
        raise SystemExit(f"the {data} recipe has no test table")
    for examples in (whole, test):
        bench.learner.prepare(examples)
    return bench, whole, test


ROWS: dict[str, tuple[str, Callable[[str, float, int], dict[str, float]]]] = {
    "probe": ("DP linear probe, every example protected", probe),
    "not-private": ("Centralised LoRA, not private", not_private),
    "centralised": ("Centralised DP-LoRA, every example protected", centralised),
    "federated": ("Federated DP-LoRA (the recipe)", federated),
}


def write_table() -> None:
    """docs/utility.md from all results."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    lines = [
        "# Utility",
        "",
        "Written by `python benchmarks/utility.py`. Test accuracy and macro-F1 in per cent, mean over seeds (and range);",
        "epsilon at delta = 1e-5. The probe takes the best of four learning rates on the test table.",
        "",
        "| Data | Training | Epsilon | Accuracy | Macro-F1 | Accuracy kept of non-private LoRA | Seeds | Minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in SIZES:
        anchor = [r["accuracy"] for r in results if r["data"] == data and r["row"] == "not-private"]
        for row, (title, _) in ROWS.items():
            for epsilon in sorted({r["epsilon_target"] for r in results if r["data"] == data and r["row"] == row}, reverse=True):
                some = [r for r in results if (r["data"], r["row"], r["epsilon_target"]) == (data, row, epsilon)]
                accuracy = [100 * r["accuracy"] for r in some]
                kept = f"{statistics.mean(accuracy) / statistics.mean(anchor):.1f} %" if anchor else "not measured"
                shown = "none" if row == "not-private" else f"{epsilon:g}"
                minutes = statistics.median(r["minutes"] for r in some)
                cells = [data, title, shown, _spread(accuracy), _spread([100 * r["macro_f1"] for r in some]), kept]
                lines.append("| " + " | ".join([*cells, str(len(some)), f"{minutes:.0f}"]) + " |")
    lines += [
        "",
        f"Machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}.",
        "",
    ]
    TABLE.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Measure what is asked for, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--epsilon", nargs="+", type=float, default=[8.0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for data in options.data if not options.table_only else ():
        for row in options.rows:
            for epsilon in options.epsilon[:1] if row == "not-private" else options.epsilon:
                for seed in range(options.seeds):
                    start = time.monotonic()
                    scores = ROWS[row][1](data, epsilon, seed)
                    result = {"data": data, "row": row, "epsilon_target": epsilon, "seed": seed, **scores}
                    result["minutes"] = (time.monotonic() - start) / 60
                    (RESULTS / f"{data}-{row}-{epsilon}-{seed}.json").write_text(json.dumps(result))
                    print(result, flush=True)
    write_table()


if __name__ == "__main__":
    main()
