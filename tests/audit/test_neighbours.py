"""One unit more or less changes a release by at most clip norm / divisor, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from broken_builds import EVERYONE, SAMPLED, hostile, ordinary, with_neighbours
from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.audit import Transcript, compare
from dp_federated_lora.audit.neighbours import ROUNDING
from dp_federated_lora.federated import Client, RoundReport, Server
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import Run
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import Ledger, PrivacyPlan, SecureRandom
from dp_federated_lora.runtime import Simulator

Raw = dict[str, dict[str, object]]


def test_a_clipped_vector_moves_the_sum_by_the_clip_norm_and_a_non_finite_one_not_at_all(tmp_path: Path):
    for plan in (EVERYONE, SAMPLED):
        for name, last, influence in (("ordinary", ordinary(), 1.0), ("hostile", hostile(), 0.0)):
            folder = tmp_path / f"{name}{plan.rounds}"
            folder.mkdir()
            found = with_neighbours(plan, folder, last)
            assert found.passed
            assert found.influence == pytest.approx(influence, abs=2e-5)  # rounding towards zero loses up to sqrt(d) / 2^22
            assert found.influence <= 1.0


def through_the_engine(
    bench: Workbench, plan: PrivacyPlan, clients: list[Client], path: Path, transcript: Transcript
) -> Transcript:
    server, state = Server.of(bench.model, plan, bench.method, Sgd(4.0))
    exchange, server = transcript.wrap(Simulator(clients, bench.learner), server)
    ledger = Ledger.open(path, budget=plan.budget, owner="t")
    for number in range(1, plan.rounds + 1):
        key = SecureRandom.insecure_from(3).derive("round", number)
        permit = server.reserve(state, ledger, key)
        clip_norm = state.clip_norm
        state, norm = server.run_round(state, permit, exchange, key)
        ledger.commit(permit.serial)
        transcript.reports.append(server.report(state, ledger, update_norm=norm, clip_norm=clip_norm, scores={}))
    return transcript


@pytest.mark.parametrize("unit", ["example", "client"])
def test_a_real_model_with_and_without_one_unit(unit: str, raw_config: Raw, request: pytest.FixtureRequest, tmp_path: Path):
    raw = raw_config if unit == "example" else request.getfixturevalue("client_config")
    config = parse_config(raw, where="test")
    plan = privacy_plan(config)
    transcripts: list[Transcript] = []
    for name in ("with", "without"):
        bench = Workbench.of(config)
        clients = bench.clients(plan)
        if name == "without" and unit == "client":
            clients.pop()
        elif name == "without":
            last = clients[-1].examples
            clients[-1] = replace(clients[-1], examples=last.subset(range(len(last) - 1)))
        replay = transcripts[0] if transcripts else None
        transcripts.append(through_the_engine(bench, plan, clients, tmp_path / f"{name}.sqlite", Transcript(replay=replay)))
    found = compare(*transcripts, plan)
    assert found.passed, found
    assert found.influence > 0.01  # the unit did take part


def test_a_replay_takes_the_past_of_the_first_run_and_not_its_own(tmp_path: Path):
    first, second = Transcript(), Transcript()
    second.replay = first
    server = Server(plan=SAMPLED, method=FFA, optimizer=Sgd(0.5), layout=None)  # type: ignore[arg-type]
    mine, other = torch.ones(3), torch.zeros(3)
    step, _ = first.wrap(None, server)[1].optimizer.update(mine, Sgd(0.5).init(3))  # type: ignore[arg-type]
    again, _ = second.wrap(None, server)[1].optimizer.update(other, Sgd(0.5).init(3))  # type: ignore[arg-type]
    assert torch.equal(step, again)
    assert torch.equal(second.released[0], other)


def test_whatever_else_differs_is_named():
    report = RoundReport(
        round=1,
        rounds=2,
        epsilon=1.0,
        delta=1e-5,
        update_norm=1.0,
        noise_norm=1.0,
        clip_norm=1.0,
        bytes_per_client=8,
        public_metrics={},
        private_metrics={},
    )
    size = SAMPLED.clip_norm / SAMPLED.divisor

    def transcript(**changes: object) -> Transcript:
        facts = {"requests": [{"round": 1, "plan_id": "a", "w": [0.0]}], "released": [torch.zeros(4)], "reports": [report]}
        return Transcript(**(facts | changes))  # type: ignore[arg-type]

    same = compare(transcript(), transcript(reports=[replace(report, update_norm=1.01)]), SAMPLED)
    assert (same.influence, same.leaks, same.passed) == (0.0, (), True)
    changed = transcript(
        requests=[{"round": 1, "plan_id": "b", "w": [1.0]}],
        reports=[replace(report, noise_norm=2.0, public_metrics={"loss": 1.0})],
    )
    found = compare(transcript(), changed, SAMPLED)
    assert set(found.leaks) == {"round 1: request plan_id", "round 1: request w"} | {
        f"round 1: report {name}" for name in ("noise_norm", "public_metrics")
    }
    assert not found.passed
    assert "number of released: 1 and 2" in compare(transcript(), transcript(released=[torch.zeros(4)] * 2), SAMPLED).leaks
    for value, passed in ((size / 2, True), (size / 2 * (1 + 2 * ROUNDING), False), (float("nan"), False)):
        assert (
            compare(transcript(), transcript(released=[torch.full((4,), value, dtype=torch.float64)]), SAMPLED).passed == passed
        )


def public(text: str) -> list[dict[str, object]]:
    """Lines without what is computed from the release, and without times and the random id of a ledger."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        for holder in (line, line.get("report", {})):
            for name in ("update_norm", "timestamp"):
                holder.pop(name, None)
    return lines


def test_no_file_of_a_whole_run_tells_whether_one_example_was_there(raw_config: Raw, tmp_path: Path):
    """Every file that leaves a run, with one row more in the table; the epsilon of the ledger included."""
    table = Path(str(raw_config["data"]["train"])).read_text()
    raw_config["federation"] = {"clients": 4, "partition": "column", "columns": ["author"]}
    raw_config["data"]["train"] = str(tmp_path / "train.csv")
    config = parse_config(raw_config | {"run": raw_config["run"] | {"insecure_seed": 5}}, where="test")
    transcripts: list[Transcript] = []
    for name, extra in (("first", ""), ("second", "oil barrel crude,crude,authord\n")):
        (tmp_path / "train.csv").write_text(table + extra)
        transcript = Transcript(replay=transcripts[0] if transcripts else None)
        with RunDirectory.create(tmp_path / name / "run", config) as directory:
            work = Run(directory, on_round=transcript.reports.append, instrument=transcript.wrap)
            work.train()
            work.write_results()
        transcripts.append(transcript)
    found = compare(*transcripts, privacy_plan(config))
    assert found.passed, found
    first, second = (tmp_path / name / "run" for name in ("first", "second"))
    for file in ("metrics.jsonl", "run.log"):
        assert public((first / file).read_text()) == public((second / file).read_text())
    statements = [json.loads((run / "privacy.json").read_text()) for run in (first, second)]
    assert statements[0] | {"ledger_head": ""} == statements[1] | {"ledger_head": ""}
    for file in ("config.toml", "adapter/adapter_model.safetensors", "adapter/head.safetensors", "adapter/README.md"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert sorted(p.name for p in first.rglob("*")) == sorted(p.name for p in second.rglob("*"))
