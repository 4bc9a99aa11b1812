"""Places for ledgers: a file, and a database in a PostgreSQL cluster that lives as long as the test session."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest


@dataclass(frozen=True)
class Place:
    """Where a test's ledgers lie, and a way to write there behind the ledger's back."""

    where: str
    key: Path

    @property
    def is_file(self) -> bool:
        return "://" not in self.where

    def execute(self, statement: str) -> None:
        if self.is_file:
            database = sqlite3.connect(self.where)
            with database:
                database.execute(statement)
            database.close()
        else:
            import psycopg

            with psycopg.connect(self.where) as connection:
                connection.execute(statement)


def _missing(reason: str) -> None:
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Socket folder of a throw-away cluster (superuser `dpfl`, no password); skipped where PostgreSQL is not installed."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        _missing("PostgreSQL's binaries are not in /usr/lib/postgresql/*/bin: install the package postgresql")
    folder = Path(tempfile.mkdtemp(prefix="dpfl-pg-", dir="/tmp"))  # a socket's path has at most 107 bytes
    unprivileged: dict[str, object] = {}
    if os.geteuid() == 0:  # PostgreSQL does not run as root
        shutil.chown(folder, "nobody", "nogroup")
        unprivileged = {"user": "nobody", "group": "nogroup", "extra_groups": []}

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries[-1].with_name(program)), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, **unprivileged)  # type: ignore[call-overload]

    run("initdb", "--username=dpfl", "--auth=trust", "--no-sync", "--encoding=UTF8")
    run(
        "pg_ctl", "--wait", "--log", str(folder / "log"), "--options", f"-k {folder} -c listen_addresses='' -c fsync=off", "start"
    )
    try:
        yield str(folder)
    finally:
        run("pg_ctl", "--wait", "--mode=immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(postgres: str, tmp_path: Path) -> Place:
    """A new database in PostgreSQL."""
    import psycopg

    name = f"test_{uuid4().hex}"
    with psycopg.connect(f"postgresql://dpfl@/postgres?host={postgres}", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return Place(f"postgresql://dpfl@/{name}?host={postgres}", tmp_path / "ledger.key")


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place for ledgers, once of each kind."""
    if request.param == "sqlite":
        return Place(str(tmp_path / "ledger.sqlite"), tmp_path / "ledger.key")
    database: Place = request.getfixturevalue("database")
    return database
