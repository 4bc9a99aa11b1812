"""The audit log: every kind of tampering is found, and no crash loses what was acknowledged."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dp_federated_lora.cli import main as cli
from dp_federated_lora.errors import AuditLogCorrupt, LedgerKeyLost, StorageError
from dp_federated_lora.network.audit_log import AuditEntry, AuditLog, verify

RUNNER = CliRunner()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path: Path) -> AuditLog:
    """Six entries: the one that begins it, and five others."""
    opened = AuditLog.open(path)
    for number in range(1, 6):
        opened.append("alice", "run submitted", {"number": number, "epsilon": number / 4, "paused": False, "note": None})
    return opened


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def write(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def test_entries_are_read_back_as_they_were_appended(log: AuditLog, path: Path):
    entry = AuditLog.open(path).append(
        "Zoë\n", 'run "1" stopped', {"text": 'a "b"\n\u2028\ud800', "big": 10**30, "small": 1e-300}
    )
    trail = verify(path, log.public_key)
    assert trail.entries[-1] == entry
    assert [each.number for each in trail.entries] == list(range(7))
    assert trail.entries[3].facts == {"number": 3, "epsilon": 0.75, "paused": False, "note": None}
    assert (trail.entries[0].act, trail.public_key, trail.head, trail.torn) == ("begun", log.public_key, entry.hash, 0)
    assert len(lines_of(path)) == 7
    assert {path.stat().st_mode & 0o777, path.with_suffix(".key").stat().st_mode & 0o777} == {0o600}


@pytest.mark.parametrize(
    "value",
    [[1], {"a": 1}, (1,), b"x", float("nan"), float("inf"), object(), 1j, AuditLog],
    ids=lambda value: type(value).__name__,
)
def test_a_fact_is_a_json_scalar_and_nothing_else(log: AuditLog, path: Path, value: object):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="fact 'x' of an audit log is text"):
        log.append("alice", "run submitted", {"x": value})  # type: ignore[dict-item]
    assert path.read_bytes() == before


def changed(line: bytes, **facts: object) -> bytes:
    """The line with other fields and a fitting hash: what somebody can make who does not have the key."""
    entry = replace(AuditEntry(**json.loads(line)), **facts)  # type: ignore[arg-type]
    return replace(entry, hash=entry.expected_hash()).line


def edited(lines: list[bytes], at: int) -> list[bytes]:
    return [*lines[:at], lines[at].replace(b'"facts":{', b'"facts":{"aaa":1,'), *lines[at + 1 :]]


TAMPERING: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "edited": edited,
    "edited and hashed anew": lambda lines, at: [*lines[:at], changed(lines[at], actor="bob"), *lines[at + 1 :]],
    "another time": lambda lines, at: [*lines[:at], changed(lines[at], time="2020-01-01"), *lines[at + 1 :]],
    "without its signature": lambda lines, at: [*lines[:at], changed(lines[at], signature=""), *lines[at + 1 :]],
    "a signature that is no text": lambda lines, at: [*lines[:at], changed(lines[at], signature=5), *lines[at + 1 :]],
    "written another way": lambda lines, at: [*lines[:at], lines[at].replace(b":", b": ", 1), *lines[at + 1 :]],
    "a key twice": lambda lines, at: [*lines[:at], lines[at].replace(b"{", b'{"act":"x",', 1), *lines[at + 1 :]],
    "a key more": lambda lines, at: [*lines[:at], lines[at].replace(b"{", b'{"zzz":"x",', 1), *lines[at + 1 :]],
    "facts that are none": lambda lines, at: [*lines[:at], changed(lines[at], facts=[]), *lines[at + 1 :]],
    "no JSON": lambda lines, at: [*lines[:at], b"\xff\0", *lines[at + 1 :]],
    "no entry": lambda lines, at: [*lines[:at], b"[" * 100_000, *lines[at + 1 :]],
    "emptied": lambda lines, at: [*lines[:at], b"", *lines[at + 1 :]],
    "cut in the middle": lambda lines, at: [*lines[:at], lines[at][:40], *lines[at + 1 :]],
    "inserted again": lambda lines, at: [*lines[:at], lines[at - 1], *lines[at:]],
    "inserted, hashed": lambda lines, at: [*lines[:at], changed(lines[at], act="y"), *lines[at:]],
}
# These need an entry after it to be seen.
IN_THE_MIDDLE: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "removed": lambda lines, at: [*lines[:at], *lines[at + 1 :]],
    "all up to the last removed": lambda lines, at: [*lines[:at], lines[-1]],
    "swapped with the next": lambda lines, at: [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]],
    "last one moved up": lambda lines, at: [*lines[:at], lines[-1], *lines[at:-1]],
    "joined with the next": lambda lines, at: [*lines[:at], b"".join(lines[at : at + 2]), *lines[at + 2 :]],
}
CASES = [(kind, at) for kind in TAMPERING for at in (0, 1, 3, 5)] + [(kind, at) for kind in IN_THE_MIDDLE for at in (0, 1, 3)]


@pytest.mark.parametrize(("kind", "at"), CASES)
def test_the_first_entry_that_was_tampered_with_is_named(log: AuditLog, path: Path, kind: str, at: int):
    write(path, (TAMPERING | IN_THE_MIDDLE)[kind](lines_of(path), at))
    before = path.read_bytes()
    with pytest.raises(AuditLogCorrupt, match=rf"entry {at} of .*audit\.jsonl \(line {at + 1}\)"):
        verify(path, log.public_key)
    with pytest.raises(AuditLogCorrupt):
        AuditLog.open(path)
    assert path.read_bytes() == before


def test_an_entry_of_another_log_with_the_same_key_is_no_entry_here(log: AuditLog, path: Path, tmp_path: Path):
    twin = tmp_path / "twin.jsonl"
    shutil.copy(path, twin)
    other = AuditLog.open(twin, key=path.with_suffix(".key"))
    for opened, act in ((log, "run stopped"), (other, "run begun")):
        opened.append("alice", act)
        opened.append("alice", act)
    write(path, [*lines_of(path)[:7], lines_of(twin)[7]])
    with pytest.raises(AuditLogCorrupt, match="entry 7 .* was moved"):
        verify(path)


def test_a_log_that_was_signed_anew_is_of_another_key(log: AuditLog, path: Path, tmp_path: Path):
    forged = AuditLog.open(tmp_path / "forged.jsonl")
    assert verify(tmp_path / "forged.jsonl").public_key == forged.public_key
    with pytest.raises(AuditLogCorrupt, match=f"entry 0 .* not signed by the key {log.public_key[:12]}"):
        verify(tmp_path / "forged.jsonl", log.public_key)
    with pytest.raises(AuditLogCorrupt, match="entry 0"):
        AuditLog.open(tmp_path / "forged.jsonl", key=path.with_suffix(".key"))


def test_last_entries_that_were_removed_are_missed_by_whoever_kept_a_hash(log: AuditLog, path: Path):
    head = verify(path).head
    write(path, lines_of(path)[:-1])
    assert not verify(path).contains(head)
    assert verify(path).contains(verify(path).head)
    with pytest.raises(AuditLogCorrupt, match="changed while it was open"):
        log.append("alice", "run submitted")


def test_a_torn_last_line_is_removed_on_opening_wherever_it_ends_and_noted(log: AuditLog, path: Path):
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in (start + 1, start + 50, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert (verify(path).torn, len(verify(path).entries)) == (end - start, 5)
        entry = AuditLog.open(path).append("alice", "run submitted")
        trail = verify(path, log.public_key)
        assert (trail.torn, entry.number, len(trail.entries)) == (0, 6, 7)
        assert (trail.entries[5].act, trail.entries[5].facts["bytes"]) == ("torn line removed", end - start)


def test_a_writer_that_is_open_already_removes_the_torn_line_of_another(log: AuditLog, path: Path):
    with path.open("ab") as file:
        file.write(b'{"act":')
    log.append("alice", "run submitted")
    assert [entry.act for entry in verify(path).entries[-2:]] == ["torn line removed", "run submitted"]


def test_a_log_whose_first_line_is_torn_is_begun_again(log: AuditLog, path: Path):
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(AuditLogCorrupt, match="holds no entry"):
        verify(path)
    AuditLog.open(path)
    assert [entry.act for entry in verify(path, log.public_key).entries] == ["begun", "torn line removed"]


def test_what_the_disk_refuses_is_not_in_the_log(log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch):
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"audit\.jsonl cannot be written \(No space left"):
            log.append("alice", "run submitted")
    assert path.read_bytes() == before
    assert log.append("alice", "run submitted").number == 6
    assert len(verify(path).entries) == 7


def test_a_log_without_its_key_or_file_is_not_used(log: AuditLog, path: Path, tmp_path: Path):
    path.with_suffix(".key").rename(tmp_path / "safe.key")
    with pytest.raises(LedgerKeyLost, match=r"audit\.key, the key that signs it, is not here"):
        AuditLog.open(path)
    assert not path.with_suffix(".key").exists()
    assert AuditLog.open(path, key=tmp_path / "safe.key").append("alice", "run submitted").number == 6
    with pytest.raises(StorageError, match=r"none\.jsonl cannot be read \(No such file"):
        verify(tmp_path / "none.jsonl")
    with pytest.raises(StorageError, match="cannot be written"):
        AuditLog.open(tmp_path / "no" / "folder.jsonl", key=tmp_path / "safe.key")


WRITER = """
import sys
from pathlib import Path
from dp_federated_lora.network.audit_log import AuditLog
log = AuditLog.open(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    entry = log.append(sys.argv[2], "run submitted", {"number": number, "padding": "x" * 3000})
    print(entry.number, entry.hash, flush=True)
"""


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_begin_and_append_at_the_same_time_share_one_chain(path: Path):
    both = [writer(path, name, 60) for name in ("one", "two")]
    said = [process.communicate(timeout=60)[0].split("\n") for process in both]
    assert [process.returncode for process in both] == [0, 0]
    entries = verify(path).entries
    assert len(entries) == 121
    for name, lines in zip(("one", "two"), said, strict=True):
        own = [entry for entry in entries if entry.actor == name]
        assert [entry.facts["number"] for entry in own] == list(range(60))
        assert [f"{entry.number} {entry.hash}" for entry in own] == lines[:-1]


def test_kill_9_loses_nothing_that_append_returned_for(path: Path):
    acknowledged: list[str] = []
    for after in (1, 7, 20):
        process = writer(path, "one", 100_000)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after)]
        process.kill()
        rest = process.stdout.read().splitlines(keepends=True)
        process.stdout.close()
        assert process.wait() == -9
        acknowledged += [line.strip() for line in [*lines, *rest] if line.endswith("\n")]
        AuditLog.open(path)
        found = {f"{entry.number} {entry.hash}" for entry in verify(path).entries}
        assert set(acknowledged) <= found
    assert len(acknowledged) >= 28


def run(*arguments: object) -> str:
    result = RUNNER.invoke(cli.app, ["audit-log", *(str(each) for each in arguments)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def test_the_commands_verify_and_show_a_log(log: AuditLog, path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    for command in ("verify", "show"):
        assert f"Example: dpfl audit-log {command}" in run(command, "--help")
    facts = json.loads(run("verify", path, "--json", "--public-key", log.public_key))
    assert facts == {"entries": 6, "head": verify(path).head, "public_key": log.public_key, "torn_bytes": 0}
    assert "intact: 6 entries" in run("verify", path, "--head", facts["head"])
    assert [entry["act"] for entry in json.loads(run("show", path, "--json"))] == ["begun"] + ["run submitted"] * 5
    assert "alice" in run("show", path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes of an unfinished last line" in run("verify", path)
    monkeypatch.setattr("sys.argv", ["dpfl", "audit-log", "verify", str(path), "--head", facts["head"]])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "AuditLogCorrupt" in capsys.readouterr().err
