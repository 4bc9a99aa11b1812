"""An append-only log of what people did and what was refused: JSON lines, each hashed over the one before and signed.

An entry is on the disk when `append` returns. Processes take turns by a lock on the file, so a line without its end is that of
a process that died: whoever opens the log next removes it, and says so in an entry of its own.

The chain shows every change of what is followed by an entry. That the last entries were removed, only somebody who kept the hash
of a later one can tell: `Trail.contains`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Final, Self, final

from dp_federated_lora.errors import AuditLogCorrupt, LedgerKeyLost, StorageError
from dp_federated_lora.files import sync_folder
from dp_federated_lora.signing import SigningKey, signature_holds
from dp_federated_lora.storage import canonical

Scalar = str | int | float | bool | None

_GENESIS: Final = "0" * 64
_PURPOSE: Final = "audit log"


@final
@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One line of the log.

    Args:
        number: from 0, without a gap.
        time: UTC, ISO 8601.
        actor: who did it.
        act: what was done or refused.
        facts: details by name.
        previous: hash of the entry before; zeros for the first.
        hash: SHA-256 of everything above, hexadecimal.
        signature: of the hash, by the log's key, hexadecimal.
    """

    number: int
    time: str
    actor: str
    act: str
    facts: Mapping[str, Scalar]
    previous: str
    hash: str = ""
    signature: str = ""

    def expected_hash(self) -> str:
        """SHA-256 over everything before `hash`, which includes the previous entry's hash."""
        content = [self.number, self.time, self.actor, self.act, self.facts, self.previous]
        return hashlib.sha256(canonical(content).encode()).hexdigest()

    @property
    def line(self) -> bytes:
        """The entry as it stands in the file, without the end of the line."""
        return canonical(asdict(self)).encode()


@final
@dataclass(frozen=True, slots=True)
class Trail:
    """What a log says, read and verified.

    Args:
        entries: all of them, in order.
        torn: bytes of a last line without its end, which no `append` has returned for; 0 for none.
    """

    entries: tuple[AuditEntry, ...]
    torn: int

    @property
    def head(self) -> str:
        """Hash of the last entry; whoever keeps it can notice a log that was cut."""
        return self.entries[-1].hash

    @property
    def public_key(self) -> str:
        """Ed25519 public key that the first entry states, hexadecimal."""
        return str(self.entries[0].facts.get("public_key"))

    def contains(self, head: str) -> bool:
        """Whether `head` is the hash of an entry: false for a log that is older than whoever saw that head, or was cut."""
        return any(entry.hash == head for entry in self.entries)


@final
class AuditLog:
    """A log to append to; made by `open`."""

    def __init__(self, path: Path, key: SigningKey) -> None:
        self._path = path
        self._key = key
        self._end = 0  # bytes that were verified
        self._last: AuditEntry | None = None

    @classmethod
    def open(cls, path: Path, *, key: Path | None = None) -> Self:
        """Begin a log, or verify an existing one and remove a torn last line.

        Args:
            path: the file.
            key: file of the signing key, made with the log; default beside it, with suffix .key.

        Raises:
            AuditLogCorrupt: if an entry was edited, removed, inserted or moved; nothing was written.
            LedgerKeyLost: if there is a log, but its key is not here.
            StorageError: if the disk refuses.
        """
        key = key or path.with_suffix(".key")
        with _locked(path, write=True) as file:
            signing = SigningKey.load(key)
            if signing is None and os.fstat(file.fileno()).st_size:
                raise LedgerKeyLost(f"{path} is an audit log, but {key}, the key that signs it, is not here; restore it")
            log = cls(path, signing or SigningKey.create(key))
            log._catch_up(file)
        return log

    @property
    def public_key(self) -> str:
        """Ed25519 public key that signs every entry, hexadecimal; `verify` takes it."""
        return self._key.public

    def append(self, actor: str, act: str, facts: Mapping[str, Scalar] | None = None) -> AuditEntry:
        """Add an entry; it is on the disk once this returns, after those of other processes.

        Args:
            actor: who did it.
            act: what was done or refused.
            facts: details by name: text, finite numbers, truth values or None, and nothing else.

        Raises:
            TypeError: if a fact is anything else: a tensor or a list could carry private data.
            AuditLogCorrupt: if what others appended since is not in order, or the last entry read is not where it was.
            StorageError: if the disk refuses; nothing was appended.
        """
        facts = dict(facts or {})
        for name, value in facts.items():
            if not isinstance(value, Scalar) or (isinstance(value, float) and not math.isfinite(value)):
                raise TypeError(f"fact {name!r} of an audit log is text, a finite number, true, false or null; not {value!r:.40}")
        with _locked(self._path, write=True) as file:
            self._catch_up(file)
            return self._write(file, actor, act, facts)

    def _catch_up(self, file: FileIO) -> None:
        """Verify what is new, and leave the file at its end with an entry in it and no torn line."""
        known = b"" if self._last is None else self._last.line + b"\n"
        file.seek(self._end - len(known))
        content = file.read()
        if not content.startswith(known):
            raise AuditLogCorrupt(f"{self._path} changed while it was open: the last entry read is no longer where it was")
        lines, torn = _split(content[len(known) :])
        for entry in _verified(lines, self._path, self.public_key, after=self._last):
            self._last = entry
            self._end += len(entry.line) + 1
        if torn:
            os.ftruncate(file.fileno(), self._end)
        if self._last is None:
            self._write(file, "dpfl", "begun", {"format": 1, "public_key": self.public_key})
            sync_folder(self._path.parent)
        if torn:
            self._write(file, "dpfl", "torn line removed", {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()})

    def _write(self, file: FileIO, actor: str, act: str, facts: Mapping[str, Scalar]) -> AuditEntry:
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        number, previous = (0, _GENESIS) if self._last is None else (self._last.number + 1, self._last.hash)
        entry = AuditEntry(number, time, actor, act, facts, previous)
        digest = entry.expected_hash()
        entry = replace(entry, hash=digest, signature=self._key.sign(_PURPOSE, bytes.fromhex(digest)))
        rest = memoryview(entry.line + b"\n")
        end = self._end + len(rest)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # what is left is then a torn line, or an entry that nobody was told of
                os.ftruncate(file.fileno(), self._end)
            raise
        self._last, self._end = entry, end
        return entry


