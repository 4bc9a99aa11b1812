"""Budgets of participants across runs, and statements that are signed with a run's ledger key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from databases import Place
from dp_federated_lora import train
from dp_federated_lora.errors import (
    BudgetExhausted,
    BudgetMismatch,
    ConfigError,
    LedgerCorrupt,
    LedgerKeyLost,
    RunError,
    StatementInvalid,
)
from dp_federated_lora.lab.attestation import Attestation, verify_statement
from dp_federated_lora.lab.config import Config, parse_config
from dp_federated_lora.lab.ledgers import ledgers_at, verify_ledgers
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.privacy import GaussianMechanism, Ledger, RenyiFilter

Raw = dict[str, dict[str, object]]


def with_lifetime(raw: Raw, place: Place, *, epsilon: float = 30.0, **changes: object) -> Config:
    raw["privacy"]["allow_weak_privacy"] = True
    raw["ledger"] = {"database": place.where, "key": str(place.key), "data_set": "mail", "epsilon": epsilon} | changes
    return parse_config(raw, where="test")


@pytest.fixture
def file(tmp_path: Path) -> Place:
    return Place(str(tmp_path / "lifetime.sqlite"), tmp_path / "lifetime.key")


def spends(place: Place) -> dict[str, int]:
    return {ledger.owner: ledger.spent().charges for ledger in Ledger.read_all(place.where)}


def test_every_participant_is_charged_every_round_of_every_run_until_one_has_no_budget_left(
    raw_config: Raw, place: Place, tmp_path: Path
):
    event = privacy_plan(parse_config(raw_config, where="test")).event
    total, rounds = RenyiFilter.for_budget(12.0, 1e-5), 0
    while (total := total.with_event(event)).epsilon(1e-5) <= 12.0:
        rounds += 1
    assert 4 < rounds < 8  # one whole run of four rounds, and not two
    config = with_lifetime(raw_config, place, epsilon=12.0)
    first = train(config, out=tmp_path / "first")
    assert (first.rounds, first.stopped) == (4, None)
    everyone = [f"client-{n} / mail" for n in range(4)]
    assert spends(place) == dict.fromkeys(everyone, 4)
    second = train(config, out=tmp_path / "second")
    assert second.rounds == rounds - 4
    assert "'client-0 / mail'" in str(second.stopped)
    assert spends(place) == dict.fromkeys(everyone, rounds)
    assert Ledger.read(tmp_path / "second" / "ledger.sqlite").spent().charges == rounds - 4
    with pytest.raises(BudgetExhausted, match="round 1 would take 'client-0 / mail'"):
        train(config, out=tmp_path / "third")
    assert Ledger.read(tmp_path / "third" / "ledger.sqlite").spent().charges == 0
    for run in ("first", "second", "third"):
        verify_ledgers(str(tmp_path / run))


def test_a_resumed_round_is_charged_once_and_one_with_a_new_key_again(
    raw_config: Raw, file: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = with_lifetime(raw_config, file)
    run = tmp_path / "run"
    for charges in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(GaussianMechanism, "release", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
            for _ in range(2):
                with pytest.raises(MemoryError):
                    train(resume=run) if run.exists() else train(config, out=run)
        assert set(spends(file).values()) == {charges}
        (run / "state" / "round.key").unlink()
    result = train(resume=run)
    # Two lost keys have cost the run two rounds; the participants paid for one more, before the run could not.
    assert (result.rounds, Ledger.read(run / "ledger.sqlite").spent().charges) == (2, 4)
    assert set(spends(file).values()) == {5}
    assert "all participants of this run" in str(result.stopped)


def test_a_lifetime_ledger_that_was_copied_back_is_noticed_by_the_runs_that_paid_into_it(
    raw_config: Raw, file: Place, tmp_path: Path
):
    config = with_lifetime(raw_config, file)
    train(config, out=tmp_path / "first")
    older = shutil.copy(file.where, tmp_path / "older")
    train(config, out=tmp_path / "second")
    shutil.copy(older, file.where)
    verify_ledgers(str(tmp_path / "first"))
    with pytest.raises(LedgerCorrupt, match="lacks 4 charges that this run has paid"):
        verify_ledgers(str(tmp_path / "second"))
    with pytest.raises(LedgerCorrupt, match="rolled back"):
        train(resume=tmp_path / "second")


def test_one_ledger_has_one_budget(client_config: Raw, file: Place, tmp_path: Path):
    train(with_lifetime(client_config, file), out=tmp_path / "first")
    with pytest.raises(BudgetMismatch, match="a budget is fixed"):
        train(with_lifetime(client_config, file, epsilon=31.0), out=tmp_path / "second")


def test_impossible_lifetimes_are_refused_before_any_work(raw_config: Raw, file: Place, monkeypatch: pytest.MonkeyPatch):
    for changes, message in (
        ({"epsilon": -1.0}, "ledger.epsilon"),
        ({"data_set": ""}, "ledger.data_set"),
        ({"database": "postgresql://host/x", "key": None}, "ledger.key"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_lifetime(raw_config, file, **changes)
    raw_config["run"]["insecure_seed"] = 1
    with pytest.raises(ConfigError, match="insecure seed"):
        with_lifetime(raw_config, file)
    del raw_config["run"]["insecure_seed"]
    raw_config["ledger"] = {"database": "here.sqlite", "data_set": "mail", "epsilon": 30.0}
    raw_config["privacy"]["allow_weak_privacy"] = False
    with pytest.raises(ConfigError, match=r"ledger\.epsilon: 30 is weaker"):
        parse_config(raw_config, where="test")
    raw_config["ledger"]["epsilon"] = 10.0
    monkeypatch.chdir(file.key.parent)
    assert parse_config(raw_config, where="test").ledger.database == str(file.key.parent / "here.sqlite")  # type: ignore[union-attr]


def test_a_signed_statement_holds_for_its_run_until_anything_is_edited(raw_config: Raw, tmp_path: Path):
    result = train(parse_config(raw_config, where="test"), out=tmp_path / "run")
    attestation = Attestation.of(result.path)
    assert attestation.statement == result.statement
    signed, path = attestation.signed(), tmp_path / "statement.json"
    path.write_text(json.dumps(signed))
    assert verify_statement(path, run=result.path) == verify_statement(path)
    assert signed["ledger_head"] == json.loads((result.path / "privacy.json").read_text())["ledger_head"]

    def refused(change: object, match: str, run: Path | None = None) -> None:
        path.write_text(change if isinstance(change, str) else json.dumps(change))
        with pytest.raises(StatementInvalid, match=match):
            verify_statement(path, run=run)

    better = json.loads(json.dumps(signed))
    better["statement"][0]["epsilon"] /= 2
    refused(better, "edited after")
    for name in ("config", "ledger_head", "public_key", "format"):
        refused(signed | {name: "0" * 64}, "edited after")
    refused(signed | {"epsilon": float("nan")}, "cannot be read")
    for text in ("", "[]", "{}", '{"signature": 1, "format": []}'):
        refused(text, "cannot be read")

    other = train(parse_config(raw_config, where="test"), out=tmp_path / "other")
    refused(signed, "another run", other.path)
    ledger = result.path / "ledger.sqlite"
    Place(str(ledger), ledger.with_suffix(".key")).execute("DELETE FROM ledger WHERE serial = 8")
    refused(signed, "rolled back", result.path)
    with pytest.raises(LedgerCorrupt, match=r"privacy\.json has seen"):
        verify_ledgers(str(result.path))
    with pytest.raises(StatementInvalid, match="cannot be read"):
        verify_statement(tmp_path / "absent")
    with pytest.raises(RunError):
        Attestation.of(tmp_path)


def test_without_privacy_json_the_checkpoint_bears_witness_and_without_the_key_nothing_is_signed(raw_config: Raw, tmp_path: Path):
    run = train(parse_config(raw_config, where="test"), out=tmp_path / "run").path
    (run / "ledger.key").unlink()
    assert Attestation.of(run).statement
    with pytest.raises(LedgerKeyLost):
        Attestation.of(run).signed()
    assert train(resume=run).rounds == 4  # nothing is left to charge
    (run / "privacy.json").unlink()
    verify_ledgers(str(run))
    Place(str(run / "ledger.sqlite"), run).execute("DELETE FROM ledger WHERE serial >= 7")
    with pytest.raises(LedgerCorrupt, match="the checkpoint has seen"):
        verify_ledgers(str(run))
    assert len(ledgers_at(str(run))[0].rows()) == 7
