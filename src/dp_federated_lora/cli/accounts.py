"""Commands about what was spent and promised: ledgers and signed statements."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from dp_federated_lora.cli.terminal import AsJson, RunPath, print_json

if TYPE_CHECKING:
    from dp_federated_lora.privacy import Ledger

app = typer.Typer(rich_markup_mode=None)
ledger_app = typer.Typer(help="Look at the charges of runs and participants.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(ledger_app, name="ledger")

Place = Annotated[
    str, typer.Argument(metavar="RUN_OR_LEDGER", help="A run directory, a ledger file, or postgresql://user@host/database.")
]
Owner = Annotated[str | None, typer.Option(help="Only this owner's ledger, where the database holds many.")]


@ledger_app.command("show", epilog="Example: dpfl ledger show runs/first")
def ledger_show(place: Place, owner: Owner = None, as_json: AsJson = False) -> None:
    """Print every charge and the total; of a database with many ledgers, their totals."""
    from dp_federated_lora.lab.ledgers import ledgers_at  # noqa: PLC0415

    ledgers = ledgers_at(place, owner)
    if len(ledgers) > 1:
        _show_totals(place, ledgers, as_json=as_json)
        return
    (ledger,) = ledgers
    spend = ledger.spent()
    rows = [
        {"serial": r.serial, "kind": r.kind, "round": r.round, "time": r.time, **r.facts, "hash": r.hash} for r in ledger.rows()
    ]
    if as_json:
        print_json({"owner": ledger.owner, "epsilon": spend.epsilon, "delta": spend.delta, "rows": rows})
        return
    table = Table("serial", "kind", "round", "time", "hash", title=f"Ledger of {ledger.owner}", title_justify="left")
    for row in ledger.rows():
        table.add_row(str(row.serial), row.kind, str(row.round), row.time, row.hash[:16])
    Console().print(table)
    typer.echo(
        f"epsilon {spend.epsilon:.4f} of {ledger.budget.epsilon:g} at delta {spend.delta:g}: {spend.charges} charges, "
        f"{spend.released} published releases"
    )


def _show_totals(place: str, ledgers: tuple[Ledger, ...], *, as_json: bool) -> None:
    totals = [(ledger.owner, ledger.spent(), ledger.budget) for ledger in ledgers]
    if as_json:
        print_json({"ledgers": [{"owner": o, **asdict(spend), "budget": budget.epsilon} for o, spend, budget in totals]})
        return
    table = Table("owner", "epsilon", "of", "at delta", "charges", title=f"Ledgers in {place}", title_justify="left")
    for owner, spend, budget in totals:
        table.add_row(owner, f"{spend.epsilon:.4f}", f"{budget.epsilon:g}", f"{spend.delta:g}", str(spend.charges))
    Console().print(table)


@ledger_app.command("verify", epilog="Example: dpfl ledger verify runs/first")
def ledger_verify(place: Place, owner: Owner = None, as_json: AsJson = False) -> None:
    """Check hash chains and signatures, and that no ledger is older than what the run saw."""
    from dp_federated_lora.lab.ledgers import verify_ledgers  # noqa: PLC0415

    ledgers = verify_ledgers(place, owner)
    rows, first = sum(len(ledger.rows()) for ledger in ledgers), ledgers[0]
    alone = {"head": first.head, "epsilon": first.spent().epsilon} if len(ledgers) == 1 else {}
    if as_json:
        print_json({"ledgers": len(ledgers), "rows": rows, **alone})
    else:
        typer.echo(f"intact: {rows} rows" + (f", head {first.head}" if alone else f" of {len(ledgers)} ledgers"))


@ledger_app.command("export", epilog="Example: dpfl ledger export runs/first --format csv > charges.csv")
def ledger_export(
    place: Place,
    owner: Owner = None,
    form: Annotated[Literal["json", "csv"], typer.Option("--format", help="How rows are written.")] = "json",
) -> None:
    """Print all rows exactly as they are stored, so that hashes and signatures can be checked elsewhere."""
    from dp_federated_lora.lab.ledgers import ledgers_at  # noqa: PLC0415

    rows = [asdict(row) for ledger in ledgers_at(place, owner) for row in ledger.rows()]
    if form == "json":
        print_json(rows)
        return
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


@app.command(epilog="Example: dpfl statement runs/first --out statement.json")
def statement(
    run: RunPath,
    out: Annotated[Path | None, typer.Option(help="Also write it as a file signed with the ledger's key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say in words what a run has promised to whom; with --out or --json, signed."""
    from dp_federated_lora.files import write_durably  # noqa: PLC0415
    from dp_federated_lora.lab.attestation import Attestation  # noqa: PLC0415
    from dp_federated_lora.monitoring.statement import statement_in_words  # noqa: PLC0415

    attestation = Attestation.of(run)
    signed = attestation.signed() if out is not None or as_json else {}
    if out is not None:
        write_durably(out, (json.dumps(signed, indent=2) + "\n").encode())
    if as_json:
        print_json(signed)
        return
    typer.echo(statement_in_words(attestation.statement, insecure=attestation.config.run.insecure_seed is not None))
    if out is not None:
        typer.echo(f"\nSigned: {out}. To check it: dpfl verify {out} --run {run}")


@app.command(epilog="Example: dpfl verify statement.json --run runs/first")
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `dpfl statement --out` wrote.")],
    run: Annotated[Path | None, typer.Option(help="Also check that this run's ledger bears it out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a signed statement."""
    from dp_federated_lora.lab.attestation import verify_statement  # noqa: PLC0415

    facts = verify_statement(file, run=run)
    if as_json:
        print_json(facts)
        return
    borne = f", and the ledger of {run} bears it out" if run else "; give --run to check it against a run's ledger"
    typer.echo(f"the signature holds (key {facts['public_key']}){borne}")
