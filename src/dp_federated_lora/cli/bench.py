"""Measurements on the user's machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dp_federated_lora.lab.study import Cell

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True, epilog="Example: dpfl bench   or   dpfl bench utility")
def bench(context: typer.Context) -> None:
    """Measure this machine in a minute, or with `utility` the quality of methods in hours."""
    if context.invoked_subcommand is None:
        from dp_federated_lora.lab.speed import speed_figures  # noqa: PLC0415

        for what, result in speed_figures():
            typer.echo(f"{what:66}{result:>16}")


@app.command(epilog="Example: dpfl bench utility   or   dpfl bench utility mine.toml --out runs/mine --document mine.md")
def utility(
    grid: Annotated[Path | None, typer.Argument(metavar="STUDY", help="A study; default: the one that ships.")] = None,
    out: Annotated[Path, typer.Option(help="Where results are kept; finished runs are not repeated.")] = Path("runs/study"),
    document: Annotated[Path, typer.Option(help="The document to write, plots beside it.")] = Path("study.md"),
    only: Annotated[str | None, typer.Option(help="Run the tables whose titles contain this; all are written.")] = None,
    document_only: Annotated[bool, typer.Option("--document-only", help="Run nothing.")] = False,
) -> None:
    """Compare methods, budgets, units and partitions with baselines: hours for the whole study, which can be interrupted."""
    from dp_federated_lora.lab.study import read_grid, run_study, write_study  # noqa: PLC0415

    def announce(cell: Cell, number: int, cells: int) -> None:
        typer.echo(f"{number + 1} of {cells}: {cell.block}: {cell.name} {cell.settings}")

    cells = read_grid(grid)
    if not document_only:
        run_study([cell for cell in cells if only is None or only in cell.block], out, on_cell=announce)
    write_study(cells, out, document, command=" ".join(["dpfl bench utility", *([str(grid)] if grid else [])]))
    typer.echo(f"Wrote {document}")