def verify(path: Path, public_key: str | None = None) -> Trail:
    """Read a log and check every entry; nothing is written.

    Args:
        path: the file.
        public_key: of the key that signs it, hexadecimal; None takes the one that the first entry states, which proves only
            that the log is of one piece: compare it with the site's.

    Raises:
        AuditLogCorrupt: naming the first entry that was edited, removed, inserted or moved, or if there is none.
        StorageError: if it cannot be read.
    """
    with _locked(path, write=False) as file:
        lines, torn = _split(file.read())
    entries = tuple(_verified(lines, path, public_key))
    if not entries:
        raise AuditLogCorrupt(f"{path} holds no entry, and every audit log begins with one: it was emptied, or is something else")
    return Trail(entries, len(torn))


@contextmanager
def _locked(path: Path, *, write: bool) -> Iterator[FileIO]:
    """The file, unbuffered, held against other processes; errors of the disk become this package's."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND if write else os.O_RDONLY
        with FileIO(os.open(path, flags, 0o600), "r+" if write else "r") as file:
            fcntl.flock(file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
            yield file
    except OSError as error:
        raise StorageError(
            f"the audit log {path} cannot be {'written' if write else 'read'} ({error.strerror or error}); nothing was appended: "
            "free space or fix the path or its permissions, then try again"
        ) from error


def _split(content: bytes) -> tuple[list[bytes], bytes]:
    """Whole lines, without their ends, and what follows the last of them."""
    *lines, torn = content.split(b"\n")
    return lines, torn


def _verified(
    lines: Sequence[bytes], path: Path, public_key: str | None, after: AuditEntry | None = None
) -> Iterator[AuditEntry]:
    """The entries on `lines`, each checked; without a `public_key` by that of the first."""
    last = after
    for line in lines:
        number = 0 if last is None else last.number + 1
        entry = _entry_on(line)
        public_key = public_key or (str(entry.facts.get("public_key")) if entry else "")
        problem = _problem(entry, number, _GENESIS if last is None else last.hash, public_key)
        if entry is None or problem:
            raise AuditLogCorrupt(
                f"entry {number} of {path} (line {number + 1}) {problem}; entries before it are intact. Nothing is appended to "
                "such a log: keep it as evidence and restore the newest backup"
            )
        yield entry
        last = entry


def _entry_on(line: bytes) -> AuditEntry | None:
    """The entry on a line, None if it is not one to the letter."""
    try:
        entry = AuditEntry(**json.loads(line))
        return entry if isinstance(entry.facts, dict) and entry.line == line else None
    except (ValueError, TypeError, RecursionError):
        return None


def _problem(entry: AuditEntry | None, number: int, previous: str, public_key: str) -> str:
    """What is wrong with an entry that should have this number and follow `previous`; empty if nothing is."""
    if entry is None:
        return "cannot be read: it was edited"
    if entry.number != number:
        return f"is not in its place, where entry {entry.number} is: one was removed, inserted or moved"
    if entry.hash != entry.expected_hash():
        return "was edited: it does not have the hash that it states"
    if not signature_holds(public_key, _PURPOSE, bytes.fromhex(entry.hash), str(entry.signature)):
        return f"is not signed by the key {public_key[:12]}: it was edited or inserted by somebody without that key"
    if entry.previous != previous:
        return "was moved: it follows another entry than the one before it"
    return ""
