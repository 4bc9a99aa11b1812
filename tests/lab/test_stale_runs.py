"""Whole runs with asynchronous rounds: what they cost, crashes, and what cannot be combined."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dp_federated_lora import train
from dp_federated_lora.audit import Transcript
from dp_federated_lora.errors import ConfigError
from dp_federated_lora.federated import Delays, Server
from dp_federated_lora.lab.auditing import audit
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.run import Run
from dp_federated_lora.privacy import Ledger
from saved import adapter, same

Raw = dict[str, dict[str, object]]
SEED = 3  # of [run]: draws delays of 0, 1 and 2 for the four participants


def stale(raw: Raw, longest: int = 2, **run: object) -> Config:
    raw["privacy"]["rounds"] = 4
    raw["federation"]["max_staleness"] = longest
    raw["run"] |= {"seed": SEED} | run
    return parse_config(raw, where="test")


@pytest.mark.parametrize(("unit", "trust", "method"), [("example", "central", "rolora"), ("client", "local", "fedavg")])
def test_a_run_costs_what_a_synchronous_one_does_and_a_killed_one_resumes_to_the_same_adapter(
    unit: str, trust: str, method: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    raw: Raw = request.getfixturevalue("raw_config" if unit == "example" else "client_config")
    raw["privacy"]["trust"] = trust
    raw["method"] = {"name": method}
    raw["training"]["head_rounds"] = 1
    config, plan = stale(raw, insecure_seed=5), privacy_plan(stale(raw))
    assert plan == privacy_plan(stale(raw, 0))
    assert {Delays(2, SEED).of(f"client-{n}") for n in range(4)} == {0, 1, 2}
    whole = train(config, out=tmp_path / "whole")
    assert whole.epsilon == plan.epsilon_after(4)
    assert Ledger.read(whole.path / "ledger.sqlite").spent().charges == 4
    assert "0 to 2 server steps" in (whole.path / "report.html").read_text()
    run_round = Server.run_round

    def dying(self, state, *args):
        result = run_round(self, state, *args)
        if state.round == 3:  # the noise is drawn; the resumed round needs earlier adapters, which only the checkpoint has
            raise MemoryError
        return result

    monkeypatch.setattr(Server, "run_round", dying)
    with pytest.raises(MemoryError):
        train(config, out=tmp_path / "broken")
    monkeypatch.undo()
    assert train(resume=tmp_path / "broken").epsilon == whole.epsilon
    assert same(adapter(tmp_path / "broken"), adapter(whole.path))


def test_clients_are_sent_the_adapters_of_earlier_rounds_in_whole(client_config: Raw):
    config, seen = stale(client_config, insecure_seed=1), Transcript()
    with RunDirectory.create(Path(config.run.out), config) as directory:
        Run(directory, instrument=seen.wrap).train()
    facts = {"purpose", "round", "plan_id", "adapter", "clip_norm", "staleness"}
    tensors = {(r["round"], r["staleness"]): {n: r[n] for n in r.keys() - facts} for r in seen.requests}
    assert sorted(tensors) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2), (4, 0), (4, 1), (4, 2)]
    for (number, age), tensor in tensors.items():
        assert tensor == tensors[number - age, 0]
        assert any("lora_A" in name for name in tensor)
    assert tensors[3, 0] != tensors[2, 0] != tensors[1, 0]


def test_an_audit_runs_with_delays(client_config: Raw, tmp_path: Path):
    verdict = audit(stale(client_config), out=tmp_path / "audit", canaries=20).verdict
    assert verdict.guesses.canaries == 20
    assert torch.isfinite(torch.tensor(verdict.lower_bound))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "fedask"}}, 'do not under "fedask"'),
        ({"privacy": {"trust": "local", "shuffler": True}}, "weigh differently"),
        ({"federation": {"max_staleness": 3}}, "below privacy.rounds - 1"),
        ({"federation": {"max_staleness": -1}}, "federation.max_staleness"),
    ],
)
def test_what_does_not_go_with_old_adapters_is_refused_with_the_reason(client_config: Raw, changes: Raw, message: str):
    stale(client_config)
    for section, values in changes.items():
        client_config.setdefault(section, {}).update(values)
    with pytest.raises(ConfigError, match=message):
        parse_config(client_config, where="test")
