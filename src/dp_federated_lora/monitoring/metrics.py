"""`metrics.jsonl`: one line per round, and only what a `RoundReport` holds."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from dp_federated_lora.errors import RunError, StorageError
from dp_federated_lora.files import sync_folder
from dp_federated_lora.monitoring.public import parsed_line, public_line

if TYPE_CHECKING:
    from dp_federated_lora.federated.round import RoundReport


@final
class MetricsFile:
    """The file `metrics.jsonl` of one run, written one durable line at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, report: RoundReport) -> None:
        """Write the line of `report` and wait until the disk has it.

        Raises:
            TypeError: if `report` is anything but a `RoundReport` of plain numbers.
            StorageError: if the disk refuses; the lines before stay valid.

        """
        line = public_line(report) + b"\n"
        # unbuffered, so that closing after a failure cannot write the rest of a line given back below
        with _storing(self._path), self._path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                _write(file, line)
            except OSError:
                # half a line may be on disk; giving it back needs no space
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise

    def truncate_after(self, round_: int) -> None:
        """Drop the lines of rounds later than `round_` and a torn last line, atomically.

        Raises:
            RunError: if a line other than the last is damaged.
            StorageError: if the disk refuses; the old file stays as it was.

        """
        if not self._path.exists():
            return
        kept = b"".join(line + b"\n" for line, row in _read(self._path) if row["round"] <= round_)
        fresh = self._path.with_name(self._path.name + ".new")
        with _storing(self._path):
            try:
                with fresh.open("wb", buffering=0) as file:
                    _write(file, kept)
                fresh.replace(self._path)
            finally:
                fresh.unlink(missing_ok=True)
            # else the old file might come back after a power cut, without the lines appended since
            sync_folder(self._path.parent)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of `metrics.jsonl` in order, keyed as in `RoundReport`; a torn last line is left out.

    Raises:
        RunError: if a line other than the last is damaged, or the file cannot be read.

    """
    return [row for _, row in _read(path)]


def _read(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        lines = path.read_bytes().strip().splitlines()
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            read.append((line, parsed_line(line)))
        except ValueError as error:
            if number < len(lines):
                raise RunError(f"{path}: line {number} is damaged; restore the file or delete it") from error
    return read


def _write(file: FileIO, data: bytes) -> None:
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file.fileno())


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: the disk refused the metrics ({error.strerror}); the rounds written before stay valid: "
            f"make room and resume the run"
        ) from error
