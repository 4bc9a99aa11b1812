import csv
import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from databases import Place
from dp_federated_lora.cli import main as cli
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.privacy import Budget, GaussianMechanism, Ledger, Scope, SecureRandom

Raw = dict[str, dict[str, object]]
RUNNER = CliRunner()


def run(*arguments: object) -> str:
    result = RUNNER.invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["dpfl", *(str(a) for a in arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.fixture
def config_file(raw_config: Raw, tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(parse_config(raw_config, where="x").to_toml(), encoding="utf-8")
    return path


COMMANDS = "recipes;init;plan;train;evaluate;personal;audit;ledger show;ledger verify;ledger export;statement;verify".split(";")
COMMANDS += "provision;join;broker;coordinator;site;submit;runs;status;stop;sites;up".split(";")
COMMANDS += "audit-log verify;audit-log show;policy check".split(";")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str):
    text = run(*command.split(), "--help")
    assert f"Example: dpfl {command}" in text
    assert "--json" in text or command in ("init", "personal", "ledger export", "broker", "coordinator", "site")


def test_the_help_lists_every_command():
    text = run("--help") + run("ledger", "--help") + run("audit-log", "--help") + run("policy", "--help")
    assert all(command.split()[-1] in text for command in COMMANDS)


def test_recipes_are_listed_and_written_once(tmp_path: Path, monkeypatch, capsys):
    assert set(json.loads(run("recipes", "--json"))) == {"newswire", "newsgroups", "dialogue"}
    assert "newswire" in run("recipes")
    target = tmp_path / "mine.toml"
    assert f"dpfl plan {target}" in run("init", "newswire", target)
    assert "# Reuters" in target.read_text()
    assert failing(monkeypatch, capsys, "init", "newswire", target) == (
        2,
        f"dpfl: RunError: {target} exists; name another file\n",
    )
    code, text = failing(monkeypatch, capsys, "init", "newswire", tmp_path / "no" / "folder.toml")
    assert (code, "cannot write" in text) == (2, True)


def test_a_plan_is_one_json_object_of_promises(config_file: Path):
    plan = json.loads(run("plan", config_file, "--json", "--set", "privacy.epsilon=3.0"))
    assert {"noise_multiplier", "sampling_rate", "steps", "delta", "trainable_fraction", "bytes_per_client_round"} <= set(plan)
    assert (plan["sampling_rate"], plan["steps"], plan["delta"]) == (0.3, 4, 1e-5)
    assert 2.9 < plan["statement"][0]["epsilon"] <= 3.0
    assert set(plan["statement"][0]) == {"adversary", "unit", "relation", "epsilon", "delta", "assumptions"}
    text = run("plan", config_file)
    assert "noise multiplier" in text
    assert "Against the server: No guarantee" in text


def test_train_evaluate_and_ledger_on_one_run(config_file: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    done = json.loads(run("train", config_file, "--out", out, "--json"))
    assert (done["run"], done["rounds"]) == (str(out), 4)
    assert done["epsilon"] <= 8.0
    assert json.loads(run("evaluate", out, "--json")) == done["metrics"]
    assert "accuracy" in run("evaluate", out)
    shown = json.loads(run("ledger", "show", out, "--json"))
    assert [row["kind"] for row in shown["rows"]] == ["open"] + ["reserve", "commit"] * 4
    assert "4 charges, 4 published releases" in run("ledger", "show", out)
    assert "intact: 9 rows" in run("ledger", "verify", out)
    assert json.loads(run("ledger", "verify", out, "--json"))["rows"] == 9
    assert str(out / "report.html") in run("train", "--resume", out).replace("\n", "") or "Finished" in run(
        "train", "--resume", out
    )

    exported = json.loads(run("ledger", "export", out))
    assert [row["serial"] for row in exported] == list(range(9))
    lines = list(csv.DictReader(run("ledger", "export", out / "ledger.sqlite", "--format", "csv").splitlines()))
    assert lines == [{name: str(value) for name, value in row.items()} for row in exported]

    words = run("statement", out, "--out", tmp_path / "statement.json")
    assert "Against recipients of the model: The protected unit is one example." in words
    signed = json.loads((tmp_path / "statement.json").read_text())
    assert json.loads(run("statement", out, "--json")) == signed
    assert signed["public_key"] in run("verify", tmp_path / "statement.json")
    assert "bears it out" in run("verify", tmp_path / "statement.json", "--run", out)
    assert json.loads(run("verify", tmp_path / "statement.json", "--json"))["statement"] == done["statement"]
    (tmp_path / "statement.json").write_text(json.dumps(signed | {"config": "another"}))
    code, text = failing(monkeypatch, capsys, "verify", tmp_path / "statement.json")
    assert (code, "StatementInvalid" in text) == (2, True)

    code, text = failing(monkeypatch, capsys, "train", config_file, "--out", out)
    assert (code, "never overwritten" in text) == (2, True)
    database = sqlite3.connect(out / "ledger.sqlite")
    with database:
        database.execute("DELETE FROM ledger WHERE serial = 8")
    code, text = failing(monkeypatch, capsys, "ledger", "verify", out)
    assert (code, "rolled back" in text) == (2, True)
    with database:
        database.execute("UPDATE ledger SET round = 9 WHERE serial = 1")
    database.close()
    code, text = failing(monkeypatch, capsys, "ledger", "verify", out)
    assert (code, "was edited" in text) == (2, True)


def test_a_database_of_many_ledgers_is_shown_by_owner(place: Place):
    anna, bert = Ledger.open_all(
        place.where, ["anna / mail", "bert / mail"], budget=Budget(3.0, 1e-5), scope=Scope.LIFETIME, key=place.key
    )
    event, key = GaussianMechanism(3.0).event, SecureRandom.insecure_from(1)
    Ledger.charge_all([anna], event, round=1, purpose="run 1", commitment=key.commitment)
    totals = {row["owner"]: row for row in json.loads(run("ledger", "show", place.where, "--json"))["ledgers"]}
    assert {owner: row["charges"] for owner, row in totals.items()} == {"anna / mail": 1, "bert / mail": 0}
    assert totals["anna / mail"]["epsilon"] == anna.spent().epsilon
    assert "bert / mail" in run("ledger", "show", place.where)
    assert "1 charges, 0 published" in run("ledger", "show", place.where, "--owner", "anna / mail")
    assert "intact: 3 rows of 2 ledgers" in run("ledger", "verify", place.where)
    assert json.loads(run("ledger", "verify", place.where, "--owner", "bert / mail", "--json"))["head"] == bert.head
    assert {row["owner"] for row in json.loads(run("ledger", "export", place.where))} == {"anna / mail", "bert / mail"}


def test_a_run_that_a_participant_cannot_afford_says_who(config_file: Path, tmp_path: Path, monkeypatch, capsys):
    ledger = f"\n[ledger]\ndatabase = '{tmp_path / 'lifetime.sqlite'}'\ndata_set = 'mail'\nepsilon = "
    config_file.write_text(config_file.read_text() + ledger + "0.01\n")
    code, text = failing(monkeypatch, capsys, "train", config_file, "--out", tmp_path / "out")
    assert (code, "client-0 / mail" in text) == (2, True)


def test_an_insecure_seed_is_recorded_and_shouted(config_file: Path, tmp_path: Path):
    text = run("train", config_file, "--out", tmp_path / "seeded", "--insecure-seed", 5)
    assert "NOT PRIVATE" in text
    assert "insecure_seed = 5" in (tmp_path / "seeded" / "config.toml").read_text()


def test_contradictory_and_wrong_arguments_say_what_to_do(config_file: Path, tmp_path: Path, monkeypatch, capsys):
    for arguments in (["train"], ["train", config_file, "--resume", tmp_path]):
        code, text = failing(monkeypatch, capsys, *arguments)
        assert (code, "--resume RUN" in text) == (2, True)
    code, text = failing(monkeypatch, capsys, "train", "--resume", tmp_path, "--insecure-seed", 1)
    assert (code, "do not apply" in text) == (2, True)
    code, text = failing(monkeypatch, capsys, "plan", config_file, "--set", "privacy.epsilon=99")
    assert (code, "allow_weak_privacy" in text) == (2, True)
    code, text = failing(monkeypatch, capsys, "plan", config_file, "--set", "lora.targets=['nothing']")
    assert (code, "Linear layers of this model" in text) == (2, True)
    code, text = failing(monkeypatch, capsys, "plan", config_file, "--set", "lora.rank=33")
    assert (code, "use a rank of at most 32" in text) == (2, True)
    code, text = failing(monkeypatch, capsys, "ledger", "show", tmp_path)
    assert (code, "no ledger" in text) == (2, True)


def test_an_interrupt_has_its_own_exit_code(config_file: Path, tmp_path: Path, monkeypatch, capsys):
    from dp_federated_lora.errors import RunInterrupted

    def interrupted(*_: object, **__: object) -> None:
        raise RunInterrupted("stopped after round 2")

    monkeypatch.setattr("dp_federated_lora.lab.train", interrupted)
    assert failing(monkeypatch, capsys, "train", config_file) == (130, "dpfl: RunInterrupted: stopped after round 2\n")
