"""Running the cells of a study: what is finished is kept, what cells share is computed once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, final

from torch import Tensor

from dp_federated_lora.aggregation import METHODS
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import ConfigError
from dp_federated_lora.files import write_durably
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.run import Run
from dp_federated_lora.lab.study.baselines import BASELINES
from dp_federated_lora.lab.study.grid import Cell
from dp_federated_lora.lab.workbench import Workbench, linear_method
from dp_federated_lora.lora import Factor
from dp_federated_lora.monitoring.metrics import read_metrics

RESULTS: Final = "results"
CACHE: Final = "cache"


@final
class SharedBench:
    """One model with its prepared examples for all cells that differ in neither; `cache` keeps those of an earlier start."""

    def __init__(self, cache: Path) -> None:
        self._cache = str(cache)
        self._key: object = None
        self._bench: Workbench | None = None
        self._start: dict[str, Tensor] = {}

    def of(self, config: Config) -> Workbench:
        """The model at its start, for `config`."""
        key = bench_key(config)
        if self._bench is None or key != self._key:
            self._bench = None  # its prepared states may fill the memory
            kept = config.run.model_copy(update={"cache": self._cache})
            self._bench, self._key = Workbench.of(config.model_copy(update={"run": kept})), key
            if (test := self._bench.test_examples()) is not None:
                self._bench.learner.prepare(test)  # every cell is scored on all of it
            self._start = self._bench.model.state()
        bench = replace(self._bench, config=config, method=linear_method(config))
        bench.model.load(self._start)
        bench.start_head()
        return bench


def bench_key(config: Config) -> str:
    """What decides model and prepared examples."""
    method = METHODS[config.method.name]
    layers = (Factor.CORE in method.factors, Factor.INCREMENT in method.settles)
    training, run = config.training, config.run
    head_alone = training.head_rounds > 0
    return repr((layers, head_alone, config.model, config.lora, config.data, training.batch_tokens, run.seed, run.threads))


def run_study(cells: Sequence[Cell], folder: Path, *, on_cell: Callable[[Cell, int, int], None] = lambda *_: None) -> None:
    """Run the cells that have no result in `folder` yet; each result is one JSON file, written when its cell is done.

    Args:
        cells: from `read_grid`.
        folder: where runs and results go.
        on_cell: called before each cell with its number, 0-based, and the number of cells that are left to run.

    Raises:
        ConfigError: if a baseline has nothing to be scored on.
    """
    shared = SharedBench(folder / CACHE)
    open_cells = {cell.name: cell for cell in cells if not (folder / RESULTS / f"{cell.name}.json").exists()}
    # By repeat within a model, so that a study that is stopped early has a little of everything.
    for number, cell in enumerate(sorted(open_cells.values(), key=lambda cell: (bench_key(cell.config), cell.repeat))):
        on_cell(cell, number, len(open_cells))
        bench, start = shared.of(cell.config), time.monotonic()
        scores = _measured(cell, bench, folder / "runs" / cell.name)
        minutes = (time.monotonic() - start) / 60
        result = {"recipe": cell.recipe, "baseline": cell.baseline, "scores": scores, "minutes": minutes}
        target = folder / RESULTS / f"{cell.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, (json.dumps(result, indent=2) + "\n").encode())


def _measured(cell: Cell, bench: Workbench, out: Path) -> dict[str, float]:
    if cell.baseline is None:
        shutil.rmtree(out, ignore_errors=True)  # of a cell that was interrupted
        with RunDirectory.create(out, cell.config) as directory:
            run = Run(directory, bench=bench)
            run.train()
            result = run.write_results()
            (*_, last) = read_metrics(directory.metrics)
        bytes_sent = last["bytes_per_client"]
        return {**last["private_metrics"], **result.metrics, "epsilon": result.epsilon, "bytes_per_client": bytes_sent}
    whole, test = bench.tokenize(bench.training_table()), bench.test_examples()
    if test is None:
        whole, test = _held_out(cell, whole)
    return dict(BASELINES[cell.baseline](bench, whole, test, cell.repeat))


def _held_out(cell: Cell, whole: Examples) -> tuple[Examples, Examples]:
    """What to train a baseline on and to score it on, where no test data are public: as participants hold examples out."""
    evaluation = cell.config.evaluation
    if evaluation is None:
        raise ConfigError(f"the recipe {cell.recipe} has neither test data nor [evaluation]; a baseline cannot be scored")
    return whole.split(evaluation.holdout, cell.config.run.seed)
