"""Clients of a simulated round computed one after the other and in stacks.

    python benchmarks/cohort.py [--repetitions 5] [--clients 64] [--device cuda]

A client takes two local steps with fresh factors of its own and its change is clipped (unit = client), or its examples' gradients
are (unit = example, every example sampled). A model of MiniLM's shape, LoRA r = 8 on q and v. Processor time of one thread,
on a GPU the clock's; engines in turn, medians; the ratio to the loop is the number to compare between machines.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from typing import Final, NamedTuple

import torch

from dp_federated_lora.federated import Purpose, Request
from dp_federated_lora.lab.speed import BATCH_TOKENS, clock, minilm_shaped, random_clients
from dp_federated_lora.privacy import PrivacyUnit, SecureRandom
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import Learner

STACKS: Final = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 8192, 65_536)}


class Row(NamedTuple):
    """What a client has to do: the privacy unit, examples of a step, and tokens of each."""

    unit: PrivacyUnit
    examples: int
    tokens: int


ROWS: Final = (
    Row(PrivacyUnit.CLIENT, 1, 32),
    Row(PrivacyUnit.CLIENT, 2, 32),
    Row(PrivacyUnit.EXAMPLE, 2, 32),
    Row(PrivacyUnit.CLIENT, 8, 64),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, stacks = options.device, STACKS[options.device.type]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, one thread, processor time"
    print(f"{where}, torch {torch.__version__}, {options.clients} clients, {options.repetitions} repetitions")
    print(f"{'unit':10}{'examples x tokens':20}{'stack':>8}{'ms a client':>14}{'of the loop':>14}")
    model = minilm_shaped()
    model.module.to(device)
    learner = Learner(model, pad_id=0, batch_tokens=max(BATCH_TOKENS, *stacks), last_layers=None)
    for row in ROWS:
        clients, times = random_clients(row.unit, options.clients, row.examples, row.tokens), dict[int | None, list[float]]()
        request = Request(Purpose.TRAINING, 1, clients[0].plan.content_id, model.state(), 1.0)
        engines = {size: Simulator(clients, learner, stack_tokens=size) for size in (None, *stacks)}
        for _ in range(options.repetitions):
            for size, engine in engines.items():
                start = clock(device)
                for _ in engine(request, range(len(clients)), SecureRandom.from_os()):
                    pass
                times.setdefault(size, []).append(clock(device) - start)
        loop = statistics.median(times[None])
        for size, measured in times.items():
            median = statistics.median(measured)
            label = f"{row.unit.value:10}{f'{row.examples} x {row.tokens}':20}{size or 'loop':>8}"
            print(f"{label}{1e3 * median / len(clients):14.1f}{median / loop:14.2f}", flush=True)


if __name__ == "__main__":
    main()
