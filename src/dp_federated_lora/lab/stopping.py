"""When a run ends before its last round: once its released or public scores stop improving."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dp_federated_lora.federated import RoundReport
from dp_federated_lora.lab.config import Config


def reason_to_stop(config: Config, reports: Sequence[RoundReport]) -> str | None:
    """Why `[training] patience` ends a run after these rounds; None to go on.

    The decision follows from what was released, so it costs nothing beyond the planned rounds (`PrivacyPlan.claimed`), and from
    `metrics.jsonl` alone, so a resumed run comes to the same one. Scores on participants' data come before public test data,
    which is then left for the final score.
    """
    patience, private = config.training.patience, config.evaluation is not None
    if patience is None:
        return None
    metric, sign = ("accuracy", 1.0) if config.model.task == "classification" else ("loss", -1.0)
    found = [(r.round, r.private_metrics if private else r.public_metrics) for r in reports]
    scores = [(sign * values[metric], number) for number, values in found if math.isfinite(values.get(metric, math.nan))]
    if not scores:
        return None
    best, number = max(scores, key=lambda pair: pair[0])  # the first of equals: to repeat a score is no gain
    if sum(later > number for _, later in scores) < patience:
        return None
    source = "held-out" if private else "public"
    return f"no gain in {source} {metric} in {patience} evaluations: best {sign * best:.4f} after round {number}"
