"""The durable odometer and filter: every charge is on disk before its noise exists, and overspend is refused.

A ledger is one owner's chain of rows: append-only, each hashed over the one before and signed. Row 0 fixes the budget,
the rule of composition and the public key. A charge is one transaction, so processes never overspend together, and it
survives a crash once `reserve` has returned. Odometers and filters: Rogers et al. 2016, arXiv 1605.08294.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self, final

from dp_accounting import NoOpDpEvent
from sqlalchemy import Connection

from dp_federated_lora.errors import (
    BudgetExhausted,
    BudgetMismatch,
    LedgerCorrupt,
    LedgerKeyLost,
    PrivacyError,
    RoundAlreadyReleased,
    UnsupportedEvent,
)
from dp_federated_lora.privacy.accounting import Composition, DpEvent, event_from_json, event_to_json
from dp_federated_lora.privacy.filters import RenyiFilter
from dp_federated_lora.privacy.permits import Permit, issue
from dp_federated_lora.signing import SigningKey, signature_holds
from dp_federated_lora.storage import LedgerRow, Storage, canonical

_GENESIS: Final = "0" * 64
_COMMITMENT: Final = re.compile(r"[0-9a-f]{64}")


class Scope(Enum):
    """What a budget is for, which decides how its charges compose.

    A run's schedule is fixed before it starts: PLD. Over the lifetime of a data set the next run is chosen after the
    last one's result: a Renyi filter at one order, which is fixed when the ledger is made.
    """

    RUN = "one run"
    LIFETIME = "all runs on a data set"


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
    """What has been charged: epsilon at delta, number of charges, and of those whose release was published."""

    epsilon: float
    delta: float
    charges: int
    released: int


@final
class Ledger:
    """Charges of one owner's budget, in a database that may hold many; made by `open` and `read`."""

    def __init__(self, store: Storage, owner: str, key: SigningKey | None) -> None:
        self.owner = owner
        self._name = f"the ledger of {owner!r} in {store.name}"
        self._store = store
        self._key = key
        self._rows: list[LedgerRow] = []
        self._terms: Mapping[str, Any] = {}  # of row 0
        self._total: Composition | RenyiFilter = Composition()
        self._charges: dict[str, LedgerRow] = {}  # by commitment
        self._published: dict[int, tuple[int, str]] = {}  # round and purpose, by serial of the charge

    @classmethod
    def open(cls, where: str | Path, *, budget: Budget, owner: str, key: Path | None = None, lock_timeout: float = 5.0) -> Self:
        """Create or replay the ledger of one run; arguments and errors are those of `open_all`."""
        return cls.open_all(where, [owner], budget=budget, scope=Scope.RUN, key=key, lock_timeout=lock_timeout)[0]

    @classmethod
    def open_all(
        cls,
        where: str | Path,
        owners: Sequence[str],
        *,
        budget: Budget,
        scope: Scope,
        unit: str | None = None,
        key: Path | None = None,
        lock_timeout: float = 5.0,
    ) -> tuple[Self, ...]:
        """Create ledgers of several owners, or replay and verify existing ones.

        Args:
            where: a file, or a URL `postgresql://user@host/database`.
            owners: whose budgets; distinct.
            budget: of each; must equal the one in an existing ledger.
            scope: what the budget is for; the same.
            unit: the privacy unit whose spend is counted, where owners could mix them up; the same.
            key: file of the signing key, made with the first ledger; default beside the ledger's file, with suffix .key.
            lock_timeout: seconds to wait for another process.

        Raises:
            BudgetMismatch: if a ledger was made for another budget, scope or unit.
            LedgerCorrupt: if a row was edited or the file is not a ledger.
            LedgerKeyLost: if a new ledger needs the key and it is missing.
            LedgerLocked: if another process holds the database.
            StorageError: if the disk refuses.
        """
        if len(set(owners)) != len(owners):
            raise PrivacyError("an owner is named twice: one charge would count for two")
        store = Storage(where, lock_timeout=lock_timeout)
        path = key or store.key_file
        if path is None:
            raise PrivacyError(f"ledgers in {store.name} need the path of their signing key")
        store.create()
        signing = SigningKey.load(path)
        ledgers = tuple(cls(store, owner, signing) for owner in owners)
        with store.transaction(write=False) as connection:
            _catch_up(connection, ledgers)
        limits = {"epsilon": budget.epsilon, "delta": budget.delta}
        terms = {"budget": limits, "format": 2, "scope": scope.value, "unit": unit}
        order = RenyiFilter.for_budget(**limits).order if scope is Scope.LIFETIME else None  # none: PLD
        if not all(ledger._rows for ledger in ledgers):
            _write(store, (), ledgers, lambda: _first_rows(ledgers, path, terms | {"renyi_order": order}))
        for ledger in ledgers:
            made = {name: ledger._terms[name] for name in terms}
            if made != terms:
                raise BudgetMismatch(
                    f"{ledger._name} was made for {made}, not {terms}: a budget is fixed when its ledger is made"
                )
        return ledgers

    @classmethod
    def read(cls, where: str | Path, *, lock_timeout: float = 5.0) -> Self:
        """Open the only ledger of a database to look at, as `read_all` does; BudgetMismatch if there are several."""
        ledgers = cls.read_all(where, lock_timeout=lock_timeout)
        if len(ledgers) > 1:
            raise BudgetMismatch(f"{where} holds {len(ledgers)} ledgers; name an owner, for example {ledgers[0].owner!r}")
        return ledgers[0]

    @classmethod
    def read_all(cls, where: str | Path, owners: Sequence[str] | None = None, *, lock_timeout: float = 5.0) -> tuple[Self, ...]:
        """Open the existing ledgers of `owners`, or of everybody, to look at; verifies chains and their heads' signatures.

        Raises:
            LedgerCorrupt: if there is no such ledger or a row was edited.
            LedgerLocked: if another process holds the database.
        """
        store = Storage(where, lock_timeout=lock_timeout)
        if store.file is not None and not store.file.is_file():
            raise LedgerCorrupt(f"there is no ledger at {where}")
        key = None if store.key_file is None else SigningKey.load(store.key_file)
        ledgers = tuple(cls(store, owner, key) for owner in (store.owners() if owners is None else owners))
        with store.transaction(write=False) as connection:
            _catch_up(connection, ledgers)
        empty = [ledger.owner for ledger in ledgers if not ledger._rows]
        if empty or not ledgers:
            raise LedgerCorrupt(f"{store.name} holds no ledger of {empty[0] if empty else 'anybody'}")
        return ledgers

    def verify(self) -> None:
        """Read everything again; check the chain and the signature of every row.

        Raises:
            LedgerCorrupt: if anything was edited, moved, inserted or deleted.
        """
        with self._store.transaction(write=False) as connection:
            _catch_up(connection, [self])
        for row in self._rows:
            self._check_signature(row, self.public_key)

    @property
    def budget(self) -> Budget:
        """The ceiling, from row 0."""
        return Budget(**self._terms["budget"])

    @property
    def public_key(self) -> str:
        """Ed25519 public key that signed every row, hexadecimal, from row 0."""
        return str(self._terms["public_key"])

    @property
    def head(self) -> str:
        """Hash of the last row; whoever keeps it can notice a rolled-back ledger."""
        return self._rows[-1].hash

    @property
    def commitments(self) -> frozenset[str]:
        """Commitments of all charges: one for every round key whose noise was paid for."""
        return frozenset(self._charges)

    def contains(self, head: str) -> bool:
        """Whether `head` is the hash of a row: false for a ledger older than whoever saw that head."""
        return any(row.hash == head for row in self._rows)

    def rows(self) -> tuple[LedgerRow, ...]:
        """All rows, in order."""
        return tuple(self._rows)

    def spent(self) -> Spend:
        """Total charged so far, published or not."""
        delta = self.budget.delta
        return Spend(self._total.epsilon(delta), delta, len(self._charges), len(self._published))

    def sign(self, purpose: str, content: bytes) -> str:
        """The ledger's signature of `content` for `purpose`; `signature_holds` checks it.

        Raises:
            LedgerKeyLost: if the ledger's key is not here.
        """
        if self._key is None or self._key.public != self.public_key:
            raise LedgerKeyLost(
                f"the private key of {self._name} is not here (public key {self.public_key[:12]}): it can be read, but not "
                "charged or signed for; restore the key's file"
            )
        return self._key.sign(purpose, content)

    def require_room(self, events: Sequence[DpEvent]) -> None:
        """Refuse ahead of time what could not be charged later, one event after the other; nothing is charged.

        Raises:
            BudgetExhausted: if the composed epsilon would exceed the budget.
            LedgerKeyLost: if the ledger's key is not here.
        """
        self.sign("probe", b"")
        total = self._total
        for event in events:
            total = total.with_event(event)
        if not (epsilon := total.epsilon(self.budget.delta)) <= self.budget.epsilon:
            raise BudgetExhausted(
                f"{len(events)} charges would take {self.owner!r} from epsilon {self.spent().epsilon:.4f} to {epsilon:.4f}, over "
                f"the budget of {self.budget.epsilon:g} at delta {self.budget.delta:g} for {self._terms['scope']}"
            )

    def reserve(self, charged: DpEvent, *, round: int, purpose: str, commitment: str) -> Permit:
        """Charge one event of a round, durably, and issue its permit; arguments and errors are those of `charge_all`."""
        (row,) = Ledger.charge_all([self], charged, round=round, purpose=purpose, commitment=commitment)
        return issue(row.serial, round, charged, commitment)

    @staticmethod
    def charge_all(
        ledgers: Sequence[Ledger], charged: DpEvent, *, round: int, purpose: str, commitment: str
    ) -> tuple[LedgerRow, ...]:
        """Charge one event of a round to all of these ledgers or to none, durably, in one transaction.

        An interrupted round whose key still exists re-creates the same release; it shows that by the same commitment and
        is not charged twice. Any other attempt is charged again.

        Args:
            ledgers: opened together.
            charged: the event.
            round: 1-based.
            purpose: what the release is for.
            commitment: SHA-256 of the round's key, 64 hexadecimal digits.

        Raises:
            BudgetExhausted: if a composed epsilon would exceed its budget; nothing is written.
            RoundAlreadyReleased: if this round was published.
            LedgerKeyLost: if a ledger's key is not here.
            PrivacyError: if the key was used for another round.
            StorageError: if the disk refuses; nothing is charged.
        """
        if not _COMMITMENT.fullmatch(commitment):
            raise PrivacyError("a commitment is 64 hexadecimal digits: the SHA-256 of the round's key")
        store = ledgers[0]._store
        if any(ledger._store is not store for ledger in ledgers):
            raise PrivacyError("ledgers that were not opened together cannot be charged in one transaction")
        body = canonical({"commitment": commitment, "event": event_to_json(charged), "purpose": purpose})

        def due() -> list[LedgerRow]:
            unpaid = [ledger for ledger in ledgers if not ledger._has_paid(charged, round, purpose, commitment, body)]
            return [ledger._charge(charged, round, body) for ledger in unpaid]

        _write(store, [ledger.owner for ledger in ledgers], ledgers, due)
        return tuple(ledger._charges[commitment] for ledger in ledgers)

    def commit(self, serial: int) -> None:
        """Record that the release charged in row `serial` was published; a second time changes nothing.

        Raises:
            PrivacyError: if that row is no charge.
        """

        def due() -> list[LedgerRow]:
            row = self._rows[serial] if 0 <= serial < len(self._rows) else None
            if row is None or row.kind != "reserve":
                raise PrivacyError(f"row {serial} of {self._name} is no charge; nothing to commit")
            body = canonical({"of": serial, "purpose": row.facts["purpose"]})
            return [] if serial in self._published else [self._next_row("commit", row.round, body)]

        _write(self._store, [self.owner], [self], due)

    def pending(self) -> LedgerRow | None:
        """The last charge if it was not published: a round under way or interrupted."""
        last = next((row for row in reversed(self._rows) if row.kind == "reserve"), None)
        return None if last is None or last.serial in self._published else last

    def require_open(self, number: int, purpose: str) -> None:
        """Refuse, by `RoundAlreadyReleased`, a round that was published."""
        if (number, purpose) in self._published.values():
            raise RoundAlreadyReleased(f"round {number} ({purpose}) was published; it is never released again")

    def _has_paid(self, charged: DpEvent, number: int, purpose: str, commitment: str, body: str) -> bool:
        self.require_open(number, purpose)
        row = self._charges.get(commitment)
        if row is not None and (row.round, row.body) != (number, body):
            raise PrivacyError(f"the key of round {number} was used before: its noise would repeat; nothing was charged")
        if row is None and isinstance(charged, NoOpDpEvent) and self._has_begun(number, purpose):
            raise PrivacyError(
                f"round {number} was begun under another key and its release may be known: to repeat it, charge the whole run "
                "again; nothing was charged"
            )
        return row is not None

    def _has_begun(self, number: int, purpose: str) -> bool:
        return any((row.round, row.facts["purpose"]) == (number, purpose) for row in self._charges.values())

    def _charge(self, charged: DpEvent, number: int, body: str) -> LedgerRow:
        budget, spent = self.budget, self._total
        total = spent.with_event(charged).epsilon(budget.delta)
        if not total <= budget.epsilon:
            raise BudgetExhausted(
                f"round {number} would take {self.owner!r} from epsilon {spent.epsilon(budget.delta):.4f} to {total:.4f}, over "
                f"the budget of {budget.epsilon:g} at delta {budget.delta:g} for {self._terms['scope']}: nothing was released; "
                "the run ends here"
            )
        return self._next_row("reserve", number, body)

    def _next_row(self, kind: str, number: int, body: str) -> LedgerRow:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        row = LedgerRow(self.owner, len(self._rows), kind, number, body, time, self.head if self._rows else _GENESIS)
        digest = row.expected_hash()
        return replace(row, hash=digest, signature=self.sign("row", bytes.fromhex(digest)))

    def _check(self, fresh: Sequence[LedgerRow]) -> None:
        """Verify rows that follow the known ones; the signature of the last covers them all."""
        previous = self.head if self._rows else _GENESIS
        for serial, row in enumerate(fresh, start=len(self._rows)):
            if row.serial != serial or row.previous != previous or row.hash != row.expected_hash():
                raise LedgerCorrupt(
                    f"row {serial} of {self._name} was edited, moved or follows a deleted row; nothing can be charged to it: "
                    "restore it from a backup that is not older than the last run"
                )
            if (row.kind == "open") != (serial == 0) or row.kind not in ("open", "reserve", "commit"):
                raise LedgerCorrupt(f"row {serial} of {self._name} has the impossible kind {row.kind!r}")
            previous = row.hash
        if fresh:
            self._check_signature(fresh[-1], str((self._terms or fresh[0].facts).get("public_key")))

    def _check_signature(self, row: LedgerRow, public: str) -> None:
        if not signature_holds(public, "row", bytes.fromhex(row.hash), row.signature):
            raise LedgerCorrupt(
                f"row {row.serial} of {self._name} is not signed by its key: it was edited, or never written by this software"
            )

    def _accept(self, row: LedgerRow) -> None:
        """Take in a verified row that is in the database."""
        try:
            facts = row.facts
            if row.kind == "open":
                order, self._terms = facts["renyi_order"], facts
                self._total = Composition() if order is None else RenyiFilter(int(order))
            elif row.kind == "reserve":
                self._total = self._total.with_event(event_from_json(facts["event"]))
                self._charges[facts["commitment"]] = row
            else:
                self._published[facts["of"]] = (row.round, facts["purpose"])
        except (UnsupportedEvent, KeyError, ValueError) as error:
            raise LedgerCorrupt(f"row {row.serial} of {self._name} cannot be read: {error}") from error
        self._rows.append(row)


