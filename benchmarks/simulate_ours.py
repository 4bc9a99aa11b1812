"""One round of this project's `Simulator`, for simulate.py."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from simulate_work import (
    ALPHA,
    CLASSES,
    CLIP_NORM,
    LEARNING_RATE,
    RANK,
    STEPS,
    TARGETS,
    WARM_UP,
    Work,
    arguments,
    tell,
)
from torch import Tensor

from dp_federated_lora.aggregation import FEDAVG, Sgd
from dp_federated_lora.data import Examples
from dp_federated_lora.federated import Client, Purpose, Request, Server
from dp_federated_lora.lora import AdaptedModel, Task, adapt, load_backbone
from dp_federated_lora.privacy import BoundedSum, Budget, Ledger, PrivacyPlan, PrivacyUnit, SecureRandom
from dp_federated_lora.privacy.clipping import resolution
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import Learner, LocalSteps


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """The adapted encoder, with frozen weights of that type."""
    return adapt(
        load_backbone(folder, Task.CLASSIFICATION, dtype=dtype),
        task=Task.CLASSIFICATION,
        classes=CLASSES,
        rank=RANK,
        alpha=ALPHA,
        targets=TARGETS,
        last_layers=None,
        seed=0,
    )


def plan_of(clients: int) -> PrivacyPlan:
    """Ten rounds of all clients at epsilon 8."""
    return PrivacyPlan.calibrated(
        unit=PrivacyUnit.CLIENT,
        budget=Budget(epsilon=8.0, delta=1e-5),
        population=clients,
        sampling_rate=1.0,
        rounds=10,
        clip_norm=CLIP_NORM,
    )


def clients_of(work: Work, plan: PrivacyPlan, count: int) -> list[Client]:
    """Participants; those with the same data share it."""
    local = LocalSteps(steps=STEPS, batch_size=work.examples, learning_rate=LEARNING_RATE)
    pairs = [work.of(number) for number in range(min(count, len(work.tokens)))]
    data = [Examples(tuple(map(tuple, tokens.tolist())), tuple(labels.tolist())) for tokens, labels in pairs]
    nobody = data[0].subset(())
    return [Client(f"client-{number}", data[number % len(data)], plan, FEDAVG, local, nobody) for number in range(count)]


def private_round(model: AdaptedModel, engine: Simulator, plan: PrivacyPlan) -> dict[str, Tensor]:
    """Charge the ledger, compute, add noise, step; the noised mean update by name."""
    server, state = Server.of(model, plan, FEDAVG, Sgd(1.0))
    with TemporaryDirectory() as folder:
        ledger = Ledger.open(Path(folder) / "ledger.sqlite", budget=plan.budget, owner="benchmark")
        key = SecureRandom.from_os()
        permit = server.reserve(state, ledger, key)
        following, _ = server.run_round(state, permit, engine, key)
        ledger.commit(permit.serial)
    return {name: following.adapter[name] - start for name, start in state.adapter.items()}


def open_round(model: AdaptedModel, engine: Simulator, plan: PrivacyPlan) -> dict[str, Tensor]:
    """The mean update that the noise would be added to, which no run ever shows."""
    server, state = Server.of(model, plan, FEDAVG, Sgd(1.0))
    request = Request(Purpose.TRAINING, 1, plan.content_id, state.adapter, CLIP_NORM)
    sums = engine(request, range(len(engine.clients)), SecureRandom.from_os())
    total = BoundedSum.merge(sums, size=server.layout.size, clip_norm=CLIP_NORM)
    return server.layout.unflatten(total._value * resolution(CLIP_NORM) / plan.divisor)


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """A warm-up of few clients, then the round that counts."""
    options = arguments(__doc__)
    work = Work.load(options.work)
    model = model_of(options.model, torch.bfloat16 if options.bfloat16 else torch.float32)
    model.load(work.adapter)
    learner = Learner(model, pad_id=0, batch_tokens=4096, last_layers=None, threads=options.cores)
    torch.set_num_threads(options.cores)
    run: Callable[[AdaptedModel, Simulator, PrivacyPlan], dict[str, Tensor]] = private_round if options.noise else open_round
    before = peak()
    for count in (min(WARM_UP, options.clients), options.clients):
        plan = plan_of(count)
        engine = Simulator(clients_of(work, plan, count), learner, stack_tokens=options.stack)
        start, processor = time.perf_counter(), time.process_time()
        update = run(model, engine, plan)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    tell(options, "dp-federated-lora-lab", seconds, update, processor=processor, peak=peak(), increase=peak() - before)


if __name__ == "__main__":
    main()
