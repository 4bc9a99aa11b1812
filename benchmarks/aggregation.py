"""Robust rules: from the last update's arrival to the aggregate, and beside ByzFL.

    python benchmarks/aggregation.py [--updates 1000] [--size 147456] [--repetitions 3] [--byzfl 1]

The first table times what is left to do when the last update arrives, checks and inner products included: by the clock on two
threads, and as processor time on one, which other work on the machine disturbs less. The second is processor time on one
thread, updates already in memory, the implementations in turn; ByzFL gets a torch tensor, and for coordinate-wise rules also a
numpy array, for which it has other code. Medians of the repetitions; ratios are the numbers to compare between machines.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

from dp_federated_lora.aggregation import FFA
from dp_federated_lora.aggregation.robust import RobustAggregator, Updates
from dp_federated_lora.privacy import Released

ARRIVAL: tuple[tuple[str, tuple[str, ...], dict[str, object]], ...] = (
    ("mean", (), {}),
    ("krum", (), {}),
    ("multi_krum", (), {}),
    ("mean", ("nnm",), {}),
    ("multi_krum", ("nnm",), {}),
    ("geometric_median", (), {}),
    ("centered_clipping", (), {"tau": 300.0, "steps": 3}),
)
COORDINATEWISE = ("median", "trimmed_mean", "meamed")
BESIDE: tuple[tuple[str, dict[str, object], str, dict[str, object]], ...] = (
    ("median", {}, "Median", {}),
    ("trimmed_mean", {}, "TrMean", {"f": ...}),
    ("meamed", {}, "Meamed", {"f": ...}),
    ("krum", {}, "Krum", {"f": ...}),
    ("geometric_median", {"nu": 0.1, "steps": 3}, "GeometricMedian", {}),
    ("mean", {}, "Average", {}),
)


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


def peak() -> float:
    """Peak resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def byzfl() -> object:
    """ByzFL's rules without its first lines, which import torchvision and plotting."""
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        sys.exit("ByzFL is not installed: pip install --no-deps byzfl")
    sys.modules["byzfl"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("byzfl.aggregators.aggregators")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    for name, default in (("updates", 1000), ("size", 147_456), ("repetitions", 3), ("byzfl", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    n, d, f = options.updates, options.size, options.updates // 5
    generator = torch.Generator().manual_seed(1)

    def update() -> Released:
        return Released(torch.randn(d, generator=generator, dtype=torch.float64), 1.0, insecure=True)

    theirs = byzfl()
    arrivals = 2 * len(ARRIVAL) * options.repetitions
    updates = Updates(FFA, torch.zeros(d, dtype=torch.float64), n + arrivals)
    for _ in range(n - 1):
        updates.add(update())
    times: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(options.repetitions):
        for rule, before, parameters in ARRIVAL:
            aggregator = RobustAggregator(rule=rule, f=0 if rule == "mean" else f, before=before, parameters=parameters)
            sides = times.setdefault(" + ".join((*before, rule)), ([], []))
            for side, threads, clock in zip(sides, (2, 1), (time.perf_counter, time.process_time), strict=True):
                torch.set_num_threads(threads)
                last = update()
                side.append(seconds(lambda: (updates.add(last), aggregator(updates)), clock))  # noqa: B023
    print(f"{platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    print(f"n = {n} (and up to {arrivals} more), d = {d}, f = {f}\n", flush=True)
    print(f"{'after the last update, ms':32}{'clock, 2 threads':>18}{'processor, 1 thread':>22}")
    for label, sides in times.items():
        clocked, processor = (1e3 * statistics.median(side) for side in sides)
        print(f"{label:32}{clocked:18.0f}{processor:22.0f}", flush=True)
    print(f"peak memory {peak():.1f} GB\n")

    torch.set_num_threads(1)
    rows = updates.points().columns(slice(None))[:n]
    print(f"{'1 thread, s':20}{'ours':>8}{'ByzFL':>8}{'ratio':>8}{'ByzFL numpy':>14}{'ratio':>8}")
    for rule, parameters, name, arguments in BESIDE:
        aggregator = RobustAggregator(rule=rule, f=0 if rule == "mean" else f, parameters=parameters)
        peer = getattr(theirs, name)(**{key: f if value is ... else value for key, value in arguments.items()})
        columns: dict[str, list[float]] = {"ours": [], "torch": [], "numpy": []}
        for _ in range(options.byzfl):
            columns["ours"].append(seconds(lambda: aggregator(updates), time.process_time))  # noqa: B023
            columns["torch"].append(seconds(lambda: peer(rows), time.process_time))  # noqa: B023
            if rule in COORDINATEWISE:
                columns["numpy"].append(seconds(lambda: peer(rows.numpy()), time.process_time))  # noqa: B023
        ours, *others = (statistics.median(side) for side in columns.values() if side)
        print(f"{rule:20}{ours:8.2f}{others[0]:8.2f}{others[0] / ours:8.1f}", end="")
        print(f"{others[1]:14.2f}{others[1] / ours:8.1f}" if others[1:] else "", flush=True)
    print(f"peak memory {peak():.1f} GB")


if __name__ == "__main__":
    main()