def _catch_up(connection: Connection, ledgers: Sequence[Ledger]) -> None:
    """Compare stored rows with known ones, verify the rest and take it in.

    One chain is compared whole; of many only what follows their known heads, or each round would cost more than the last.
    """
    if not ledgers:
        return
    start = {ledger.owner: 0 if len(ledgers) == 1 else max(len(ledger._rows) - 1, 0) for ledger in ledgers}
    stored = ledgers[0]._store.rows(connection, start)
    for ledger in ledgers:
        rows, known = stored[ledger.owner], ledger._rows[start[ledger.owner] :]
        if rows[: len(known)] != known:
            raise LedgerCorrupt(f"rows of {ledger._name} changed or vanished while it was open")
        fresh = rows[len(known) :]
        ledger._check(fresh)
        for row in fresh:
            ledger._accept(row)


def _write(store: Storage, locked: Sequence[str], ledgers: Sequence[Ledger], due: Callable[[], list[LedgerRow]]) -> None:
    """Catch up and add the rows that are `due` then, in one transaction; they count once they are on disk."""
    with store.transaction(write=True, owners=locked) as connection:
        _catch_up(connection, ledgers)
        rows = due()
        store.insert(connection, rows)
    by_owner = {ledger.owner: ledger for ledger in ledgers}
    for row in rows:
        by_owner[row.owner]._accept(row)


def _first_rows(ledgers: Sequence[Ledger], path: Path, terms: Mapping[str, Any]) -> list[LedgerRow]:
    new = [ledger for ledger in ledgers if not ledger._rows]
    key = SigningKey.load(path)
    if key is None and len(new) < len(ledgers):
        raise LedgerKeyLost(f"{path} is missing, but some of these ledgers were signed with it: restore it from a backup")
    key = key or SigningKey.create(path)
    for ledger in new:
        ledger._key, ledger._terms = key, {**terms, "public_key": key.public}
    return [ledger._next_row("open", 0, canonical(ledger._terms)) for ledger in new]
