"""What the commands share: arguments that several take, and how figures are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2))


def show(title: str, rows: dict[str, str]) -> None:
    """Print named values as a table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)
