"""What may be written to a file or a log: decided by type and by name, never by trust in the caller."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dp_federated_lora.federated.round import RoundReport

_INTEGERS: Final = frozenset({"round", "rounds", "bytes_per_client"})
_NUMBERS: Final = frozenset({"epsilon", "delta", "update_norm", "noise_norm", "clip_norm"})
_MAPPINGS: Final = frozenset({"public_metrics", "private_metrics"})
_PUBLIC: Final = _INTEGERS | _NUMBERS | _MAPPINGS
"""The fields of a `RoundReport`, listed a second time on purpose.

A field added to `RoundReport` reaches no file before somebody has decided here that it is public.
"""
_DEEPEST: Final = 8


def public_fields(report: RoundReport) -> dict[str, Any]:
    """Return the fields of `report` as plain numbers.

    Raises:
        TypeError: if `report` is no `RoundReport`, or a field holds anything but plain numbers.

    """
    kind = type(report)
    names = [field.name for field in dataclasses.fields(report)] if dataclasses.is_dataclass(report) else []
    if kind.__name__ != "RoundReport" or set(names) != _PUBLIC:
        raise TypeError(f"only a RoundReport with the fields {sorted(_PUBLIC)} is public, got a {kind.__name__}")
    fields: dict[str, Any] = {name: getattr(report, name) for name in names}
    for name in _INTEGERS:
        _require(name, fields[name], int)
    for name in _NUMBERS:
        _require(name, fields[name], int, float)
    for mapping in _MAPPINGS:
        metrics = fields[mapping]
        if not isinstance(metrics, Mapping) or any(type(name) is not str for name in metrics):
            raise TypeError(f"RoundReport field {mapping} must map names to numbers")
        fields[mapping] = dict(metrics)
        for name, value in metrics.items():
            _require(f"{mapping}[{name!r}]", value, int, float)
    return fields


def public_line(report: RoundReport) -> bytes:
    """Return `report` as one JSON object without line break; numbers that are not finite become null.

    Raises:
        TypeError: as `public_fields`.

    """
    fields = public_fields(report)
    row = _finite(fields) | {mapping: _finite(fields[mapping]) for mapping in sorted(_MAPPINGS)}
    return json.dumps(row, allow_nan=False).encode()


def parsed_line(line: bytes) -> dict[str, Any]:
    """Read back what `public_line` wrote; null becomes NaN.

    Raises:
        ValueError: if `line` is damaged or was never such a line.

    """
    row = json.loads(line)
    if not isinstance(row, dict) or set(row) != _PUBLIC or not all(isinstance(row[m], dict) for m in _MAPPINGS):
        raise ValueError("not the line of a round")
    if type(row["round"]) is not int:
        raise ValueError("a line without the number of its round")
    for holder in (row, *(row[mapping] for mapping in _MAPPINGS)):
        holder.update({name: math.nan for name, value in holder.items() if value is None})
    return row


def public_value(value: object, *, depth: int = 0) -> object:
    """Return `value` where its exact type is public, else `"<redacted: TypeName>"`.

    Exact types, because numpy's float64 is a `float` by inheritance and comes out of an array.
    """
    kind = type(value)
    match value:
        case None | bool() | int() | str() if kind in (type(None), bool, int, str):
            return value
        case float() if kind is float:
            return value if math.isfinite(value) else repr(value)
        case list() | tuple() if kind in (list, tuple) and depth < _DEEPEST:
            return [public_value(item, depth=depth + 1) for item in value]
        case dict() if kind is dict and depth < _DEEPEST:
            return {str(public_value(k, depth=_DEEPEST)): public_value(v, depth=depth + 1) for k, v in value.items()}
    if kind.__name__ == "RoundReport":
        try:
            return public_value(public_fields(value), depth=depth)  # type: ignore[arg-type]
        except TypeError:
            pass  # a report that holds more than plain numbers is redacted like any other object
    return f"<redacted: {kind.__name__}>"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    # JSON knows no NaN and no infinity; null is what other readers of the file understand
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _require(name: str, value: object, *kinds: type) -> None:
    # exact types: a numpy.float64 passes isinstance(float), and shows that nobody chose to publish it
    if type(value) not in kinds:
        raise TypeError(
            f"RoundReport field {name} must be a plain number, got a {type(value).__name__}; "
            f"convert it with int() or float() where it is made and public"
        )
