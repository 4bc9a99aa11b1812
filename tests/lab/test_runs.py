"""Whole runs on a tiny model: files, statements, crashes, resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dp_federated_lora import evaluate, plan_run, train
from dp_federated_lora.errors import CheckpointError, ConfigError, ModelError, RunError, RunInterrupted, StorageError
from dp_federated_lora.federated import RoundKeyFile, RoundReport
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.sections import ModelSection
from dp_federated_lora.lab.workbench import Workbench, head_of_labels
from dp_federated_lora.lora import compute_device
from dp_federated_lora.privacy import GaussianMechanism, Ledger
from saved import adapter, same, with_peft

Raw = dict[str, dict[str, object]]


def configured(raw: Raw, **run: object) -> Config:
    raw["run"] |= run
    return parse_config(raw, where="test")


def test_a_run_writes_its_files_and_a_statement_of_what_was_executed(raw_config: Raw):
    config = configured(raw_config)
    seen: list[RoundReport] = []
    result = train(config, on_round=seen.append)
    run = result.path
    assert [r.round for r in seen] == [1, 2, 3, 4]
    assert [bool(r.public_metrics) for r in seen] == [False, True, False, True]
    assert seen[0].epsilon < seen[-1].epsilon == pytest.approx(result.epsilon)
    privacy = json.loads((run / "privacy.json").read_text())
    rows = {row["adversary"]: row for row in privacy["statement"]}
    assert rows["recipients of the model"]["epsilon"] == result.epsilon <= 8.0
    assert privacy["stopped"] is None
    assert rows["other participants"]["epsilon"] == result.epsilon
    assert rows["the server"]["epsilon"] is None
    planned = plan_run(config).as_json()
    assert planned["trainable_fraction"] > 0
    for row, promised in zip(privacy["statement"], planned["statement"], strict=True):
        assert row | {"epsilon": 0} == promised | {"epsilon": 0}
        if row["epsilon"] is None:
            assert promised["epsilon"] is None
        else:
            assert row["epsilon"] == pytest.approx(promised["epsilon"], rel=1e-5)
    ledger = Ledger.read(run / "ledger.sqlite")
    assert ledger.contains(privacy["ledger_head"])
    assert ledger.spent().released == ledger.spent().charges == 4
    assert "NOT PRIVATE" not in (run / "report.html").read_text()
    assert not (run / "state" / "round.key").exists()
    assert evaluate(run) == result.metrics
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in metrics] == [1, 2, 3, 4]
    with pytest.raises(RunError, match="never overwritten"):
        train(config)


def test_the_adapter_loads_into_the_plain_backbone_with_peft(raw_config: Raw, tiny_model: Path):
    from transformers import AutoModel

    run = train(configured(raw_config)).path
    model = with_peft(AutoModel.from_pretrained(tiny_model), run / "adapter")
    trained = adapter(run)
    loaded = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    assert len(loaded) == 4
    for name, parameter in loaded.items():
        assert torch.equal(parameter.cpu(), trained[name.replace(".default", "")])
        assert parameter.abs().max() > 0


def test_client_unit_runs_and_states_its_unit(client_config: Raw):
    result = train(configured(client_config))
    assert {row.unit for row in result.statement} == {"client"}
    assert result.rounds == 3


@pytest.mark.parametrize("stack_tokens", [None, 64])
@pytest.mark.parametrize("unit", ["example", "client"])
def test_any_number_of_cores_gives_the_same_run(raw_config: Raw, client_config: Raw, tmp_path: Path, unit: str, stack_tokens):
    raw = client_config if unit == "client" else raw_config
    raw["training"]["head_rounds"] = 1
    raw["run"] |= {"stack_tokens": stack_tokens}
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            raw["run"] |= {"threads": threads}
            results.append(train(configured(raw, insecure_seed=3), out=tmp_path / str(threads)))
    finally:
        torch.set_num_threads(before)
    one, three = results
    assert same(adapter(one.path), adapter(three.path))
    assert one.metrics == three.metrics
    assert one.epsilon == three.epsilon


def test_fedavg_trains_both_factors_and_ffa_leaves_a_alone(raw_config: Raw, tmp_path: Path):
    runs = {}
    for method in ("ffa", "fedavg"):
        raw_config["method"] = {"name": method}
        runs[method] = adapter(train(configured(raw_config, out=str(tmp_path / method))).path)
    first = {n: t for n, t in runs["ffa"].items() if "lora_A" in n}
    assert all(torch.allclose(t @ t.T, torch.eye(2), atol=1e-5) for t in first.values())  # still orthonormal
    assert all(not torch.allclose(runs["fedavg"][n], t) for n, t in first.items())


def test_the_head_alone_is_trained_first_and_a_resume_repeats_it_to_the_bit(raw_config: Raw, tmp_path: Path):
    raw_config["training"] |= {"head_rounds": 2, "server_head_learning_rate": 9.0}
    config = configured(raw_config, insecure_seed=1)
    sizes, adapters = [], []

    def stop_after(number: int):
        def on_round(report: RoundReport) -> None:
            sizes.append(report.bytes_per_client)
            if report.round == number:
                os.kill(os.getpid(), signal.SIGINT)

        return on_round

    for number in (1, 3):
        out = tmp_path / f"stopped{number}"
        with pytest.raises(RunInterrupted):
            train(config, out=out, on_round=stop_after(number))
        train(resume=out)
        adapters.append(adapter(out))
    train(config, out=tmp_path / "whole")
    assert same(adapters[0], adapter(tmp_path / "whole"))
    assert same(adapters[1], adapter(tmp_path / "whole"))
    assert sizes[1] == sizes[2] < sizes[3]


def test_a_gpu_that_is_wished_for_and_not_there_is_named(raw_config: Raw, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Workbench.of(configured(raw_config)).model.device.type == "cpu"
    with pytest.raises(ModelError, match=r'\[run\] device = "cuda": torch .* sees no GPU here; install a CUDA build'):
        Workbench.of(configured(raw_config, device="cuda"))


@pytest.mark.parametrize(
    ("wish", "there", "place"), [(None, True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu"), (None, False, "cpu")]
)
def test_models_compute_on_a_gpu_where_there_is_one_and_nobody_says_otherwise(
    wish, there, place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert compute_device(wish).type == place


@pytest.mark.parametrize(
    ("gpu", "cpu", "expected"),
    [
        (True, {}, "bfloat16"),
        (False, {"amx_bf16": True}, "float32"),  # an old GPU computes, whatever the CPU can
        (None, {"avx512_bf16": True}, "bfloat16"),
        (None, {}, "float32"),
    ],
)
def test_the_type_that_auto_stands_for_is_that_of_what_computes(gpu, cpu, expected, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert ModelSection(source="x", task="classification", dtype="auto").dtype == expected


def test_a_head_that_starts_from_label_names_knows_the_names_before_it_has_seen_data(raw_config: Raw, tmp_path: Path):
    raw_config["training"]["head_start"] = "labels"
    bench = Workbench.of(parse_config(raw_config, where="test"))
    names, weight = bench.config.data.labels, bench.model.state()["head.weight"]
    batch = bench.tokenizer(list(names), padding=True, return_tensors="pt").to(bench.model.device)
    with torch.no_grad():
        assert bench.model.module(batch["input_ids"], batch["attention_mask"]).argmax(dim=1).tolist() == [0, 1, 2]
    assert torch.allclose(weight.sum(dim=0), torch.zeros(weight.shape[1]), atol=1e-4)  # no class is favoured on average
    dotted = head_of_labels(bench.model, bench.tokenizer, ["crude.oil", "wheat_grain", "money"])
    assert torch.equal(dotted, head_of_labels(bench.model, bench.tokenizer, ["crude oil", "wheat grain", "money"]))

    result = train(configured(raw_config, insecure_seed=1), out=tmp_path / "labels")
    assert not torch.equal(load_file(result.path / "adapter" / "head.safetensors")["weight"], weight)
    raw_config["model"]["task"] = "causal-lm"
    raw_config["data"] |= {"label_column": None, "labels": []}
    with pytest.raises(ConfigError, match="head_start"):
        parse_config(raw_config, where="test")


def test_frozen_weights_in_bfloat16_leave_a_float32_adapter_and_nearly_the_same_scores(raw_config: Raw, tmp_path: Path):
    adapters = []
    for dtype in ("float32", "bfloat16"):
        raw_config["model"]["dtype"] = dtype
        adapters.append(adapter(train(configured(raw_config, insecure_seed=1), out=tmp_path / dtype).path))
    assert {t.dtype for t in adapters[1].values()} == {torch.float32}
    for name, exact in adapters[0].items():
        assert torch.allclose(exact, adapters[1][name], atol=0.05 * float(exact.abs().max()))
    assert not same(*adapters)


def test_noise_is_fresh_in_every_run_and_repeats_only_with_an_insecure_seed(raw_config: Raw, tmp_path: Path):
    runs = [adapter(train(configured(raw_config, out=str(tmp_path / str(i)))).path) for i in range(2)]
    assert not same(*runs)
    seeded = [train(configured(raw_config, out=str(tmp_path / f"seeded{i}"), insecure_seed=7)).path for i in range(2)]
    assert same(*(adapter(run) for run in seeded))
    rows = json.loads((seeded[0] / "privacy.json").read_text())["statement"]
    assert all(row["epsilon"] is None for row in rows)
    assert "NOT PRIVATE" in rows[0]["assumptions"][0]
    assert "NOT PRIVATE" in (seeded[0] / "report.html").read_text()


def test_with_a_large_budget_the_task_is_learnt(raw_config: Raw):
    raw_config["privacy"] |= {"epsilon": 200.0, "allow_weak_privacy": True, "sampling_rate": 1.0, "rounds": 20}
    raw_config["training"] |= {"server_optimizer": "adam", "server_learning_rate": 0.3}
    assert train(configured(raw_config, insecure_seed=1)).metrics["accuracy"] > 0.7  # a third by chance


# One interpreter forks a child per crash point: each trains the same run and is killed in its second round.
CRASH = """
import os, signal, sys
from pathlib import Path
import dp_federated_lora.lab.run as lab
from dp_federated_lora.lab.config import load_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.lora import compute_device
from dp_federated_lora.privacy import GaussianMechanism, Ledger

