"""Score a finished run's adapter on data declared public."""

from __future__ import annotations

from pathlib import Path

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.training import evaluate_model


def evaluate(run: str | Path, *, data: str | None = None) -> dict[str, float]:
    """Accuracy and macro-F1, or loss and perplexity, of a run's adapter.

    The scores are exact, so they may only be computed on data that is public or declared non-private.

    Args:
        run: run directory.
        data: source of a table with the configured columns; default `[data] test`.

    Raises:
        ConfigError: if there is no test data.
        RunError: if there is no run.
        ModelError: if the run has no readable adapter yet.
    """
    directory = RunDirectory.existing(Path(run))
    bench = Workbench.of(directory.load_config())
    bench.model.load_saved(directory.adapter)
    examples = bench.test_examples(data)
    if examples is None:
        raise ConfigError(f"{run} has no [data] test; give --data with a public table")
    return evaluate_model(bench.learner, examples)
