r"""What clients keep from one round to the next, where their data are: their own B (fedsa), their control variate (SCAFFOLD).

**Privacy** (unit = client). State never leaves its client, and what a client sends in round t is a function of its data, of what
was released before t, and of its state, so of its own earlier coins. Fix the coins of all others and what was released before. If
h is the hidden past of one client, the sum of round t is N(m, s^2) without that client and, with it, the mixture over h of

    (1 - q) N(m, s^2) + q N(m + x_h, s^2),    |x_h| <= C:

the coin of round t is fresh, so q is the same for every h. For each h the pair is dominated by that of an ordinary round, where
|x| = C. Hockey-stick divergences are jointly convex, and so are e^((a - 1) D_a) of Renyi's D_a: the mixture is dominated too, in
both directions and whatever was released before. So is the composition of all rounds (dominating pairs compose adaptively: Zhu,
Dong and Wang 2022, arXiv 2106.08567), and then the mixture over the others' coins. State changes no charge. Under trust = "local"
the same holds for a client's own reports.

Unit = example has no such argument: an example that is in the state moves all later gradients of its client, each by up to the
clip norm. Nor has correlated noise: given what was released before, that of a round is not fresh. Both are refused.

**Crashes.** A round that is killed is computed again, by clients that may have written their new state already. So the state from
before it is kept too, until a later round is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, final

from torch import Tensor

from dp_federated_lora.errors import CheckpointError
from dp_federated_lora.federated.checkpoint import sealed, unsealed
from dp_federated_lora.files import sync_folder, write_durably

_FORMAT: Final = "dpfl-client-1"

Versions = dict[int, dict[str, Tensor]]


@final
class ClientMemory:
    """State of clients, one file (0600) for each, with the rounds that it is from.

    Args:
        folder: where the files lie.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def rewind(self, names: Sequence[str], number: int) -> None:
        """Forget what clients kept after round `number`; 0 begins their files, so that one that is missing later is noticed.

        Raises:
            CheckpointError: if a file is missing or damaged.
        """
        if not names:
            return
        if number == 0:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            if number == 0:  # not durable one by one: after a power cut the run begins anew
                self._path(name).touch(mode=0o600)
                self._path(name).write_bytes(_packed(name, {}))
            elif len(versions := self._read(name)) > len(kept := {r: v for r, v in versions.items() if r <= number}):
                write_durably(self._path(name), _packed(name, kept), mode=0o600)
        sync_folder(self._folder)

    def before(self, name: str, number: int) -> Mapping[str, Tensor]:
        """What a client kept after the last round before `number` that it took part in; empty if there is none.

        Raises:
            CheckpointError: if its file is missing, damaged or another client's.
        """
        versions = self._read(name)
        return versions[max(earlier)] if (earlier := [r for r in versions if r < number]) else {}

    def keep(self, name: str, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Save, durably, what a client keeps after round `number`, beside what it kept before.

        Raises:
            CheckpointError: as `before`.
            StorageError: if the disk refuses.
        """
        before = {r: v for r, v in sorted(self._read(name).items()) if r < number}
        versions = dict(list(before.items())[-1:]) | {number: dict(tensors)}
        write_durably(self._path(name), _packed(name, versions), mode=0o600)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _read(self, name: str) -> Versions:
        path, versions = self._path(name), Versions()
        facts, tensors = unsealed(path, kind=_FORMAT, what="client state")
        if facts["client"] != name:
            raise CheckpointError(f"the client state {path} is of {facts['client']}: put the files back under their own names")
        for label, tensor in tensors.items():
            number, _, rest = label.partition("/")
            versions.setdefault(int(number), {})[rest] = tensor
        return versions


def _packed(name: str, versions: Versions) -> bytes:
    tensors = {f"{number}/{label}": t.contiguous() for number, each in versions.items() for label, t in each.items()}
    return sealed(tensors, {"client": name}, kind=_FORMAT)