config, folder, *points = sys.argv[1:]
privacy_plan(load_config(config))  # calibrate and import once, for all children
Workbench.of(load_config(config))
STEPS = {
    "key": (lab.RoundKeyFile, "open_round", True),
    "reserve": (Ledger, "reserve", True),
    "release": (GaussianMechanism, "release", True),
    "before-checkpoint": (lab, "write_checkpoint", False),
    "after-checkpoint": (lab, "write_checkpoint", True),
    "commit": (Ledger, "commit", True),
    "metrics": (lab.MetricsFile, "append", True),
}
for point in points:
    if os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL, point
        continue
    owner, name, after = STEPS[point]
    function, calls = getattr(owner, name), []
    def dying(*args, **kwargs):
        calls.append(1)
        result = function(*args, **kwargs) if after or len(calls) < 2 else None
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, dying)
    lab.train(load_config(config), out=Path(folder) / point)
    os._exit(1)
"""
POINTS = ("key", "reserve", "release", "before-checkpoint", "after-checkpoint", "commit", "metrics")


@pytest.mark.timeout(900)  # eight runs, seven of them in processes that die
def test_a_run_killed_at_any_step_resumes_to_the_same_adapter_and_never_to_a_smaller_epsilon(raw_config: Raw, tmp_path: Path):
    config = configured(raw_config, insecure_seed=11, device="cpu")  # forked processes cannot use a GPU
    undisturbed = train(config, out=tmp_path / "whole")
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    command = [sys.executable, "-c", CRASH, str(tmp_path / "c.toml"), str(tmp_path), *POINTS]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for point in POINTS:
        broken = tmp_path / point
        before = Ledger.read(broken / "ledger.sqlite").spent()
        resumed = train(resume=broken)
        assert same(adapter(broken), adapter(undisturbed.path)), point
        assert before.epsilon <= resumed.epsilon == undisturbed.epsilon, point
        assert resumed.rounds == 4


def test_with_real_entropy_a_round_is_recreated_from_its_key_under_one_charge(raw_config: Raw, monkeypatch: pytest.MonkeyPatch):
    config = configured(raw_config)
    seen: list[torch.Tensor] = []
    release = GaussianMechanism.release

    def dying(self, *args, **kwargs):
        released = release(self, *args, **kwargs)
        seen.append(released.value)
        if len(seen) == 2:
            raise MemoryError
        return released

    monkeypatch.setattr(GaussianMechanism, "release", dying)
    with pytest.raises(MemoryError):
        train(config)
    run = Path(config.run.out)
    assert (run / "state" / "round.key").stat().st_mode & 0o777 == 0o600
    train(resume=run)
    assert torch.equal(seen[1], seen[2])  # the same noise on the same sum: one release
    assert Ledger.read(run / "ledger.sqlite").spent().charges == 4


def test_a_lost_round_key_costs_another_charge_and_the_budget_then_ends_the_run_early(raw_config: Raw, monkeypatch):
    config = configured(raw_config)
    monkeypatch.setattr(GaussianMechanism, "release", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        train(config)
    monkeypatch.undo()
    run = Path(config.run.out)
    (run / "state" / "round.key").unlink()
    result = train(resume=run)
    assert Ledger.read(run / "ledger.sqlite").spent().charges == 4
    assert result.rounds == 3
    assert result.epsilon == 8.0  # the whole budget: four charges are no prefix of the plan, whatever they add up to


def test_resume_refuses_damaged_foreign_missing_and_rolled_back_state(raw_config: Raw, tmp_path: Path, tables):
    run = train(configured(raw_config)).path
    state = run / "state" / "checkpoint.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(resume=run)
    state.write_bytes(whole[:-3] + b"\x55\x55\x55")
    with pytest.raises(CheckpointError, match="damaged"):
        train(resume=run)
    state.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        train(resume=run)
    state.write_bytes(whole)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("rank = 2", "rank = 3"))
    with pytest.raises(CheckpointError, match="belongs to configuration"):
        train(resume=run)
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("rank = 3", "rank = 2"))
    (run / "ledger.sqlite").unlink()
    with pytest.raises(CheckpointError, match="older than the checkpoint"):
        train(resume=run)
    with pytest.raises(RunError, match="not a run directory"):
        train(resume=tmp_path)
    with pytest.raises(ConfigError, match="not both"):
        train()


def test_an_older_checkpoint_is_refused_since_its_next_round_was_published(raw_config: Raw, monkeypatch):
    config, kept = configured(raw_config), []
    run = Path(config.run.out)
    train(config, on_round=lambda r: kept.append((run / "state" / "checkpoint.safetensors").read_bytes()))
    (run / "state" / "checkpoint.safetensors").write_bytes(kept[1])
    with pytest.raises(CheckpointError, match="never released again"):
        train(resume=run)


def test_changed_data_is_noticed_on_resume(raw_config: Raw, tmp_path: Path):
    copied = tmp_path / "train.csv"
    copied.write_text(Path(str(raw_config["data"]["train"])).read_text())
    raw_config["data"]["train"] = str(copied)
    run = train(configured(raw_config)).path
    copied.write_text(copied.read_text() + "oil,crude,authora\n")
    with pytest.raises(CheckpointError, match="configuration and data"):
        train(resume=run)


def test_two_processes_cannot_work_in_one_run(raw_config: Raw):
    run = train(configured(raw_config)).path
    with RunDirectory.existing(run), pytest.raises(RunError, match="another process"):
        train(resume=run)


def test_a_full_disk_at_a_checkpoint_stops_the_run_and_loses_nothing(raw_config: Raw, monkeypatch: pytest.MonkeyPatch):
    config = configured(raw_config, insecure_seed=3)
    replace, calls = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        train(config)
    monkeypatch.undo()
    assert train(resume=config.run.out).rounds == 4


def test_an_interrupt_finishes_the_round_and_the_run_resumes(raw_config: Raw):
    config = configured(raw_config)

    def interrupt(report: RoundReport) -> None:
        if report.round == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(RunInterrupted, match="after round 2 of 4"):
        train(config, on_round=interrupt)
    assert train(resume=config.run.out).rounds == 4


def test_a_finished_run_resumes_to_itself(raw_config: Raw):
    first = train(configured(raw_config))
    before = adapter(first.path)
    assert train(resume=first.path).epsilon == first.epsilon
    assert same(before, adapter(first.path))


def test_a_truncated_key_file_is_not_used(tmp_path: Path):
    keys = RoundKeyFile(tmp_path / "round.key")
    first = keys.open_round(1, insecure_seed=None)
    assert keys.open_round(1, insecure_seed=None).commitment == first.commitment
    assert keys.open_round(2, insecure_seed=None).commitment != first.commitment
    (tmp_path / "round.key").write_bytes(b"2\nshort")
    assert keys.open_round(2, insecure_seed=None).commitment != first.commitment
    keys.destroy()
    keys.destroy()
    assert list(tmp_path.iterdir()) == []


def test_evaluate_needs_an_adapter_and_public_data(raw_config: Raw):
    raw_config["data"] |= {"test_is_public": False}
    del raw_config["data"]["test"]
    result = train(configured(raw_config))
    assert result.metrics == {}
    with pytest.raises(ConfigError, match="public table"):
        evaluate(result.path)
    test = str(raw_config["data"]["train"]).replace("train.csv", "test.csv")
    assert 0.0 <= evaluate(result.path, data=test)["accuracy"] <= 1.0
