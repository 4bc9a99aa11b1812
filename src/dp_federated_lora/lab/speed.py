"""How fast a machine is at what a run does: the short version of the scripts in benchmarks/, without other libraries.

The model has MiniLM's shape and random weights, which take the same time. Ratios are of medians of measurements in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from dp_federated_lora.aggregation import FEDAVG, FFA
from dp_federated_lora.aggregation.robust import RobustAggregator, Updates
from dp_federated_lora.data import Examples
from dp_federated_lora.federated import Client, Purpose, Request
from dp_federated_lora.lora import AdaptedModel, Task, adapt
from dp_federated_lora.privacy import (
    Budget,
    PrivacyPlan,
    PrivacyUnit,
    Released,
    SecureRandom,
    Trust,
    UnitId,
    clip_examples,
)
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import Learner, LocalSteps, example_gradients

CLASSES: Final = 8
BATCH_TOKENS: Final = 4096
STACK_TOKENS: Final = 1024
NOISE: Final = 2**20
UPDATES: Final = 200
UPDATE_SIZE: Final = 147_456  # LoRA r = 4 on q and v of RoBERTa base


class Figure(NamedTuple):
    """A measurement: what was measured, and the result with its unit."""

    what: str
    result: str


def speed_figures(*, repetitions: int = 5) -> Iterator[Figure]:
    """Measure this machine, one figure after the other: about a minute on two cores of 2023.

    Args:
        repetitions: of each measurement; their median counts.
    """
    cores, model = torch.get_num_threads(), minilm_shaped()
    torch.set_num_threads(1)
    try:
        rate = matrix_rate()
        yield Figure("float32 matrix products, one core", f"{rate / 1e9:.0f} Gflop/s")
        yield from _step(model, repetitions)
        yield from _round(model, cores, repetitions)
        yield from _server(repetitions)
    finally:
        torch.set_num_threads(cores)


def minilm_shaped(dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """MiniLM's shape with random weights; LoRA r = 8 on q and v, B not zero, so that every factor has a gradient."""
    from transformers import BertConfig, BertModel  # noqa: PLC0415  (seconds to import)

    shape: Any = BertConfig  # its stubs know no attn_implementation
    config = shape(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, attn_implementation="eager"
    )
    backbone: nn.Module = BertModel(config)
    backbone.eval().requires_grad_(False).to(dtype)
    targets = ["query", "value"]
    kind = Task.CLASSIFICATION
    model = adapt(backbone, task=kind, classes=CLASSES, rank=8, alpha=16.0, targets=targets, last_layers=None, seed=0)
    generator = torch.Generator().manual_seed(0)
    model.load({name: 0.02 * torch.randn(value.shape, generator=generator) for name, value in model.state().items()})
    return model


def random_examples(count: int, tokens: int, seed: int = 1) -> Examples:
    """Random tokens, all of one length, and random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20_000, (count, tokens), generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return Examples(tuple(map(tuple, ids.tolist())), tuple(labels.tolist()))


def random_clients(unit: PrivacyUnit, count: int, examples: int, tokens: int) -> list[Client]:
    """Clients with random examples: two local steps on all of them (unit = client), or every example sampled."""
    by_client = unit is PrivacyUnit.CLIENT
    plan = PrivacyPlan.calibrated(
        unit=unit,
        trust=Trust.CENTRAL,
        sites=1,
        budget=Budget(epsilon=8.0, delta=1e-5),
        population=count if by_client else count * examples,
        sampling_rate=1.0,
        rounds=10,
        clip_norm=1.0,
    )
    local = LocalSteps(steps=2, batch_size=examples, learning_rate=0.1) if by_client else None
    sets = [random_examples(examples, tokens, seed) for seed in range(count)]
    return [Client(f"client-{k}", own, plan, FEDAVG, local, own.subset(())) for k, own in enumerate(sets)]


def clock(device: torch.device) -> float:
    """Seconds: of the processor, or once the GPU has done what it was asked for."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations a second of large float32 matrix products on the threads that torch has, the best of twenty."""
    a, b, times = torch.ones(1024, 1024), torch.ones(1024, 1024), []
    for _ in range(20):
        start = clock()
        torch.mm(a, b)
        times.append(clock() - start)
    return 2 * 1024**3 / min(times)


