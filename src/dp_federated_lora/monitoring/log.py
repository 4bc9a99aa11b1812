"""`run.log`: JSON lines that can hold public facts only, whatever a caller passes.

The log of a federated run is the file that people attach to bug reports. Values are therefore let through by
type: plain text, plain numbers and round reports. A tensor, an array, a bounded sum or any object nobody has
thought of leaves its type name in the log and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, final

import structlog

from dp_federated_lora.errors import StorageError
from dp_federated_lora.monitoring.public import public_value


class RunLog(Protocol):
    """What `open_log` returns: events with named values; `bind` keeps values for later events."""

    def debug(self, event: str, **values: object) -> None:
        """Log `event` at level debug."""

    def info(self, event: str, **values: object) -> None:
        """Log `event` at level info."""

    def warning(self, event: str, **values: object) -> None:
        """Log `event` at level warning."""

    def error(self, event: str, **values: object) -> None:
        """Log `event` at level error."""

    def bind(self, **values: object) -> RunLog:
        """Return a log that adds `values` to each of its events."""


def open_log(path: Path, *, run: str) -> RunLog:
    """Open the log of run `run`, appended to `path`: one line per event, flushed when a call returns.

    Every line has `timestamp` (UTC), `level`, `run` and `event`; values by these names are overruled.
    There is nothing to close, and structlog's global configuration is neither used nor changed.

    Raises:
        StorageError: here or in a later call, if the disk refuses.

    """
    log: RunLog = structlog.wrap_logger(
        _LineSink(path),
        processors=[_header(run), _redact, structlog.processors.JSONRenderer(allow_nan=False)],
        wrapper_class=structlog.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
    )
    return log


@final
class _LineSink:
    """Appends lines to a file, opened anew for each: no handle to leak, flush or lose in a fork."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # a process that died in the middle of a line must not swallow the first line of the next
        self._append(b"\n" if _is_torn(path) else b"")

    def info(self, line: str) -> None:
        self._append(line.encode() + b"\n")

    debug = warning = error = info

    def _append(self, data: bytes) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(data)
        except OSError as error:
            raise StorageError(
                f"{self._path}: the disk refused the log ({error.strerror}); make room and resume the run"
            ) from error


def _is_torn(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


_EventDict = MutableMapping[str, Any]


def _header(run: str) -> Callable[[object, str, _EventDict], _EventDict]:
    def add(_logger: object, level: str, values: _EventDict) -> _EventDict:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        head = {"timestamp": now, "level": level, "run": run, "event": values.pop("event", "")}
        return head | {name: value for name, value in values.items() if name not in head}

    return add


def _redact(_logger: object, _level: str, values: _EventDict) -> _EventDict:
    return {name: public_value(value) for name, value in values.items()}
