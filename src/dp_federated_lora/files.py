"""Files that survive a crash whole."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import final

from dp_federated_lora.errors import RunError, StorageError


def write_durably(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace the file at `path` in one step that survives a crash.

    Raises:
        StorageError: if the disk refuses; the old file is then still there.
    """
    scratch = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. What was saved before is intact: free space or fix "
            "permissions, then continue with --resume"
        ) from error


def sync_folder(folder: Path) -> None:
    """Wait until the names of files in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@final
class FolderLock:
    """Lets one process at a time work in a folder; held until `release` or the end of the process.

    Args:
        folder: that exists.
        wait: until nobody else holds it; the system lets go for a process that dies.

    Raises:
        RunError: if another process holds it, without waiting.
    """

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        self._descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise RunError(f"another process is working in {folder}; wait for it or stop it first") from error

    def release(self) -> None:
        """Let others in; a second time changes nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
