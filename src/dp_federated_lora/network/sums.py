"""Secure sums and reports at a site that survive its death: an answer is on disk before it is sent, and sent again on demand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from shutil import rmtree
from typing import Final, Self, final

import msgspec

from dp_federated_lora.errors import CheckpointError, MessageRefused, StorageError
from dp_federated_lora.federated import RoundKeyFile
from dp_federated_lora.files import write_durably
from dp_federated_lora.network.messages import Asked

_REQUEST: Final = "request"
_STATE: Final = "state"
_KEY: Final = "key"


class _Stored(msgspec.Struct):
    members: tuple[str, ...]
    session: bytes = b""
    asked: tuple[bytes, ...] = ()  # digest of the body of each step so far
    answers: tuple[bytes, ...] = ()


@final
class SumFolder:
    """What a site keeps of one secure sum, in a folder of its own.

    Args:
        path: the folder.
        stored: what `state` holds.
    """

    def __init__(self, path: Path, stored: _Stored) -> None:
        self._path, self._stored = path, stored

    @classmethod
    def find(cls, parent: Path, message: Asked) -> Self | None:
        """The sum that `message` is of, as it was left; None if this is its first step.

        Raises:
            MessageRefused: if it was never begun here, or is of other members or with another request than it was begun with.
            CheckpointError: if what was stored is damaged.
        """
        path = parent / message.sum_id
        if (path / _STATE).exists():
            try:
                stored = msgspec.msgpack.decode((path / _STATE).read_bytes(), type=_Stored)
            except (OSError, msgspec.MsgspecError) as error:
                raise CheckpointError(
                    f"what this site stored of a sum cannot be read ({error}): it is out of this sum"
                ) from error
            folder = cls(path, stored)
            if message.members != stored.members or (message.stage == 0 and message.request != folder.request):
                raise MessageRefused("a sum is of the members, and with the request, that it was begun with")
            return folder
        if message.stage:
            raise MessageRefused("this sum was not begun here, or another one since: it has to be begun anew")
        return None

    @classmethod
    def begin(cls, parent: Path, message: Asked) -> Self:
        """A new sum, with the request of its first step.

        All other sums are forgotten: a site takes part in one at a time, and one that is begun again is charged again.

        Raises:
            StorageError: if the disk refuses.
        """
        path = parent / message.sum_id
        forget_sums(parent)
        try:
            path.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise StorageError(f"cannot keep a sum in {parent}: {error.strerror or error}") from error
        write_durably(path / _REQUEST, message.request, mode=0o600)
        folder = cls(path, _Stored(message.members))
        folder._save()
        return folder

    @property
    def request(self) -> bytes:
        """What the sum is of, as it was sent."""
        return (self._path / _REQUEST).read_bytes()

    @property
    def key(self) -> Path:
        """Where the key of this sum's noise is kept."""
        return self._path / _KEY

    @property
    def session(self) -> bytes:
        """The client's session as last stored; empty before the first step."""
        return self._stored.session

    def answered(self, message: Asked) -> bytes | None:
        """The answer that was given to this step; None if the step is due.

        Raises:
            MessageRefused: if the step was answered, but to other bytes, or if it is not the next one.
        """
        stage, known = message.stage, self._stored
        if stage == len(known.answers):
            return None
        if stage > len(known.answers) or known.asked[stage] != _digest(message.body):
            raise MessageRefused(f"step {stage} of a sum is answered once, after the one before: this is another message")
        return known.answers[stage]

    def keep(self, message: Asked, session: bytes, answer: bytes) -> None:
        """Store an answer durably; it may be sent afterwards.

        Raises:
            StorageError: if the disk refuses.
        """
        self._stored.session = session
        self._stored.asked += (_digest(message.body),)
        self._stored.answers += (answer,)
        self._save()

    def _save(self) -> None:
        write_durably(self._path / _STATE, msgspec.msgpack.encode(self._stored), mode=0o600)


def forget_sums(parent: Path) -> None:
    """Remove what is kept of sums in a folder; whoever got hold of their keys could take noise away.

    Raises:
        StorageError: if the disk refuses.
    """
    try:
        for old in parent.iterdir() if parent.exists() else ():
            RoundKeyFile(old / _KEY).destroy()
            rmtree(old)
    except OSError as error:
        raise StorageError(f"cannot remove old sums from {parent}: {error.strerror or error}") from error


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()
