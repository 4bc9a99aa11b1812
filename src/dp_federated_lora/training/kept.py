"""What a model's frozen part makes of examples: computed once, kept in memory or in files that later runs map into theirs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_federated_lora.data import Examples
from dp_federated_lora.errors import StorageError


@final
class Kept:
    """Hidden states `(T, h)` and pooled features `(h,)` of examples, by their content.

    Args:
        folder: where files are kept; None for memory alone. They tell as much as the examples that they come from, so the
            folder and its files are its owner's alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.states: dict[object, Tensor] = {}
        self.features: dict[object, Tensor] = {}
        self._folder = folder

    def find(self, examples: Examples, order: Sequence[int], *, key: Callable[[], str]) -> bool:
        """Take what an earlier `put` with this key, these examples and this order wrote; whether it was there.

        It is mapped, not read: only what is used takes memory, and the system may take that back.

        Args:
            examples: all of which are taken.
            order: of the rows of the tensors.
            key: what else they depend on; asked for only with a folder.

        Raises:
            StorageError: if the file is damaged.
        """
        file = self._file(examples, order, key)
        if file is None or not file.exists():
            return False
        try:
            self._enter(examples, order, load_file(file))
        except (SafetensorError, OSError, KeyError, RuntimeError, IndexError) as error:
            raise StorageError(f"{file} is not what was written there: {error}; delete it, and it is computed anew") from error
        return True

    def put(self, examples: Examples, order: Sequence[int], tensors: dict[str, Tensor], *, key: Callable[[], str]) -> None:
        """Keep "states" `(tokens of all, h)`, "features" `(n, h)`, or both, of all examples; with a folder, as a file.

        Raises:
            StorageError: if the disk refuses the file.
        """
        if file := self._file(examples, order, key):
            _write(file, tensors)
            self.find(examples, order, key=key)
        else:
            self._enter(examples, order, tensors)

    def _file(self, examples: Examples, order: Sequence[int], key: Callable[[], str]) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(key().encode())
        for index in order:
            digest.update(repr(examples.content(index)).encode())
        return self._folder / f"{digest.hexdigest()}.safetensors"

    def _enter(self, examples: Examples, order: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        lengths = [len(examples.tokens[index]) for index in order]
        contents = [examples.content(index) for index in order]
        if "states" in tensors:
            self.states.update(zip(contents, torch.split(tensors["states"], lengths), strict=True))
        if "features" in tensors:
            self.features.update(zip(contents, tensors["features"], strict=True))


def fingerprint(tensors: Mapping[str, Tensor], *facts: object) -> str:
    """SHA-256 over names and bytes of `tensors`, over `facts` as Python prints them, and over the libraries that compute."""
    digest = hashlib.sha256(repr((torch.__version__, version("transformers"), *facts)).encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch.touch(mode=0o600)
        save_file(tensors, scratch)
        scratch.chmod(0o600)
        scratch.replace(file)
    except (SafetensorError, OSError) as error:
        with suppress(OSError):
            scratch.unlink()
        raise StorageError(f"cannot keep activations in {file.parent}: {error}; free space, or remove run.cache") from error
