"""Clients computed together send what each sends alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from devices import NEEDS_GPU
from dp_federated_lora import train
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.federated import Client, ClientMemory, Purpose, Request, handle, pieces
from dp_federated_lora.federated.client import batch_stream
from dp_federated_lora.federated.local_round import adapter_of, local_change, stacked_changes
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.lora import Factor
from dp_federated_lora.privacy import BoundedSum, SecureRandom
from dp_federated_lora.training.cohort import own_weights

Raw = dict[str, dict[str, object]]

KINDS: dict[str, Raw] = {
    "ffa": {},
    "fedavg": {"training": {"local_optimizer": "adamw", "local_learning_rate": 0.01, "local_proximal": 0.5}},
    "rolora": {},
    "lalora": {"training": {"local_steps": 3}},
    "fedask": {},
    "fedpower": {},
    "fedsb": {},
    "fedsa": {},
    "fedavg, SCAFFOLD": {"training": {"local_control": "scaffold"}},
    "fedavg, ranks": {"federation": {"ranks": [{"clients": 2, "rank": 2}, {"clients": 2, "rank": 1}]}},
}


def prepared(raw: Raw, kind: str, folder: Path, *, double: bool = True) -> tuple[Workbench, list[Client], Request]:
    """Four clients with unequal data, one without any, and a request of the second round at an adapter that is nowhere zero."""
    raw["method"] = {"name": kind.partition(",")[0]}
    for section, changes in KINDS[kind].items():
        raw[section] |= changes
    config = parse_config(raw, where="test")
    bench, plan, memory = Workbench.of(config), privacy_plan(config), ClientMemory(folder / "clients")
    clients = bench.clients(plan, memory)
    clients[2] = replace(clients[2], examples=clients[2].examples.subset([]))
    clients[3] = replace(clients[3], examples=clients[3].examples.subset(range(3)))
    memory.rewind([client.name for client in clients if client.keeps_state], 0)
    if double:
        bench.model.module.double()
    for client in clients:
        bench.learner.prepare(client.examples)
    generator = torch.Generator().manual_seed(3)
    start = {n: 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in bench.model.state().items()}
    sent = bench.model.parameters(bench.method.factors_in(2))
    control = {n: 0.1 * torch.ones_like(start[n]) for n in sent} if config.training.local_control else {}
    return bench, clients, Request(Purpose.TRAINING, 2, plan.content_id, start, 1.0, control=control)


def together(request: Request, clients: Sequence[Client], bench: Workbench) -> list[Tensor]:
    streams = [batch_stream(SecureRandom.insecure_from(number)) for number in range(len(clients))]
    local = clients[0].local
    assert local is not None
    return list(stacked_changes(request, clients, bench.learner, local, streams))


def alone(request: Request, clients: Sequence[Client], bench: Workbench) -> list[Tensor]:
    changes = []
    for number, client in enumerate(clients):
        bench.model.load(adapter_of(request, client))
        assert client.local is not None
        stream = batch_stream(SecureRandom.insecure_from(number))
        changes.append(local_change(request, client, bench.learner, client.local, stream))
    return changes


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stack_of_clients_changes_what_each_changes_alone(client_config: Raw, tmp_path: Path, kind: str):
    bench, clients, request = prepared(client_config, kind, tmp_path)
    sizes = [len(client.examples) for client in clients]
    assert sizes[2:] == [0, 3] and sizes[0] != sizes[1]
    found = together(request, clients, bench)
    kept = [dict(client.memory.before(client.name, 3)) for client in clients if client.keeps_state and client.memory]
    expected = alone(request, clients, bench)
    assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(found, expected, strict=True))
    assert [bool(change.any()) for change in found] == [True, True, False, True]
    again = [dict(client.memory.before(client.name, 3)) for client in clients if client.keeps_state and client.memory]
    for state, other in zip(kept, again, strict=True):
        assert state.keys() == other.keys()
        assert all(torch.allclose(state[name], other[name], atol=1e-12, rtol=0) for name in state)
    assert bool(kept) == (kind in ("fedsa", "fedavg, SCAFFOLD"))


@NEEDS_GPU
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_gpu_computes_what_the_cpu_computes(client_config: Raw, tmp_path: Path, kind: str):
    found = []
    for device in ("cpu", "cuda"):
        client_config["run"]["device"] = device
        (folder := tmp_path / device).mkdir()
        bench, clients, request = prepared(client_config, kind, folder)
        assert bench.model.device.type == device
        found.append([*alone(request, clients, bench), *together(request, clients, bench)])
        kept = [dict(client.memory.before(client.name, 3)) for client in clients if client.keeps_state and client.memory]
        found[-1] += [tensor for state in kept for _, tensor in sorted(state.items())]
    here, there = found
    assert all(tensor.device.type == "cpu" for tensor in there)
    assert all(torch.allclose(a, b, atol=1e-10, rtol=0) for a, b in zip(here, there, strict=True))
    assert here[0].any()


def test_clients_of_a_stack_use_the_frozen_model_once_a_step(client_config: Raw, tmp_path: Path):
    bench, clients, request = prepared(client_config, "ffa", tmp_path)
    passes: list[int] = []
    block = bench.model.module.get_submodule("backbone.base_model.model.encoder.layer.1")
    handle_ = block.register_forward_hook(lambda *_: passes.append(1))
    together(request, clients, bench)
    stacked, passes[:] = len(passes), []
    alone(request, clients, bench)
    handle_.remove()
    assert (stacked, len(passes)) == (2, 6)  # two local steps, of three clients with data


@pytest.mark.parametrize("unit", ["client", "example"])
def test_sums_are_those_of_the_loop_to_the_resolution_of_the_lattice(client_config: Raw, tmp_path: Path, unit: str):
    if unit == "example":
        client_config["privacy"] = {"unit": "example", "epsilon": 8.0, "sampling_rate": 0.5, "rounds": 3, "population": 120}
        del client_config["training"]["local_steps"]
        del client_config["training"]["local_batch_size"], client_config["training"]["local_learning_rate"]
        client_config["federation"] |= {"ranks": [{"clients": 2, "rank": 2}, {"clients": 2, "rank": 1}]}
    bench, clients, request = prepared(client_config, "ffa", tmp_path)
    size = sum(p.numel() for p in bench.model.parameters(bench.method.factors).values())
    sums = []
    stream = SecureRandom.insecure_from(7)
    for replies in (
        (handle(request, client, bench.learner, stream.derive(client.name)) for client in clients),
        (piece(bench.learner) for piece in pieces(request, clients, stream, stack_tokens=10**6, threads=1)),
        (piece(bench.learner) for piece in pieces(request, clients, stream, stack_tokens=1, threads=3)),
    ):
        sums.append(BoundedSum.merge(replies, size=size, clip_norm=clients[0].plan.sensitivity(1.0))._value)
    assert sums[0].any()
    assert all(int((other - sums[0]).abs().max()) <= 4 for other in sums[1:])  # towards zero, at most one for each client


def test_a_head_that_trains_alone_uses_kept_features_in_a_stack_too(client_config: Raw, tmp_path: Path, monkeypatch):
    client_config["training"] |= {"head_rounds": 2}
    bench, clients, request = prepared(client_config, "ffa", tmp_path, double=False)
    start = {name: value for name, value in request.adapter.items() if Factor.of(name) is Factor.HEAD}
    request = replace(request, adapter=bench.model.state() | start)
    expected = alone(request, clients, bench)
    monkeypatch.setattr(type(bench.model.module), "features", lambda *_, **__: pytest.fail("features were kept"))
    found = together(request, clients, bench)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert found[0].any()


def test_a_stacked_run_ends_where_the_loop_ends(client_config: Raw, tmp_path: Path):
    config = parse_config(client_config, where="test")
    config = config.model_copy(update={"run": config.run.model_copy(update={"insecure_seed": 3})})
    stacked = config.model_copy(update={"run": config.run.model_copy(update={"stack_tokens": 1024})})
    results = [train(each, out=tmp_path / name) for each, name in ((config, "loop"), (stacked, "stacked"))]
    assert results[0].epsilon == results[1].epsilon
    loop, other = (load_file(result.path / "adapter" / "adapter_model.safetensors") for result in results)
    assert all(torch.allclose(loop[name], other[name], atol=1e-5) for name in loop)


def test_another_plan_and_layers_that_cannot_be_told_apart_are_refused(client_config: Raw, tmp_path: Path):
    bench, clients, request = prepared(client_config, "ffa", tmp_path)
    with pytest.raises(IncompatiblePlan, match="agreed to plan"):
        other, rng = replace(request, plan_id="other"), SecureRandom.insecure_from(0)
        [piece(bench.learner) for piece in pieces(other, clients, rng, stack_tokens=9, threads=1)]
    module, head = bench.model.module, bench.model.module.get_submodule("head")
    stacks = {"head.weight": torch.zeros(2, 3, 32, dtype=torch.float64)}
    with (
        pytest.raises(IncompatiblePlan, match="saw 5 rows of 2 examples"),
        own_weights(module, stacks, torch.tensor([0, 1])),
    ):
        head(torch.zeros(5, 32, dtype=torch.float64))
    assert "forward" not in vars(head)
    with (
        pytest.raises(IncompatiblePlan, match=r"nn\.Linear"),
        own_weights(module, {"backbone.weight": torch.zeros(2, 1)}, torch.tensor([0, 1])),
    ):
        pass
