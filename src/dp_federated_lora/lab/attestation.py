"""A privacy statement as a signed file: what a run promises, on which configuration and ledger it rests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from dp_federated_lora.errors import StatementInvalid
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.directory import RunDirectory
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.statement import statement_at, statement_json
from dp_federated_lora.monitoring.statement import StatementRow
from dp_federated_lora.privacy import Ledger
from dp_federated_lora.signing import signature_holds

_FORMAT: Final = "dpfl-statement-1"
_PURPOSE: Final = "statement"


@final
@dataclass(frozen=True, slots=True)
class Attestation:
    """The statement of what a run has spent so far.

    Args:
        statement: against whom, which guarantee.
        config: of the run.
        ledger: of the run, verified.
    """

    statement: tuple[StatementRow, ...]
    config: Config
    ledger: Ledger

    @classmethod
    def of(cls, path: Path) -> Attestation:
        """The statement of the run at `path`, from its configuration and its ledger alone.

        Raises:
            RunError: if there is no run.
            LedgerCorrupt: if its ledger was edited.
        """
        run = RunDirectory.existing(path)
        config, ledger = run.load_config(), Ledger.read(run.ledger)
        ledger.verify()
        return cls(statement_at(config, privacy_plan(config), ledger.spent()), config, ledger)

    def signed(self) -> dict[str, Any]:
        """The statement with what it rests on, signed with the ledger's key; `verify_statement` checks it.

        Raises:
            LedgerKeyLost: if the key is not there.
        """
        facts = {
            "format": _FORMAT,
            "statement": statement_json(self.statement),
            "config": self.config.content_id,
            "ledger_head": self.ledger.head,
            "public_key": self.ledger.public_key,
        }
        return facts | {"signature": self.ledger.sign(_PURPOSE, _content(facts))}


def verify_statement(file: Path, *, run: Path | None = None) -> dict[str, Any]:
    """Check a signed statement; returns what it says.

    Args:
        file: as `dpfl statement --out` writes it.
        run: a run directory; then the statement must rest on that run's configuration and ledger.

    Raises:
        StatementInvalid: if the signature does not hold, or the run does not bear it out.
    """
    try:
        facts: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        signature, kind = str(facts.pop("signature")), facts["format"]
        head, public, config = (str(facts[name]) for name in ("ledger_head", "public_key", "config"))
        content = _content(facts)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise StatementInvalid(f"{file} cannot be read as a signed statement: {error}") from error
    if kind != _FORMAT or not signature_holds(public, _PURPOSE, content, signature):
        raise StatementInvalid(f"{file}: the signature does not hold; the statement was edited after it was signed")
    if run is not None:
        directory = RunDirectory.existing(run)
        ledger = Ledger.read(directory.ledger)
        ledger.verify()
        if ledger.public_key != public or directory.load_config().content_id != config:
            raise StatementInvalid(f"{file} is the statement of another run than {run}: their keys or configurations differ")
        if not ledger.contains(head):
            raise StatementInvalid(
                f"{file}: the ledger of {run} lacks rows that were there when the statement was signed; it was rolled back"
            )
    return facts


def _content(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
