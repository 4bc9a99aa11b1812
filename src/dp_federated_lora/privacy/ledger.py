"""The durable odometer and filter: every charge is on disk before its noise exists, and overspend is refused.

Rows are append-only and hash-chained; row 0 fixes the budget. A charge is made in one immediate transaction with full
synchronisation, so processes that share a file never overspend together, and a charge survives a crash once
`reserve` has returned. Odometers and filters: Rogers et al. 2016, arXiv 1605.08294.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, Self, final

from dp_accounting import NoOpDpEvent
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    select,
)
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from dp_federated_lora.errors import (
    BudgetExhausted,
    BudgetMismatch,
    LedgerCorrupt,
    LedgerLocked,
    PermitMismatch,
    PermitSpent,
    PrivacyError,
    RoundAlreadyReleased,
    StorageError,
    UnsupportedEvent,
)
from dp_federated_lora.privacy.accounting import Composition, DpEvent, event_from_json, event_to_json

_FORMAT: Final = 1
_GENESIS: Final = "0" * 64
_COMMITMENT: Final = re.compile(r"[0-9a-f]{64}")
_SEAL: Final = object()
_TABLE: Final = Table(
    "ledger",
    MetaData(),
    Column("serial", Integer, primary_key=True, autoincrement=False),
    Column("kind", String, nullable=False),
    Column("round", Integer, nullable=False),
    Column("body", Text, nullable=False),
    Column("time", String, nullable=False),
    Column("previous", String, nullable=False),
    Column("hash", String, nullable=False),
)


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """The ceiling of a ledger.

    Args:
        epsilon: positive, finite.
        delta: in (0, 1).

    Raises:
        PrivacyError: if out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0 and 0 < self.delta < 1):
            raise PrivacyError(f"a budget has a positive finite epsilon and a delta in (0, 1), got {self}")


@final
@dataclass(frozen=True, slots=True)
class Spend:
    """What has been charged: epsilon at delta, number of charges, number of published rounds."""

    epsilon: float
    delta: float
    charges: int
    released: int


@final
@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One row as stored; kind is "open", "reserve" or "commit"."""

    serial: int
    kind: str
    round: int
    body: str
    time: str
    previous: str
    hash: str

    @property
    def facts(self) -> dict[str, Any]:
        """The decoded body."""
        decoded: dict[str, Any] = json.loads(self.body)
        return decoded

    def expected_hash(self) -> str:
        """SHA-256 over everything else in the row, which includes the previous row's hash."""
        content = [self.serial, self.kind, self.round, self.body, self.time, self.previous]
        return hashlib.sha256(_canonical(content).encode()).hexdigest()


@final
class Permit:
    """Proof that an event is charged; buys one release. Made by `Ledger.reserve` only."""

    __slots__ = ("_spent", "commitment", "event", "round", "serial")

    def __init__(self, seal: object, serial: int, number: int, charged: DpEvent, commitment: str) -> None:
        if seal is not _SEAL:
            raise PrivacyError("a permit is issued by Ledger.reserve, never made by hand")
        self.serial, self.round, self.event, self.commitment = serial, number, charged, commitment
        self._spent = False

    def burn(self, charged: DpEvent, commitment: str) -> None:
        """Use the permit up; called before noise is drawn.

        Raises:
            PermitSpent: if it was used before.
            PermitMismatch: if the release is of another event or from another stream than charged.
        """
        if self._spent:
            raise PermitSpent(f"the permit of round {self.round} has bought its release; reserve the next round")
        if charged != self.event or commitment != self.commitment:
            raise PermitMismatch(
                f"the permit of round {self.round} is for {self.event} from stream {self.commitment[:12]}, the release is "
                f"{charged} from {commitment[:12]}: nothing was released"
            )
        self._spent = True

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("a permit cannot be pickled or copied: it buys one release")


