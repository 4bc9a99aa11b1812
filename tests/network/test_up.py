"""`dpfl up`: a whole federation in processes of its own, from provisioning to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dp_federated_lora import train
from dp_federated_lora.cli.main import app
from dp_federated_lora.errors import RunError
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.ledgers import verify_ledgers
from dp_federated_lora.network.audit_log import verify
from federation import adapter_bytes

Raw = dict[str, dict[str, object]]


@pytest.fixture
def config_file(raw_config: Raw, tmp_path: Path) -> Path:
    raw_config["federation"] = {"clients": 3, "partition": "iid"}
    raw_config["privacy"] |= {"trust": "distributed", "rounds": 2}
    raw_config["secure_sum"] = {"colluders": 0, "dropouts": 0.0}
    raw_config["run"] |= {"insecure_seed": 7, "threads": 1}
    path = tmp_path / "small.toml"
    path.write_text(parse_config(raw_config, where="test").to_toml())
    return path


def test_up_gives_the_simulators_adapter_and_leaves_whole_ledgers_and_logs(config_file: Path, raw_config: Raw, tmp_path: Path):
    out = tmp_path / "network"
    done = CliRunner().invoke(app, ["up", str(config_file), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    status = json.loads(done.stdout)
    assert (status["state"], status["round"], len(status["rounds"])) == ("finished", 2, 2)
    run = out / "coordinator" / "runs" / "demo"
    simulated = train(parse_config(raw_config, where="test"), out=tmp_path / "simulated")
    assert adapter_bytes(run) == adapter_bytes(simulated.path)
    assert "secure aggregation" in (run / "report.html").read_text()
    verify_ledgers(str(run))
    for site in ("client-0", "client-1", "client-2"):
        assert len(verify(out / site / "state" / "audit.jsonl").entries) == 3  # begun, joined, ended
        assert not list((out / site / "state" / "runs" / "demo").glob("sums/*"))  # no key of noise is left
        (ledger,) = verify_ledgers(str(out / site / "state" / "runs" / "demo" / "ledger.sqlite"))
        assert (ledger.spent().charges, ledger.spent().released) == (2, 2)
    again = CliRunner().invoke(app, ["up", str(config_file), "--out", str(out)])
    assert isinstance(again.exception, RunError)
    assert "never overwritten" in str(again.exception)
    raw_config["privacy"]["trust"] = "central"
    del raw_config["secure_sum"]
    config_file.write_text(parse_config(raw_config, where="test").to_toml())
    central = CliRunner().invoke(app, ["up", str(config_file), "--out", str(tmp_path / "central")])
    assert "never leave a site" in str(central.exception)
    assert not (tmp_path / "central").exists()
