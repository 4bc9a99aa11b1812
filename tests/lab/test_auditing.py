"""`dpfl audit` on a tiny model: trains with canaries in an ordinary run, writes what it found, fails where it should."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broken_builds import noise_times
from dp_federated_lora.cli.main import app
from dp_federated_lora.errors import AuditError, RunError, RunInterrupted
from dp_federated_lora.federated import RoundReport
from dp_federated_lora.lab import audit, train
from dp_federated_lora.lab.auditing import audit_directory, audited_config
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.privacy import Ledger

Raw = dict[str, dict[str, object]]


@pytest.fixture(params=["example", "client", "head first"])
def config(request: pytest.FixtureRequest, raw_config: Raw) -> Config:
    raw = request.getfixturevalue("client_config") if request.param == "client" else raw_config
    if request.param == "head first":
        raw["training"] |= {"head_rounds": 2}
    raw["run"] |= {"insecure_seed": 3}  # a correct build may be refuted once in twenty audits; this one is not
    return parse_config(raw, where="test")


def test_an_audit_passes_charges_as_usual_and_writes_what_it_found(config: Config, tmp_path: Path):
    seen: list[RoundReport] = []
    result = audit(config, out=tmp_path / "audit", canaries=60, on_round=seen.append)
    found = json.loads((result.path / "audit.json").read_text())
    spend = Ledger.read(result.path / "ledger.sqlite").spent()
    assert spend.epsilon <= found["claimed_epsilon"] <= 8.0
    assert found["claimed_epsilon"] == pytest.approx(spend.epsilon)
    assert spend.charges == spend.released == len(seen) == config.privacy.rounds
    assert found["passed"] is True
    assert found["lower_bound"] == max(found["bound_one_run"], found["bound_one_run_f_dp"]) <= found["claimed_epsilon"]
    assert (found["canaries"], found["guesses"], found["confidence"], found["delta"]) == (60, 12, 0.95, 1e-5)
    assert set(found["estimate_cosine"]) == {"epsilon", "low", "mean", "std"}
    page = (result.path / "report.html").read_text()
    assert "Epsilon shown, at least" in page
    assert "with 60 canaries, at 0.95 confidence: PASS" in page
    assert (result.path / "adapter" / "adapter_model.safetensors").exists()
    with pytest.raises(RunError, match="never overwritten"):
        audit(config, out=tmp_path / "audit", canaries=60)


def test_no_noise_is_a_proof_against_the_claim_and_exit_code_1(raw_config: Raw, tmp_path: Path):
    raw_config["privacy"]["epsilon"] = 1.0
    raw_config["run"] |= {"insecure_seed": 3}
    file = tmp_path / "tiny.toml"
    file.write_text(parse_config(raw_config, where="test").to_toml())
    with noise_times(0.0):
        result = CliRunner().invoke(app, ["audit", str(file), "--out", str(tmp_path / "a"), "--canaries", "100", "--json"])
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["lower_bound"] > found["claimed_epsilon"]
    assert ": FAIL" in (tmp_path / "a" / "report.html").read_text()


def test_a_run_is_audited_by_its_configuration_in_a_directory_of_its_own(raw_config: Raw, tmp_path: Path, monkeypatch):
    raw_config["run"] |= {"insecure_seed": 3}
    run = train(parse_config(raw_config, where="test")).path
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["audit", str(run), "--canaries", "40"])
    assert result.exit_code == 0, result.output
    assert "PASS" in result.output
    assert "estimate (no bound)" in result.output
    assert (tmp_path / "runs" / f"audit-{run.name}" / "audit.json").exists()
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert audit_directory(Path("x/newswire.toml")) == Path("runs/audit-newswire")
    assert audited_config(run) == parse_config(raw_config, where="test")
    with pytest.raises(RunError, match="not a run directory"):
        audited_config(tmp_path)


def test_impossible_audits_are_refused_before_any_work_and_an_interrupted_one_is_over(raw_config: Raw, tmp_path: Path):
    config = parse_config(raw_config, where="test")
    for changes in ({"canaries": 5}, {"confidence": 1.0}):
        with pytest.raises(AuditError):
            audit(config, out=tmp_path / "no", **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "no").exists()
    with pytest.raises(RunInterrupted, match="cannot be resumed"):
        audit(config, out=tmp_path / "a", canaries=40, on_round=lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert not (tmp_path / "a" / "audit.json").exists()