@final
class Ledger:
    """Charges of one budget, in one SQLite file.

    Use `open` or `read`; the constructor is for them.
    """

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine = engine
        self._path = path
        self._rows: list[LedgerRow] = []
        self._composition = Composition()

    @classmethod
    def open(cls, path: Path, *, budget: Budget, owner: str, lock_timeout: float = 5.0) -> Self:
        """Create a ledger, or replay and verify an existing one.

        Args:
            path: the file.
            budget: must equal the one in the file.
            owner: whose budget it is; must equal the one in the file.
            lock_timeout: seconds to wait for another process.

        Raises:
            BudgetMismatch: if the file holds another budget or owner.
            LedgerCorrupt: if a row was edited or the file is not a ledger.
            LedgerLocked: if another process holds the file.
            StorageError: if the disk refuses.
        """
        ledger = cls(_engine(path, lock_timeout), path)
        with ledger._transaction(write=True) as connection:
            _TABLE.create(connection, checkfirst=True)
            ledger._replay(connection)
            if not ledger._rows:
                body = {
                    "budget": {"epsilon": budget.epsilon, "delta": budget.delta},
                    "format": _FORMAT,
                    "id": secrets.token_hex(16),
                    "owner": owner,
                }
                ledger._append(connection, "open", 0, body)
        if ledger.budget != budget or ledger.owner != owner:
            raise BudgetMismatch(
                f"{path} holds {ledger.budget} of {ledger.owner!r}, not {budget} of {owner!r}: a budget is fixed when its "
                "ledger is made"
            )
        return ledger

    @classmethod
    def read(cls, path: Path, *, lock_timeout: float = 5.0) -> Self:
        """Open an existing ledger to look at; verifies every row.

        Raises:
            LedgerCorrupt: if there is no ledger or a row was edited.
            LedgerLocked: if another process holds the file.
        """
        if not path.is_file():
            raise LedgerCorrupt(f"there is no ledger at {path}")
        ledger = cls(_engine(path, lock_timeout), path)
        ledger.refresh()
        if not ledger._rows:
            raise LedgerCorrupt(f"{path} is empty: not even its budget is in it")
        return ledger

    def refresh(self) -> None:
        """Read and verify rows that other processes added."""
        with self._transaction(write=False) as connection:
            self._replay(connection)

    @property
    def budget(self) -> Budget:
        """The ceiling, from row 0."""
        return Budget(**self._rows[0].facts["budget"])

    @property
    def owner(self) -> str:
        """Whose budget it is, from row 0."""
        return str(self._rows[0].facts["owner"])

    @property
    def head(self) -> str:
        """Hash of the last row; whoever keeps it can notice a rolled-back ledger."""
        return self._rows[-1].hash

    def contains(self, head: str) -> bool:
        """Whether `head` is the hash of a row: false for a ledger older than whoever saw that head."""
        return any(row.hash == head for row in self._rows)

    def rows(self) -> tuple[LedgerRow, ...]:
        """All rows, in order."""
        return tuple(self._rows)

    def spent(self) -> Spend:
        """Total charged so far, published or not."""
        kinds = [row.kind for row in self._rows]
        return Spend(
            self._composition.epsilon(self.budget.delta),
            self.budget.delta,
            kinds.count("reserve"),
            kinds.count("commit"),
        )

    def reserve(self, charged: DpEvent, *, round: int, purpose: str, commitment: str) -> Permit:  # noqa: A002
        """Charge one event of a round, durably, and issue its permit.

        An interrupted round whose key still exists re-creates the same release; it shows that by the same commitment and gets a
        permit for the charge it has already paid. Any other attempt is charged again.

        Args:
            charged: the event.
            round: 1-based.
            purpose: what the release is for.
            commitment: SHA-256 of the round's key, 64 hexadecimal digits.

        Raises:
            BudgetExhausted: if the composed epsilon would exceed the budget; nothing is written.
            RoundAlreadyReleased: if this round was published.
            PrivacyError: if the key was used for another round.
            StorageError: if the disk refuses; nothing is charged.
        """
        if not _COMMITMENT.fullmatch(commitment):
            raise PrivacyError("a commitment is 64 hexadecimal digits: the SHA-256 of the round's key")
        body = {"commitment": commitment, "event": event_to_json(charged), "purpose": purpose}
        with self._transaction(write=True) as connection:
            self._replay(connection)
            earlier = self._same_round(round, purpose)
            if earlier is not None and earlier.body == _canonical(body):
                return Permit(_SEAL, earlier.serial, round, charged, commitment)
            if earlier is not None and isinstance(charged, NoOpDpEvent):
                raise PrivacyError(
                    f"round {round} was begun under another key and its release may be known: to repeat it, charge the whole run "
                    "again; nothing was charged"
                )
            if any(row.kind == "reserve" and row.facts["commitment"] == commitment for row in self._rows):
                raise PrivacyError(f"the key of round {round} was used before: its noise would repeat; nothing was charged")
            after = self._composition.with_event(charged)
            total, budget = after.epsilon(self.budget.delta), self.budget
            if not total <= budget.epsilon:
                raise BudgetExhausted(
                    f"round {round} would take epsilon from {self.spent().epsilon:.4f} to {total:.4f}, over the budget of "
                    f"{budget.epsilon:g} at delta {budget.delta:g}: nothing was released; the run ends here"
                )
            row = self._append(connection, "reserve", round, body)
        return Permit(_SEAL, row.serial, round, charged, commitment)

    def commit(self, serial: int) -> None:
        """Record that the release charged in row `serial` was published; a second time changes nothing.

        Raises:
            PrivacyError: if that row is no charge.
        """
        with self._transaction(write=True) as connection:
            self._replay(connection)
            row = self._rows[serial] if 0 <= serial < len(self._rows) else None
            if row is None or row.kind != "reserve":
                raise PrivacyError(f"row {serial} of {self._path} is no charge; nothing to commit")
            if not self._committed(serial):
                self._append(connection, "commit", row.round, {"of": serial, "purpose": row.facts["purpose"]})

    def pending(self) -> LedgerRow | None:
        """The last charge if it was not published: a round under way or interrupted."""
        last = next((row for row in reversed(self._rows) if row.kind == "reserve"), None)
        return None if last is None or self._committed(last.serial) else last

    def _committed(self, serial: int) -> bool:
        return any(row.kind == "commit" and row.facts["of"] == serial for row in reversed(self._rows))

    def _same_round(self, number: int, purpose: str) -> LedgerRow | None:
        """The last charge of this round and purpose, if it was not published."""
        found = None
        for row in self._rows:
            if row.round == number and row.kind != "open" and row.facts["purpose"] == purpose:
                if row.kind == "commit":
                    raise RoundAlreadyReleased(f"round {number} ({purpose}) was published; it is never released again")
                found = row
        return found

    def _append(self, connection: Connection, kind: str, number: int, body: dict[str, Any]) -> LedgerRow:
        serial, previous = len(self._rows), self.head if self._rows else _GENESIS
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        unsigned = LedgerRow(serial, kind, number, _canonical(body), time, previous, "")
        row = replace(unsigned, hash=unsigned.expected_hash())
        connection.execute(insert(_TABLE).values(dict(zip(_TABLE.columns.keys(), _fields(row), strict=True))))
        self._accept(row)
        return row

    def _replay(self, connection: Connection) -> None:
        """Verify and take in the rows after those already known."""
        stored = connection.execute(select(_TABLE).order_by(_TABLE.c.serial)).all()
        if [tuple(r) for r in stored[: len(self._rows)]] != [_fields(row) for row in self._rows]:
            raise LedgerCorrupt(f"{self._path}: rows changed or vanished while the ledger was open")
        for record in stored[len(self._rows) :]:
            self._accept(self._verified(record))

    def _verified(self, record: Row[Any]) -> LedgerRow:
        row, serial = LedgerRow(**record._mapping), len(self._rows)
        previous = self.head if self._rows else _GENESIS
        if row.serial != serial or row.previous != previous or row.hash != row.expected_hash():
            raise LedgerCorrupt(
                f"{self._path}: row {serial} was edited, moved or follows a deleted row; nothing can be charged to this "
                "ledger: restore it from a backup that is not older than the last run"
            )
        if (row.kind == "open") != (serial == 0) or row.kind not in ("open", "reserve", "commit"):
            raise LedgerCorrupt(f"{self._path}: row {serial} has the impossible kind {row.kind!r}")
        return row

    def _accept(self, row: LedgerRow) -> None:
        try:
            if row.kind == "reserve":
                self._composition = self._composition.with_event(event_from_json(row.facts["event"]))
        except (UnsupportedEvent, KeyError, ValueError) as error:
            raise LedgerCorrupt(f"{self._path}: row {row.serial} cannot be read: {error}") from error
        self._rows.append(row)

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[Connection]:
        """One transaction; its rows and composition are forgotten again if it does not reach the disk."""
        rows, composition = list(self._rows), self._composition
        try:
            with self._engine.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
                yield connection
                connection.commit()
        except BaseException as error:
            self._rows, self._composition = rows, composition
            if isinstance(error, OperationalError):
                raise self._storage_error(error) from error
            if isinstance(error, DatabaseError):
                raise LedgerCorrupt(f"{self._path} is not a ledger: {error.orig}") from error
            raise

    def _storage_error(self, error: OperationalError) -> PrivacyError | StorageError:
        text = str(error.orig)
        if "locked" in text:
            return LedgerLocked(f"another process holds {self._path}; wait for it to finish, then try again")
        if "no such table" in text:
            return LedgerCorrupt(f"{self._path} is not a ledger: {text}")
        return StorageError(f"the ledger {self._path} cannot be written ({text}); nothing was charged or released")


def _fields(row: LedgerRow) -> tuple[Any, ...]:
    return (row.serial, row.kind, row.round, row.body, row.time, row.previous, row.hash)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _engine(path: Path, lock_timeout: float) -> Engine:
    # isolation_level None: the driver begins no transaction of its own, so BEGIN IMMEDIATE above is the one.
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=NullPool,
        connect_args={"timeout": lock_timeout, "isolation_level": None},
    )

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, _: Any) -> None:
        # A rollback journal with full synchronisation: a commit has reached the disk when it returns.
        connection.execute("PRAGMA synchronous=FULL")

    return engine
