"""What survives a crash: the server state after a round, and the key of a round under way.

Both are written to a temporary file, synced and renamed, so a reader finds the old or the new content, never a torn one, and
both can be read by their owner alone. The key file lives from before the charge until the round's checkpoint is durable: with
it, an interrupted round is re-created to the bit under its first charge. Whoever reads it can subtract that round's noise, so
it is overwritten before it is removed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dp_federated_lora.errors import CheckpointError
from dp_federated_lora.federated.staleness import Earlier
from dp_federated_lora.files import write_durably
from dp_federated_lora.privacy import SecureRandom

_FORMAT: Final = "dpfl-checkpoint-2"


@final
@dataclass(frozen=True, slots=True)
class ServerState:
    """State after `round` rounds: all adapter tensors, the server optimiser's, and the next round's clip norm.

    `noise` is what the mechanism keeps for later rounds: a secret, for whoever has it can subtract noise. `earlier` are trained
    tensors of rounds before, for those who began then. `aggregate` is the last aggregate of each coordinate, public, where a
    defence starts from it.
    """

    round: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    clip_norm: float
    noise: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    earlier: Earlier = field(default_factory=dict)
    aggregate: Tensor | None = None

    def adapter_before(self, steps: int) -> Mapping[str, Tensor]:
        """The adapter `steps` server steps ago; tensors that are never trained are the same in all."""
        return {**self.adapter, **{n: rows[steps - 1] for n, rows in self.earlier.items()}} if steps else self.adapter


def write_checkpoint(path: Path, state: ServerState, *, run_id: str, ledger_head: str) -> None:
    """Save `state` durably, for its owner's eyes only, with the run it belongs to and the ledger head it has seen.

    Raises:
        StorageError: if the disk refuses.
    """
    tensors = {f"adapter/{n}": t.contiguous() for n, t in state.adapter.items()}
    tensors |= {f"optimizer/{n}": t.contiguous() for n, t in state.optimizer.items()}
    tensors |= {f"noise/{n}": t.contiguous() for n, t in state.noise.items()}
    tensors |= {f"earlier/{n}": t.contiguous() for n, t in state.earlier.items()}
    tensors["server/clip_norm"] = torch.tensor(state.clip_norm, dtype=torch.float64)
    if state.aggregate is not None:
        tensors["server/aggregate"] = state.aggregate
    facts = {"round": str(state.round), "run_id": run_id, "ledger_head": ledger_head}
    write_durably(path, sealed(tensors, facts, kind=_FORMAT), mode=0o600)


def read_checkpoint(path: Path, *, run_id: str) -> tuple[ServerState, str]:
    """Read a checkpoint of the run `run_id`; returns the state and the ledger head it had seen.

    Raises:
        CheckpointError: if it is missing, damaged, or of another run.
    """
    facts, tensors = unsealed(path, kind=_FORMAT, what="checkpoint")
    if facts["run_id"] != run_id:
        raise CheckpointError(
            f"the checkpoint {path} belongs to configuration {facts['run_id'][:12]}, this run is {run_id[:12]}: "
            "a run resumes with the configuration and data it was started with"
        )
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "optimizer": {}, "server": {}, "noise": {}, "earlier": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        parts[kind][rest] = tensor
    state = ServerState(
        int(facts["round"]),
        parts["adapter"],
        parts["optimizer"],
        float(parts["server"]["clip_norm"]),
        noise=parts["noise"],
        earlier=parts["earlier"],
        aggregate=parts["server"].get("aggregate"),
    )
    return state, facts["ledger_head"]


def sealed(tensors: Mapping[str, Tensor], facts: Mapping[str, str], *, kind: str) -> bytes:
    """The content of a file of tensors and facts that `unsealed` accepts."""
    return save(dict(tensors), metadata={**facts, "format": kind, "digest": _digest(tensors)})


def unsealed(path: Path, *, kind: str, what: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Facts and tensors of a file that is whole, and of this `kind`; errors call it `what`.

    Raises:
        CheckpointError: if it is missing, damaged or of another kind.
    """
    fix = "restore the file from a backup of the run directory, or start a new run"
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the {what} {path} cannot be read ({error}); {fix}") from error
    if facts.get("format") != kind or facts.get("digest") != _digest(tensors):
        raise CheckpointError(f"the {what} {path} is damaged: its content does not match its digest; {fix}")
    return facts, tensors


def checkpoint_head(path: Path) -> str:
    """The ledger head that a checkpoint has seen, of whatever run.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {})["ledger_head"])
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error})") from error


@final
class RoundKeyFile:
    """The key of the round under way.

    Args:
        path: the file; absent between rounds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def open_round(self, number: int, *, insecure_seed: int | None, attempt: int = 0) -> SecureRandom:
        """The stream of round `number`: the one of an interrupted attempt if its key is here, else a fresh one, saved.

        Args:
            number: of the round.
            insecure_seed: instead of entropy.
            attempt: how many secure sums were aborted before, which a seed cannot know.

        Raises:
            StorageError: if the key cannot be saved.
        """
        if insecure_seed is not None:
            return SecureRandom.insecure_from(insecure_seed).derive("round", number, *([attempt] if attempt else []))
        try:
            label, _, key = self._path.read_bytes().partition(b"\n")
            if label == str(number).encode() and len(key) == SecureRandom.KEY_BYTES:
                return SecureRandom(key)
        except FileNotFoundError:
            pass
        fresh = SecureRandom.from_os()
        self.keep(number, fresh)
        return fresh

    def keep(self, number: int, key: SecureRandom) -> None:
        """Save the key of round `number`, for `open_round`.

        Raises:
            StorageError: if it cannot be saved.
        """
        write_durably(self._path, f"{number}\n".encode() + key.export_key(), mode=0o600)

    def destroy(self) -> None:
        """Overwrite and remove the key of a finished round."""
        if self._path.exists():
            with self._path.open("r+b") as file:
                file.write(bytes(self._path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
            self._path.unlink()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name}{tuple(tensors[name].shape)}{tensors[name].dtype}".encode())
        total.update(tensors[name].contiguous().numpy().tobytes())
    return total.hexdigest()
