"""The runs that a coordinator knows, in a database: SQLite by default, PostgreSQL by URL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final, Literal, final

import sqlalchemy as sa

from dp_federated_lora.errors import RunError
from dp_federated_lora.storage import Storage

State = Literal["submitted", "joining", "running", "finished", "stopped", "failed"]

UNFINISHED: Final[tuple[State, ...]] = ("submitted", "joining", "running")


@final
@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run.

    Args:
        run: its name.
        submitter: who submitted it.
        config: TOML, as signed.
        signature: of the submitter.
        submitted: time, UTC, ISO 8601.
        state: where it stands.
        reason: why it ended or waits, in words; empty while all is well.
        stop: who asked for it to stop; empty if nobody did.
    """

    run: str
    submitter: str
    config: str
    signature: str
    submitted: str
    state: str = "submitted"
    reason: str = ""
    stop: str = ""


_TABLE: Final = sa.Table(
    "runs",
    sa.MetaData(),
    *(sa.Column(field.name, sa.Text, nullable=False, primary_key=field.name == "run") for field in fields(RunRecord)),
)


@final
class RunTable:
    """All runs of a coordinator.

    Args:
        where: a file, or a URL `postgresql://user@host/database`.

    Raises:
        StorageError: if it cannot be opened.
    """

    def __init__(self, where: str | Path) -> None:
        self._store = Storage(where, lock_timeout=5.0)
        with self._store.transaction(write=True) as connection:
            _TABLE.create(connection, checkfirst=True)

    def add(self, record: RunRecord) -> None:
        """Take in a new run, durably; the same submission a second time changes nothing.

        Raises:
            RunError: if there is another one of that name.
        """
        with self._store.transaction(write=True) as connection:
            known = connection.execute(sa.select(_TABLE.c.signature).where(_TABLE.c.run == record.run)).scalar()
            if known == record.signature:
                return
            if known is not None:
                raise RunError(f"there is a run {record.run} already: a run is submitted once; give this one another name")
            connection.execute(sa.insert(_TABLE), [asdict(record)])

    def get(self, run: str) -> RunRecord:
        """A run by name.

        Raises:
            RunError: if there is none.
        """
        with self._store.transaction(write=False) as connection:
            found = connection.execute(sa.select(_TABLE).where(_TABLE.c.run == run)).first()
        if found is None:
            raise RunError(f"there is no run {run}; `dpfl runs` lists them")
        return RunRecord(*found)

    def all(self) -> Sequence[RunRecord]:
        """All runs, the oldest first."""
        with self._store.transaction(write=False) as connection:
            rows = connection.execute(sa.select(_TABLE).order_by(_TABLE.c.submitted, _TABLE.c.run)).all()
        return [RunRecord(*row) for row in rows]

    def set(self, run: str, **values: str) -> None:
        """Change fields of a run, durably."""
        with self._store.transaction(write=True) as connection:
            connection.execute(sa.update(_TABLE).where(_TABLE.c.run == run).values(**values))
