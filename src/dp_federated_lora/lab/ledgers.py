"""Ledgers around a run: where they lie, what bears witness to them, and the budgets of participants over all runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import final

from dp_federated_lora.errors import LedgerCorrupt
from dp_federated_lora.federated import checkpoint_head
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.workbench import participant_names
from dp_federated_lora.privacy import Budget, DpEvent, Ledger, Scope


@final
class LifetimeBudgets:
    """The budgets that `[ledger]` gives every participant for its data set, over all runs; none without that section.

    Args:
        ledgers: one for each participant, opened together.
    """

    def __init__(self, ledgers: Sequence[Ledger]) -> None:
        self._ledgers = tuple(ledgers)

    @classmethod
    def open(cls, config: Config) -> LifetimeBudgets:
        """Those of a run that is to be charged.

        Raises:
            BudgetMismatch: if a participant's ledger has another budget or counts another unit.
        """
        section = config.ledger
        if section is None:
            return cls(())
        return cls(
            Ledger.open_all(
                section.database,
                _owners(config),
                budget=Budget(section.epsilon, section.delta),
                scope=Scope.LIFETIME,
                unit=config.privacy.unit,
                key=None if section.key is None else Path(section.key),
            )
        )

    @classmethod
    def read(cls, config: Config) -> LifetimeBudgets:
        """Those of a run, to look at."""
        return cls(() if config.ledger is None else Ledger.read_all(config.ledger.database, _owners(config)))

    def charge(self, events: Sequence[DpEvent], *, number: int, purpose: str, run: Ledger, commitment: str) -> None:
        """Charge what round `number` of a run releases for `purpose` to every participant; those with one event, or none of them.

        Args:
            events: what it costs each participant.
            number: of the round.
            purpose: what is released.
            run: the ledger of the run.
            commitment: of the release's key.

        Raises:
            BudgetExhausted: naming a participant whose budget is too small.
        """
        of_run = f"{purpose}, run {run.rows()[0].hash}"
        for event in dict.fromkeys(events):
            alike = [ledger for ledger, own in zip(self._ledgers, events, strict=False) if own == event]
            if alike:
                Ledger.charge_all(alike, event, round=number, purpose=of_run, commitment=commitment)

    def check(self, run: Ledger) -> None:
        """Every charge of the run is in every participant's ledger, as participants are charged first.

        Raises:
            LedgerCorrupt: if one is not: that ledger was rolled back or replaced.
        """
        for ledger in self._ledgers:
            if missing := run.commitments - ledger.commitments:
                raise LedgerCorrupt(
                    f"the ledger of {ledger.owner!r} lacks {len(missing)} charges that this run has paid: it was rolled back or "
                    "replaced; restore the newest one"
                )

    def verify(self) -> None:
        """Check every row of every ledger."""
        for ledger in self._ledgers:
            ledger.verify()


def ledgers_at(where: str, owner: str | None = None) -> tuple[Ledger, ...]:
    """The ledgers of a run directory, a ledger file or a database; of `owner` alone if given."""
    place = RunDirectory(Path(where)).ledger if Path(where).is_dir() else where
    return Ledger.read_all(place, None if owner is None else [owner])


def verify_ledgers(where: str, owner: str | None = None) -> tuple[Ledger, ...]:
    """Check chains and signatures, and for a run that nothing which the run saw is missing.

    Raises:
        LedgerCorrupt: if a row was edited, or a ledger is older than `privacy.json`, the checkpoint or another ledger.
    """
    ledgers = ledgers_at(where, owner)
    for ledger in ledgers:
        ledger.verify()
    if not Path(where).is_dir():
        return ledgers
    run, (ledger,) = RunDirectory.existing(Path(where)), ledgers
    seen = {}
    if run.privacy.is_file():
        seen[run.privacy.name] = str(json.loads(run.privacy.read_text(encoding="utf-8"))["ledger_head"])
    if run.checkpoint.is_file():
        seen["the checkpoint"] = checkpoint_head(run.checkpoint)
    for witness, head in seen.items():
        if not ledger.contains(head):
            raise LedgerCorrupt(f"{where}: the ledger lacks rows that {witness} has seen; it was rolled back or replaced")
    lifetime = LifetimeBudgets.read(run.load_config())
    lifetime.check(ledger)
    lifetime.verify()
    return ledgers


def _owners(config: Config) -> list[str]:
    assert config.ledger is not None  # noqa: S101  (callers have looked)
    return [f"{name} / {config.ledger.data_set}" for name in participant_names(config)]
