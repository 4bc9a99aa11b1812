"""Where ledger rows live: one table in an SQLite file or a PostgreSQL database, written one transaction at a time.

A commit has reached the disk when it returns, and writers of one owner's chain wait for each other: on SQLite all
writers of the file (BEGIN IMMEDIATE), on PostgreSQL those of the same owner (its first row is locked FOR UPDATE).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, cast, final

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from dp_federated_lora.errors import LedgerCorrupt, LedgerLocked, PrivacyError, StorageError

_KEY: Final = ("owner", "serial")


@final
@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One row of the table; kind is "open", "reserve" or "commit"."""

    owner: str
    serial: int
    kind: str
    round: int
    body: str
    time: str
    previous: str
    hash: str = ""
    signature: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """The decoded body."""
        return cast("dict[str, Any]", json.loads(self.body))

    def expected_hash(self) -> str:
        """SHA-256 over everything before `hash`, which includes the previous row's hash."""
        content = [self.owner, self.serial, self.kind, self.round, self.body, self.time, self.previous]
        return hashlib.sha256(canonical(content).encode()).hexdigest()


_TABLE: Final = sa.Table(
    "ledger",
    sa.MetaData(),
    *(
        sa.Column(field.name, sa.Integer if field.type == "int" else sa.Text, nullable=False, primary_key=field.name in _KEY)
        for field in fields(LedgerRow)
    ),
)


@final
class Storage:
    """The rows of all ledgers in one database.

    Args:
        where: a file, or a URL `postgresql://user@host/database`.
        lock_timeout: seconds to wait for another process.
    """

    def __init__(self, where: str | Path, *, lock_timeout: float) -> None:
        self.file = None if "://" in str(where) else Path(where)
        self.key_file = None if self.file is None else self.file.with_suffix(".key")
        self._lock_timeout = lock_timeout
        url = _postgresql(str(where)) if self.file is None else sa.URL.create("sqlite", database=str(self.file))
        self.name = str(self.file or url.render_as_string(hide_password=True))
        # isolation_level None: SQLite's driver begins no transaction of its own, so BEGIN IMMEDIATE below is the one.
        options = {"timeout": lock_timeout, "isolation_level": None} if self.file else {}
        try:
            self._engine = sa.create_engine(url, poolclass=NullPool, connect_args=options)
        except ModuleNotFoundError as error:
            raise StorageError('PostgreSQL needs a driver: pip install "dp-federated-lora-lab[postgres]"') from error

    @contextmanager
    def transaction(self, *, write: bool, owners: Sequence[str] = ()) -> Iterator[sa.Connection]:
        """One transaction, undone as a whole if it does not reach the disk; errors become those of this package.

        A write continues the chains of `owners`, or begins new ones if none are given; reading one SELECT needs no lock.
        """
        try:
            with self._engine.connect() as connection:
                if write and self.file is not None:
                    connection.exec_driver_sql("PRAGMA synchronous=FULL")  # with the rollback journal, the default
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                elif write:
                    self._lock(connection, owners)
                yield connection
                connection.commit()
        except DatabaseError as error:
            raise self._explained(error) from error

    def _lock(self, connection: sa.Connection, owners: Sequence[str]) -> None:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {round(1000 * self._lock_timeout)}")
        connection.exec_driver_sql(
            "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
        )
        if owners:
            first = sa.select(_TABLE.c.owner).where(_TABLE.c.owner.in_(owners), _TABLE.c.serial == 0)
            connection.execute(first.order_by(_TABLE.c.owner).with_for_update())  # in one order: no deadlock
        else:
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1684104812)")  # chains begin one by one; any number

    def create(self) -> None:
        """Make the table if it is not there."""
        with self.transaction(write=True) as connection:
            _TABLE.create(connection, checkfirst=True)

    def owners(self) -> list[str]:
        """Everybody who has a ledger here, sorted."""
        with self.transaction(write=False) as connection:
            return sorted(connection.execute(sa.select(_TABLE.c.owner).distinct()).scalars(), key=str)

    def rows(self, connection: sa.Connection, start: Mapping[str, int]) -> dict[str, list[LedgerRow]]:
        """Rows of each owner from the serial number in `start` on."""
        wanted = sa.values(_TABLE.c.owner, _TABLE.c.serial).data(list(start.items())).cte("wanted")
        join = (_TABLE.c.owner == wanted.c.owner) & (_TABLE.c.serial >= wanted.c.serial)
        query = sa.select(_TABLE).join(wanted, join).order_by(_TABLE.c.owner, _TABLE.c.serial)
        found: dict[str, list[LedgerRow]] = {owner: [] for owner in start}
        for record in connection.execute(query).all():
            found[record.owner].append(LedgerRow(*record))
        return found

    def insert(self, connection: sa.Connection, rows: Sequence[LedgerRow]) -> None:
        """Add rows."""
        if rows:
            connection.execute(sa.insert(_TABLE), [asdict(row) for row in rows])

    def _explained(self, error: DatabaseError) -> PrivacyError | StorageError:
        text = str(error.orig).strip()
        if "locked" in text or getattr(error.orig, "sqlstate", "") in ("55P03", "40P01"):  # lock not available, deadlock
            return LedgerLocked(f"another process holds {self.name}; wait for it to finish, then try again")
        if isinstance(error, OperationalError) and "no such" not in text:
            return StorageError(f"the ledger {self.name} cannot be reached or written ({text}); nothing was charged or released")
        return LedgerCorrupt(f"{self.name} is not a ledger of this version: {text}")


def _postgresql(where: str) -> sa.URL:
    try:
        url = sa.make_url(where)
    except ArgumentError:
        raise StorageError("not a database URL; write postgresql://user@host/database") from None  # may hold a password
    if url.get_backend_name() != "postgresql":
        raise StorageError(f"a ledger lives in a file or in postgresql://, not in {url.get_backend_name()}://")
    return url.set(drivername="postgresql+psycopg")


def canonical(value: Any) -> str:
    """The one JSON text of a value, for hashing and signing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
