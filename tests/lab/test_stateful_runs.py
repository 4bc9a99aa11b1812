"""Runs whose clients keep state: the same to the bit after a crash, stopped where state is lost, personal where it should be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dp_federated_lora.lab.run as lab
from dp_federated_lora import evaluate, train
from dp_federated_lora.audit import Transcript, compare
from dp_federated_lora.cli.main import app
from dp_federated_lora.errors import CheckpointError, ConfigError, RunError
from dp_federated_lora.federated import Client, ClientMemory, Purpose, Request, handle
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.personal import personal_adapter
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.lora import Factor
from dp_federated_lora.privacy import Ledger, SecureRandom
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import example_scores
from saved import adapter, same

Raw = dict[str, dict[str, object]]
KINDS = {
    "fedsa": {"method": {"name": "fedsa"}, "training": {"local_steps": 3}},
    "scaffold": {"method": {"name": "rolora"}, "training": {"local_control": "scaffold", "local_schedule": "cosine"}},
}


def configured(raw: Raw, kind: str, **run: object) -> Config:
    raw["method"] = dict(KINDS[kind]["method"])
    raw["training"] |= KINDS[kind]["training"]
    raw["run"] |= run
    return parse_config(raw, where="test")


def prepared(config: Config, folder: Path) -> tuple[Workbench, list[Client], ClientMemory]:
    bench, memory = Workbench.of(config), ClientMemory(folder / "clients")
    clients = bench.clients(privacy_plan(config), memory)
    memory.rewind([client.name for client in clients], 0)
    return bench, clients, memory


def with_a_head(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with a head that passes gradients down."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(t.shape, generator=generator) if Factor.of(n) is Factor.HEAD else t for n, t in state.items()}


def training(config: Config, number: int, state: dict[str, torch.Tensor]) -> Request:
    plan = privacy_plan(config)
    return Request(Purpose.TRAINING, number, plan.content_id, state, plan.clip_norm)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_killed_after_its_clients_wrote_their_state_resumes_to_the_same_adapter_and_state(
    client_config: Raw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    client_config["privacy"] |= {"sampling_rate": 0.7, "rounds": 2}
    config = configured(client_config, kind, insecure_seed=5)
    whole = train(config, out=tmp_path / "whole").path
    write, calls = lab.write_checkpoint, []

    def dying(*args: object, **kwargs: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        write(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lab, "write_checkpoint", dying)
    with pytest.raises(MemoryError):
        train(config, out=tmp_path / "killed")
    monkeypatch.undo()
    files = sorted((tmp_path / "killed" / "state" / "clients").iterdir())
    assert len(files) == 4  # of whoever took part and of whoever did not
    in_both = [file for file in files if {name[0] for name in load_file(file)} == {"1", "2"}]
    assert in_both
    train(resume=tmp_path / "killed")
    assert same(adapter(whole), adapter(tmp_path / "killed"))
    for file in files:
        assert same(load_file(file), load_file(whole / "state" / "clients" / file.name))
    lost = in_both[0]
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"client state .*{lost.name} cannot be read"):
        train(resume=tmp_path / "killed")
    lost.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="client state .*damaged"):
        train(resume=tmp_path / "killed")


def test_fedsa_sends_the_change_of_a_and_head_and_keeps_a_b_for_each_client(client_config: Raw, tmp_path: Path):
    config = configured(client_config, "fedsa")
    bench, clients, memory = prepared(config, tmp_path)
    client, other = sorted(clients, key=lambda c: len(c.examples))[-2:]
    start = with_a_head(bench.model.state())
    layout = bench.server(privacy_plan(config))[0].layout
    assert {Factor.of(name) for name, _ in layout.entries} == {Factor.A, Factor.HEAD}
    assert client.local is not None
    a = torch.cat([torch.arange(part.start, part.stop) for name, _, part in layout.slices() if Factor.of(name) is Factor.A])
    for steps, learns in ((1, False), (2, True)):  # with B = 0 the first step gives A nothing
        once = replace(client, local=replace(client.local, steps=steps))
        sent = handle(training(config, 2, start), once, bench.learner, SecureRandom.insecure_from(0))._value
        assert sent.shape == (layout.size,)
        assert bool(sent[a].any()) == learns
    own = memory.before(client.name, 3)
    assert {Factor.of(name) for name in own} == {Factor.B}
    assert all(tensor.any() for tensor in own.values())
    handle(training(config, 2, start), other, bench.learner, SecureRandom.insecure_from(0))
    assert not same(dict(own), dict(memory.before(other.name, 3)))
    # The third round starts from the client's own B, whoever used the model in between: its first step moves A.
    once = replace(client, local=replace(client.local, steps=1))
    assert handle(training(config, 3, start), once, bench.learner, SecureRandom.insecure_from(1))._value[a].any()
    again = handle(training(config, 2, start), client, bench.learner, SecureRandom.insecure_from(0))._value
    assert not same(dict(own), dict(memory.before(client.name, 3)))  # three steps now, not two
    repeated = handle(training(config, 2, start), client, bench.learner, SecureRandom.insecure_from(0))._value
    assert torch.equal(again, repeated)


def test_a_head_round_neither_uses_nor_changes_what_clients_keep(client_config: Raw, tmp_path: Path):
    client_config["training"]["head_rounds"] = 1
    config = configured(client_config, "fedsa")
    bench, clients, memory = prepared(config, tmp_path)
    handle(training(config, 1, bench.model.state()), clients[0], bench.learner, SecureRandom.insecure_from(0))
    assert memory.before(clients[0].name, 2) == {}


def test_private_evaluation_scores_each_client_with_its_own_b(client_config: Raw, tmp_path: Path):
    client_config["evaluation"] = {"epsilon": 2.0, "every": 1, "holdout": 0.4}
    config = configured(client_config, "fedsa")
    bench, clients, memory = prepared(config, tmp_path)
    client = max(clients, key=lambda c: len(c.held_out))
    start, evaluation = with_a_head(bench.model.state()), client.plan.evaluation
    assert evaluation is not None
    own = {n: torch.ones_like(t) for n, t in start.items() if Factor.of(n) is Factor.B}
    memory.keep(client.name, 2, own)
    request = replace(training(config, 2, start), purpose=Purpose.EVALUATION)
    found = handle(request, client, bench.learner, SecureRandom.insecure_from(0))
    scores = []
    for state in (start | own, start):
        bench.model.load(state)
        correct, losses = example_scores(bench.learner, client.held_out)
        units = found._units
        scores.append(evaluation.tally(correct.mean()[None], losses.mean()[None], sorted(units))._value)
    assert torch.equal(found._value, scores[0])
    assert not torch.equal(found._value, scores[1])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_replay_without_one_client_changes_a_release_by_no_more_than_a_clip_norm(client_config: Raw, tmp_path: Path, kind: str):
    client_config["privacy"] |= {"sampling_rate": 1.0, "rounds": 2}
    config = configured(client_config, kind)
    plan, transcripts = privacy_plan(config), list[Transcript]()
    for missing in (0, 1):
        folder = tmp_path / str(missing)
        folder.mkdir()
        bench, clients, _ = prepared(config, folder)
        transcript = Transcript(replay=transcripts[0] if transcripts else None)
        server, state = bench.server(plan)
        exchange, server = transcript.wrap(Simulator(clients[: len(clients) - missing], bench.learner), server)
        ledger = Ledger.open(folder / "l.sqlite", budget=plan.budget, owner="t")
        for number in (1, 2):
            key = SecureRandom.insecure_from(5).derive("round", number)
            permit = server.reserve(state, ledger, key)
            state, norm = server.run_round(state, permit, exchange, key)
            ledger.commit(permit.serial)
            transcript.reports.append(server.report(state, ledger, update_norm=norm, clip_norm=plan.clip_norm, scores={}))
        transcripts.append(transcript)
    difference = compare(*transcripts, plan)
    assert difference.passed, difference
    assert difference.influence > 0.1
    assert any("control of" in key for key in transcripts[0].requests[1]) == (kind == "scaffold")


def test_the_shared_part_is_exported_for_all_and_an_own_b_for_its_participant(client_config: Raw, tmp_path: Path):
    client_config["privacy"] |= {"sampling_rate": 1.0, "rounds": 2, "trust": "local"}
    result = train(configured(client_config, "fedsa", out=str(tmp_path / "run")))
    assert evaluate(result.path) == result.metrics  # of A, B = 0 and head
    assert all("has no noise" in row.assumptions[-1] for row in result.statement)
    shared = adapter(result.path)
    assert not any(tensor.any() for name, tensor in shared.items() if "lora_B" in name)
    assert "its B is zero" in (result.path / "adapter" / "README.md").read_text()
    folder = tmp_path / "own"
    said = CliRunner().invoke(app, ["personal", str(result.path), "client-1", str(folder)])
    assert "NOT PRIVATE" in said.stdout
    assert folder.stat().st_mode & 0o777 == 0o700
    own = load_file(folder / "adapter_model.safetensors")
    kept = ClientMemory(result.path / "state" / "clients").before("client-1", 3)
    assert {name for name in own if "lora_B" in name} == {name.removeprefix("backbone.").replace(".default", "") for name in kept}
    for name, tensor in kept.items():
        assert torch.equal(own[name.removeprefix("backbone.").replace(".default", "")], tensor)
    assert all(torch.equal(tensor, own[name]) for name, tensor in shared.items() if "lora_A" in name)
    assert "must not leave the participant" in (folder / "README.md").read_text()
    with pytest.raises(RunError, match="another folder"):
        personal_adapter(result.path, "client-1", folder)
    with pytest.raises(ConfigError, match="client-0 to client-3"):
        personal_adapter(result.path, "client-9", tmp_path / "none")


def test_a_method_that_keeps_nothing_has_no_personal_adapter(client_config: Raw, tmp_path: Path):
    client_config["privacy"]["rounds"] = 1
    run = train(parse_config(client_config, where="test"), out=tmp_path / "run").path
    assert not (run / "state" / "clients").exists()
    with pytest.raises(ConfigError, match="everybody's adapter"):
        personal_adapter(run, "client-1", tmp_path / "own")


def changed(section: str, **values: object) -> Callable[[Raw], None]:
    return lambda raw: raw.setdefault(section, {}).update(values)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fedsa", changed("training", local_steps=1), "local_steps_end\\) >= 2"),
        ("fedsa", changed("training", local_schedule="linear", local_steps_end=1), "local_steps_end\\) >= 2"),
        ("fedsa", changed("training", patience=1), "add \\[evaluation\\]"),
        ("fedsa", changed("training", local_control="scaffold"), '"fedsa" coordinates do not each get'),
        ("scaffold", changed("method", name="lalora"), '"lalora" coordinates do not each get'),
        ("scaffold", changed("method", name="fedask"), '"fedask" coordinates do not each get'),
        ("scaffold", changed("training", local_optimizer="adamw"), "plain SGD"),
        ("scaffold", changed("training", local_proximal=0.1), "plain SGD"),
        ("scaffold", changed("training", local_steps_end=1), "as many in each round"),
        ("scaffold", changed("training", local_schedule="constant", local_steps_end=1), "reached along a curve"),
        ("fedsa", changed("privacy", correlated={"separation": 2, "bands": 2}), "has not been analysed"),
        ("fedsa", changed("privacy", trust="local", shuffler=True), "has not been analysed"),
        ("scaffold", changed("robust", clip_around_aggregate=True), "which \\[robust\\] replaces"),
        ("fedsa", changed("federation", ranks=[{"rank": 2, "clients": 4}]), "give all one rank"),
        ("fedsa", changed("federation", max_staleness=1), "begins from what its last contribution left"),
        ("scaffold", changed("privacy", correlated={"separation": 2, "bands": 2}), "has not been analysed"),
    ],
)
def test_what_does_not_combine_is_refused_with_a_reason(
    client_config: Raw, kind: str, change: Callable[[Raw], None], message: str
):
    configured(client_config, kind)
    change(client_config)
    with pytest.raises(ConfigError, match=message):
        parse_config(client_config, where="test")


@pytest.mark.parametrize("key", ["local_schedule", "local_control", "local_steps_end", "local_proximal"])
def test_units_of_examples_have_no_local_settings(raw_config: Raw, key: str):
    values = {"local_schedule": "linear", "local_control": "scaffold", "local_steps_end": 3, "local_proximal": 0.5}
    raw_config["training"][key] = values[key]
    with pytest.raises(ConfigError, match="takes one noised step"):
        parse_config(raw_config, where="test")
