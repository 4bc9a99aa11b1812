"""Ranks of participants' own, and methods that combine whole adapters, in rounds and runs."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_federated_lora import train
from dp_federated_lora.aggregation import METHODS, Sgd, components, truncated
from dp_federated_lora.errors import ConfigError, IncompatiblePlan, PrivacyError, RunInterrupted
from dp_federated_lora.federated import Client, Purpose, Request, RoundReport, Server, ServerState, handle, report
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench, participant_ranks
from dp_federated_lora.lora import Task, adapt
from dp_federated_lora.privacy import Ledger, Permit, PrivacyPlan, Released, SecureRandom
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.vector import Layout
from plans import a_plan
from saved import adapter, same, with_peft

Raw = dict[str, dict[str, object]]
RANKS = [{"clients": 1, "rank": 1}, {"clients": 3, "rank": 2}]


def local(raw: Raw, method: str) -> Raw:
    raw["method"] = {"name": method}
    raw["privacy"] |= {"trust": "local", "sampling_rate": 1.0}
    raw["federation"] = raw["federation"] | {"ranks": RANKS}
    return raw


def bench_of(raw: Raw) -> tuple[Workbench, PrivacyPlan, list[Client], dict[str, torch.Tensor]]:
    """With an adapter in which nothing is zero, so that everything has a gradient."""
    config = parse_config(raw, where="test")
    plan, bench = privacy_plan(config), Workbench.of(config)
    generator = torch.Generator().manual_seed(5)
    start = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in bench.model.state().items()}
    return bench, plan, bench.clients(plan), start


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureRandom, "rounded_gaussian", lambda self, sigma, n: torch.zeros(n, dtype=torch.int64).numpy())


def contribution(client: Client, request: Request, bench: Workbench, plan: PrivacyPlan, stream: SecureRandom) -> torch.Tensor:
    return handle(request, client, bench.learner, stream)._value.double() * plan.clip_norm / 2**22


def permit_of(path: Path, plan: PrivacyPlan, key: SecureRandom) -> Permit:
    ledger = Ledger.open(path / "l.sqlite", budget=plan.budget, owner="t")
    return ledger.reserve(plan.event, round=1, purpose="training", commitment=key.commitment)


@pytest.mark.parametrize(
    ("unit", "method"), [("client", "fedavg"), ("client", "rolora"), ("client", "fedsb"), ("example", "fedavg")]
)
def test_a_participant_of_lower_rank_trains_and_sends_its_components_and_no_others(
    request: pytest.FixtureRequest, tmp_path: Path, unit: str, method: str
):
    raw = local(request.getfixturevalue("client_config" if unit == "client" else "raw_config"), method)
    raw["training"] |= {"local_optimizer": "adamw"} if unit == "client" else {}
    bench, plan, clients, start = bench_of(raw)
    assert [client.rank for client in clients] == [1, 2, 2, 2]
    client = replace(max(clients, key=lambda c: len(c.examples)), rank=1)
    ask = Request(Purpose.TRAINING, 1, plan.content_id, start, plan.clip_norm)
    layout = Layout.of(bench.model.parameters(client.method.factors_in(1)))
    own = components(layout, 1)
    key = SecureRandom.insecure_from(3)
    permit, stream = permit_of(tmp_path, plan, key).divide(key, [client.name])[client.name]
    value = contribution(client, ask, bench, plan, stream)
    assert not value[~own].any()
    for name, part in layout.unflatten(value).items():
        assert part.any(), name
    sent = report(ask, client, bench.learner, permit, stream).value
    assert not sent[~own].any()
    assert (sent[own] != value[own]).float().mean() > 0.99  # its noise is on its own components
    whole = contribution(replace(client, rank=2), ask, bench, plan, stream)
    assert whole[~own].any()
    assert torch.equal(whole, contribution(replace(client, rank=None), ask, bench, plan, stream))


def test_the_noise_of_lower_ranks_is_that_of_what_they_send(client_config: Raw):
    bench, plan, _, _ = bench_of(local(client_config, "fedavg"))
    whole, _ = Server.of(bench.model, plan, bench.method, Sgd(1.0))
    server = replace(whole, ranks=participant_ranks(bench.config))
    # Query and value of two blocks of width 32; a head of three classes: per rank 4 x (32 + 32) coordinates.
    sizes = [3 * 33 + 4 * 64 * rank for rank in (1, 2, 2, 2)]
    expected = plan.mechanism.noise_multiplier * plan.clip_norm * math.sqrt(sum(sizes)) / plan.divisor
    assert server.noise_norm(1, plan.clip_norm) == pytest.approx(expected)
    assert whole.noise_norm(1, plan.clip_norm) == pytest.approx(plan.noise_norm(sizes[-1], plan.clip_norm))


@pytest.mark.parametrize(
    ("unit", "method"), [("client", "flora"), ("client", "fedex"), ("example", "flexlora"), ("client", "hetlora")]
)
def test_a_round_without_noise_is_the_method_on_what_each_participant_trained(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str, method: str
):
    raw = local(request.getfixturevalue("client_config" if unit == "client" else "raw_config"), method)
    bench, plan, clients, start = bench_of(raw)
    no_noise(monkeypatch)
    rate = 0.5
    server, state = Server.of(bench.model, plan, bench.method, Sgd(rate))
    server, state = replace(server, ranks=participant_ranks(bench.config), seed=4), replace(state, adapter=start)
    key = SecureRandom.insecure_from(9)
    permit, again = permit_of(tmp_path, plan, key), permit_of(tmp_path, plan, key)  # the second is for the streams
    after, norm = server.run_round(state, permit, Simulator(clients, bench.learner), key)
    ask = Request(Purpose.TRAINING, 1, plan.content_id, start, plan.clip_norm)
    streams = again.divide(key, [client.name for client in clients])
    expected, total = [], torch.zeros(server.layout.size, dtype=torch.float64)
    for client in clients:
        change = contribution(client, ask, bench, plan, streams[client.name][1])
        total += change
        # Its mean change: the expected number of its units is that of all over the number of participants.
        own, steps = truncated(start, client.rank or 0), server.layout.unflatten(rate * change * 4 / plan.divisor)
        expected.append(own | {name: (own[name].double() + step).float() for name, step in steps.items()})
    assert norm == pytest.approx(float(total.norm()) / plan.divisor)
    gather = METHODS[method].gather
    assert gather is not None
    wanted = gather(start, expected, 4 + 1)
    assert after.adapter.keys() == wanted.keys() == start.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(after.adapter[name], tensor, atol=1e-6), name
    changed = [name for name in start if not torch.equal(after.adapter[name], start[name])]
    assert len(changed) == len(start)


def test_single_adapters_are_never_combined_without_noise_of_their_own():
    class Nobody:
        names = ("a",)

        def __call__(self, *_: object) -> Iterator[object]:
            raise AssertionError("asked for contributions")

        reports = __call__

    server = Server(plan=a_plan(), method=METHODS["flora"], optimizer=Sgd(1.0), layout=Layout((("x.lora_A.y", (1, 4)),)))
    state = ServerState(0, {}, {}, 2.0)
    with pytest.raises(IncompatiblePlan, match='trust = "local"'):
        server.run_round(state, None, Nobody(), SecureRandom.insecure_from(0))  # type: ignore[arg-type]


def test_a_participant_that_does_not_report_is_not_counted_as_another(client_config: Raw, tmp_path: Path):
    bench, plan, clients, _ = bench_of(local(client_config, "hetlora"))

    class Losing(Simulator):  # type: ignore[misc]
        def reports(self, request: Request, sites: Mapping[str, tuple[Permit, SecureRandom]], *, size: int) -> Iterator[Released]:
            yield from list(super().reports(request, sites, size=size))[1:]

    server, state = Server.of(bench.model, plan, bench.method, Sgd(1.0))
    server = replace(server, ranks=participant_ranks(bench.config))
    key = SecureRandom.insecure_from(1)
    with pytest.raises(PrivacyError, match="3 reports of 4"):
        server.run_round(state, permit_of(tmp_path, plan, key), Losing(clients, bench.learner), key)


@pytest.mark.parametrize("target", ["c_attn", "c_proj"])  # GPT-2 keeps weights transposed; one is square
def test_increments_compute_the_same_as_the_components_that_they_become_on_disk(tmp_path: Path, target: str):
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        GPT2LMHeadModel(settings).save_pretrained(tmp_path / "base")

    def base() -> GPT2LMHeadModel:
        return GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval().requires_grad_(False)

    def adapted():
        return adapt(
            base(),
            task=Task.CAUSAL_LM,
            rank=2,
            alpha=6.0,
            targets=[target],
            last_layers=None,
            seed=0,
            increments=True,
        )

    model = adapted()
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in model.state().items()}
    ranked = next(name for name in state if "increment" in name)  # one of less than full rank: the others' components are padded
    state[ranked] = state[ranked][:, :1] @ state[ranked][:1]
    model.load(state)
    (tmp_path / "adapter").mkdir()
    model.save(tmp_path / "adapter", source="base")
    model.save(tmp_path / "adapter", source="base")  # saving changes nothing in the model
    again = adapted()
    again.load_saved(tmp_path / "adapter")
    plain = with_peft(base(), tmp_path / "adapter")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        ours, theirs = model.module(input_ids=ids).logits, plain(input_ids=ids).logits
        without = base()(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert float((ours - without).abs().max()) > 0.1
    for name, tensor in again.state().items():
        assert torch.allclose(tensor, state[name], atol=1e-6), name
    assert "components" in (tmp_path / "adapter" / "README.md").read_text()


def test_an_interrupted_run_resumes_with_what_its_rounds_merged_into_the_frozen_weights(client_config: Raw, tmp_path: Path):
    raw = local(client_config, "flora")
    raw["privacy"]["rounds"] = 2
    raw["run"]["insecure_seed"] = 2
    config = parse_config(raw, where="test")

    def stop(done: RoundReport) -> None:
        if done.round == 1:
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(config, out=tmp_path / "whole")
    with pytest.raises(RunInterrupted):
        train(config, out=tmp_path / "stopped", on_round=stop)
    train(resume=tmp_path / "stopped")
    assert same(adapter(whole.path), adapter(tmp_path / "stopped"))


@pytest.mark.parametrize("method", ["flora", "hetlora"])
def test_what_does_not_go_with_combined_adapters_or_ranks_is_refused_with_a_reason(client_config: Raw, method: str):
    raw = local(client_config, method)
    for section, change, message in (
        ("privacy", {"trust": "central"}, "secure aggregation protect alone"),
        ("privacy", {"sampling_rate": 0.5}, "whose coin says no has none"),
        ("privacy", {"shuffler": True}, "without privacy.groups, federation.ranks"),
        ("training", {"server_momentum": 0.9}, "no memory of earlier steps fits"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config(raw | {section: raw[section] | change}, where="test")
