"""Samples a second of the integer noise samplers, beside numpy's floating-point normal, on one core.

    python benchmarks/noise.py

Processor time; the samplers alternate and the median of their repetitions counts, since other work on the machine slows some of
them. Ratios to numpy are the numbers to compare between machines. The first call, shown apart, builds the table of a sampler.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from dp_federated_lora.privacy import SecureRandom
from dp_federated_lora.secagg.integer_noise import discrete_gaussian, draw, skellam

SAMPLES = 2**20
REPETITIONS = 15
STANDARD_DEVIATIONS = (100.0, 1_000.0, 20_000.0)


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call; every sampler runs on one core."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print the table."""
    rng = SecureRandom.from_os()
    normal = np.random.default_rng().standard_normal  # noqa: TID251, the yardstick; never used for noise
    samplers: dict[str, Callable[[], object]] = {"numpy normal": lambda: normal(SAMPLES)}
    for std in STANDARD_DEVIATIONS:
        samplers[f"discrete Gaussian, std {std:,.0f}"] = lambda std=std: draw(discrete_gaussian, std, SAMPLES, rng)
        samplers[f"Skellam, std {std:,.0f}"] = lambda std=std: draw(skellam, std, SAMPLES, rng)
    samplers["rounded Gaussian, std 2^22"] = lambda: rng.rounded_gaussian(2.0**22, SAMPLES)
    first = {name: seconds(work) for name, work in samplers.items()}
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(REPETITIONS):
        for name, work in samplers.items():
            times[name].append(seconds(work))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'sampler':32}{'million/s':>10}{'of numpy':>10}{'first call, s':>15}")
    for name, median in medians.items():
        print(f"{name:32}{SAMPLES / median / 1e6:10.1f}{medians['numpy normal'] / median:10.2f}{first[name]:15.2f}")


if __name__ == "__main__":
    main()
