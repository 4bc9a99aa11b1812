"""The run directory: one folder per run, never overwritten, locked while it is in use."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self, final

from dp_federated_lora.errors import RunError, StorageError
from dp_federated_lora.files import FolderLock
from dp_federated_lora.lab.config import Config, load_config


@final
class RunDirectory:
    """Paths of a run, and the lock that lets one process at a time work in it.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.adapter = path / "adapter"
        self.privacy = path / "privacy.json"
        self.audit = path / "audit.json"
        self.ledger = path / "ledger.sqlite"
        self.metrics = path / "metrics.jsonl"
        self.report = path / "report.html"
        self.log = path / "run.log"
        self.checkpoint = path / "state" / "checkpoint.safetensors"
        self.clients = path / "state" / "clients"
        self.round_key = path / "state" / "round.key"
        self._lock: FolderLock | None = None

    @classmethod
    def create(cls, path: Path, config: Config) -> Self:
        """Make a new run directory with its configuration.

        Raises:
            RunError: if something is there already.
            StorageError: if it cannot be written.
        """
        run = cls(path)
        try:
            path.mkdir(parents=True)
            run.checkpoint.parent.mkdir(mode=0o700)
            run.config.write_text(config.to_toml(), encoding="utf-8")
        except FileExistsError as error:
            raise RunError(
                f"{path} exists and a run is never overwritten: choose another --out, or continue it with --resume {path}"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot create the run directory {path}: {error.strerror or error}") from error
        return run

    @classmethod
    def existing(cls, path: Path) -> Self:
        """An existing run directory.

        Raises:
            RunError: if there is no run.
        """
        run = cls(path)
        if not run.config.is_file():
            raise RunError(f"{path} is not a run directory: it has no config.toml")
        return run

    @property
    def released(self) -> dict[str, Path]:
        """What a run publishes and the guarantee covers, by path within the directory; nothing of it is secret."""
        found = (self.config, self.privacy, self.metrics, self.report, *sorted(self.adapter.glob("*")))
        return {path.relative_to(self.path).as_posix(): path for path in found if path.is_file()}

    def load_config(self) -> Config:
        """The resolved configuration of the run."""
        return load_config(self.config)

    def __enter__(self) -> Self:
        self._lock = FolderLock(self.checkpoint.parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release()