def medians(
    works: Mapping[str, Callable[[], object]], repetitions: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each of `works`, called in turn, after a first call of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repetitions + 1):
        for name, work in works.items():
            start = clock()
            work()
            if number:
                times[name].append(clock() - start)
    return {name: statistics.median(measured) for name, measured in times.items()}


def _step(model: AdaptedModel, repetitions: int) -> Iterator[Figure]:
    examples = random_examples(8, 64)
    units = [UnitId(str(number)) for number in range(len(examples))]

    def without_privacy() -> tuple[Tensor, ...]:
        trained = model.train_only(FEDAVG.factors)
        losses = Learner(model, pad_id=0, batch_tokens=BATCH_TOKENS, last_layers=None).losses(examples, range(len(examples)))
        return torch.autograd.grad(losses.sum(), list(trained.values()))

    def private(of: AdaptedModel) -> None:
        learner = Learner(of, pad_id=0, batch_tokens=BATCH_TOKENS, last_layers=None)
        for rows, _ in example_gradients(learner, of.train_only(FEDAVG.factors), examples, units):
            clip_examples(rows, 1.0, units)

    half = minilm_shaped(torch.bfloat16)
    works = {"none": without_privacy, "dp": lambda: private(model), "half": lambda: private(half)}
    found = medians(works, repetitions)
    yield Figure("DP-SGD step, 8 examples x 64 tokens, one core", f"{1e3 * found['dp']:.0f} ms")
    yield Figure("  beside the step of PEFT without privacy", f"{found['dp'] / found['none']:.2f} x")
    yield Figure("  with frozen weights in bfloat16", f"{found['half'] / found['none']:.2f} x")


def _round(model: AdaptedModel, cores: int, repetitions: int) -> Iterator[Figure]:
    clients = random_clients(PrivacyUnit.CLIENT, 8 * cores, 4, 32)
    request = Request(Purpose.TRAINING, 1, clients[0].plan.content_id, model.state(), 1.0)

    def computed(threads: int, stack_tokens: int | None) -> Callable[[], None]:
        learner = Learner(model, pad_id=0, batch_tokens=BATCH_TOKENS, last_layers=None, threads=threads)
        engine = Simulator(clients, learner, stack_tokens=stack_tokens)

        def once() -> None:
            for _ in engine(request, range(len(clients)), SecureRandom.from_os()):
                pass

        return once

    found = medians(
        {"one": computed(1, None), "stacked": computed(1, STACK_TOKENS), "cores": computed(cores, None)}, max(1, repetitions // 2)
    )
    yield Figure("simulated clients, 2 steps on 4 examples x 32 tokens, one core", f"{len(clients) / found['one']:.1f} a second")
    yield Figure(f"  in stacks of {STACK_TOKENS:,} tokens", f"{len(clients) / found['stacked']:.1f} a second")
    yield Figure(f"  on all {cores} cores", f"{found['one'] / found['cores']:.2f} x one core")


def _server(repetitions: int) -> Iterator[Figure]:
    rng = SecureRandom.from_os()
    found = medians({"noise": lambda: rng.rounded_gaussian(2.0**22, NOISE)}, repetitions)
    yield Figure("Gaussian noise on a sum of a million coordinates", f"{1e3 * found['noise']:.0f} ms")
    generator = torch.Generator().manual_seed(1)
    drawn = iter([torch.randn(UPDATE_SIZE, generator=generator, dtype=torch.float64) for _ in range(2 * (repetitions + 1))])
    updates = Updates(FFA, torch.zeros(UPDATE_SIZE, dtype=torch.float64), UPDATES + 2 * (repetitions + 1))
    for _ in range(UPDATES):
        updates.add(Released(torch.randn(UPDATE_SIZE, generator=generator, dtype=torch.float64), 1.0, insecure=True))

    def arrival(rule: str, f: int) -> Callable[[], object]:
        aggregator = RobustAggregator(rule=rule, f=f, before=(), parameters={})

        def last() -> Tensor:
            updates.add(Released(next(drawn), 1.0, insecure=True))
            return aggregator(updates)

        return last

    found = medians({"mean": arrival("mean", 0), "multi_krum": arrival("multi_krum", UPDATES // 5)}, repetitions)
    yield Figure(f"last of {UPDATES} updates of {UPDATE_SIZE:,} to their mean", f"{1e3 * found['mean']:.0f} ms")
    yield Figure("  to Multi-Krum", f"{1e3 * found['multi_krum']:.0f} ms")
