"""Files that survive a crash whole."""

from __future__ import annotations

import os
from pathlib import Path

from dp_federated_lora.errors import StorageError


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
