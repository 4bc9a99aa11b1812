"""Tables of text from files."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dp_federated_lora.errors import DataError

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_ORANGE_TYPES: Final = frozenset(
    ("", "b", "basket", "c", "continuous", "d", "discrete", "i", "ignore", "s", "string", "text", "t", "time")
)
_LONGEST_FIELD: Final = 2**31 - 1  # characters; the csv module starts at 131,072, less than a book

Row = tuple[int, list[str]]  # line number in the file, values


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of strings of equal length, at least one row.

    Args:
        columns: values by column name, in the order of the file.
        path: the file, for messages.

    """

    columns: dict[str, list[str]]
    path: Path

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> list[str]:
        """Return one column.

        Raises:
            DataError: if there is no column of that name.

        """
        if name not in self.columns:
            raise DataError(f"{self.path} has no column {name!r}; choose one of {list(self.columns)}")
        return self.columns[name]


def read_table(path: Path) -> Table:
    """Read a UTF-8 table: `.csv` or `.tsv` with a header row, Orange `.tab`, or `.jsonl` of flat objects.

    Delimited files follow the usual quoting: a value is quoted only if it begins with `"`, and quotes
    inside it are then doubled. Numbers and booleans of `.jsonl` become their JSON text.

    Raises:
        DataError: if the file cannot be read, is empty, or a row does not fit; names file and line.

    """
    suffix = path.suffix.lower()
    text = _read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty; give a header and at least one row")
    if suffix == ".jsonl":
        names, rows = _json_rows(path, text)
    elif suffix in _DELIMITERS:
        names, rows = _delimited_rows(path, text, suffix)
    else:
        raise DataError(f"{path} is not a table this package reads; use .csv, .tsv, .tab or .jsonl")
    if not rows or not names:
        raise DataError(f"{path} has no rows of data; give a header and at least one row")
    if len(set(names)) != len(names):
        raise DataError(f"{path}: column names must be distinct, got {names}")
    for line, values in rows:
        if len(values) != len(names):
            raise DataError(
                f"{path}, line {line}: {len(values)} values for the {len(names)} columns {names}; "
                "quote values that contain the delimiter or a line break"
            )
    return Table({name: [values[at] for _, values in rows] for at, name in enumerate(names)}, path)


def _read_text(path: Path) -> str:
    """Decode a file without touching its line ends, which may stand inside quoted values."""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the table {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def _delimited_rows(path: Path, text: str, suffix: str) -> tuple[list[str], list[Row]]:
    """Split into column names and rows of data."""
    # The limit belongs to the process. It is only ever raised, so other users of csv lose nothing.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[suffix], strict=True)
    try:
        rows = [(reader.line_num, values) for values in reader]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num}: {error}; a value that begins with a quote must end with one, "
            "and quotes inside it must be doubled"
        ) from error
    if suffix != ".tab":
        return rows[0][1], [row for row in rows[1:] if row[1]]
    # Orange: rows of names, types and flags; some files then have one of empty values.
    if len(rows) < 3 or any(value.strip().lower() not in _ORANGE_TYPES for value in rows[1][1]):
        raise DataError(f"{path}, line 2: no Orange column types; rename a file with one header row to .tsv")
    start = 4 if len(rows) > 3 and not any(rows[3][1]) else 3
    return rows[0][1], [row for row in rows[start:] if row[1]]


def _json_rows(path: Path, text: str) -> tuple[list[str], list[Row]]:
    """Parse one object a line into column names and rows of data."""
    names: list[str] = []
    rows: list[Row] = []
    # Not splitlines(): it also splits at separators that may stand inside a JSON string.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            found = json.loads(content)
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}; write one JSON object on each line") from error
        if not isinstance(found, dict):
            raise DataError(f"{path}, line {line}: not a JSON object; write one JSON object on each line")
        names = names or list(found)
        if found.keys() != set(names):
            raise DataError(f"{path}, line {line}: keys {list(found)} differ from {names}; use the same keys")
        rows.append((line, [_json_text(path, line, name, found[name]) for name in names]))
    return names, rows


def _json_text(path: Path, line: int, name: str, value: object) -> str:
    """Write a scalar as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    kind = type(value).__name__
    raise DataError(f"{path}, line {line}: column {name!r} holds a {kind}; write a string or a number")
