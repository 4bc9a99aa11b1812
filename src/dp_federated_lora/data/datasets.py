"""Texts and images to examples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dp_federated_lora.data.images import ImageFormat
from dp_federated_lora.errors import ConfigError, DataError, ModelError


class Tokenizer(Protocol):
    """What this module needs of a transformers tokenizer."""

    @property
    def eos_token_id(self) -> int | None:
        """Token that ends a document; None when the vocabulary has none."""

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Return the token ids of each text under `input_ids`."""


class Example(NamedTuple):
    """One tokenised example: its token ids, its label (None for language modelling) and its unit id."""

    tokens: tuple[int, ...]
    label: int | None
    unit: int


@dataclass(frozen=True, slots=True)
class Examples:
    """Tokenised examples of any length, without padding; there may be none.

    Args:
        tokens: token ids of each example, at least one; where an image is, `ImageFormat.token` for each of its positions.
        labels: index of each example's label in the public label list; None for language modelling.
        units: id of each example, distinct, kept by `subset`; default 0, 1, 2, ...
        images: one image of each example, as `ImageFormat.read` gives it; empty where examples are text.

    """

    tokens: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...] | None = None
    units: tuple[int, ...] = ()
    images: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if self.labels is not None and len(self.labels) != count:
            raise DataError(f"{count} examples came with {len(self.labels)} labels; give one label each")
        if not self.units:
            object.__setattr__(self, "units", tuple(range(count)))
        if len(self.units) != count or len(set(self.units)) != count:
            raise DataError(f"{count} examples need {count} distinct unit ids; leave repeated examples out")
        if self.images and len(self.images) != count:
            raise DataError(f"{count} examples came with {len(self.images)} images; give one image each, or none at all")
        if () in self.tokens:
            raise DataError(f"example {self.tokens.index(())} has no token; leave empty texts out")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Example:
        label = None if self.labels is None else self.labels[index]
        return Example(self.tokens[index], label, self.units[index])

    def content(self, index: int) -> tuple[tuple[int, ...]] | tuple[tuple[int, ...], bytes]:
        """What the model sees of an example: its tokens, and its image where there are any."""
        return (self.tokens[index], self.images[index]) if self.images else (self.tokens[index],)

    def subset(self, indices: Iterable[int]) -> Examples:
        """Return the examples at `indices`, in that order, with the unit ids they have here.

        Raises:
            DataError: if an index is out of range or appears twice.

        """
        chosen = list(indices)
        if wrong := [index for index in chosen if not 0 <= index < len(self)]:
            raise DataError(f"there is no example {wrong[0]}; valid indices are 0 to {len(self) - 1}")
        labels = None if self.labels is None else tuple(self.labels[index] for index in chosen)
        tokens = tuple(self.tokens[index] for index in chosen)
        images = tuple(self.images[index] for index in chosen) if self.images else ()
        return Examples(tokens, labels, tuple(self.units[index] for index in chosen), images)

    @classmethod
    def joined(cls, parts: Sequence[tuple[Examples, Sequence[int]]]) -> Examples:
        """The examples at the given indices of several sets, one after the other, with units 0, 1, 2, ...

        Raises:
            DataError: if some have labels or images and others do not.

        """
        picked = [(examples, index) for examples, indices in parts for index in indices]
        labels = tuple(examples.labels[index] for examples, index in picked if examples.labels is not None)
        images = tuple(examples.images[index] for examples, index in picked if examples.images)
        return cls(tuple(examples.tokens[index] for examples, index in picked), labels or None, (), images)

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """Hold out about `share` of the examples; returns the rest and the held-out ones.

        Whether an example is held out depends on itself and the public seed alone, so that adding or removing one example moves
        no other.
        """

        def held_out(index: int) -> bool:
            digest = hashlib.sha256(repr((seed, *self.content(index))).encode()).digest()
            return int.from_bytes(digest[:8]) < share * 2**64

        chosen = [held_out(index) for index in range(len(self))]
        return self.subset(i for i, out in enumerate(chosen) if not out), self.subset(i for i, out in enumerate(chosen) if out)


def tokenize_classification(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    label_names: Sequence[str],
    tokenizer: Tokenizer,
    max_tokens: int,
) -> Examples:
    """Turn labelled texts into examples, one for each text.

    The labels that private data contains are private, so they are never collected from the data:
    `label_names` is public and its order numbers the labels.

    Args:
        texts: `(n,)` texts.
        labels: `(n,)` label of each text.
        label_names: public list of all labels, distinct.
        tokenizer: tokenizer of the base model; it adds its special tokens.
        max_tokens: longest example, special tokens included; the rest of a text is cut off.

    Raises:
        ConfigError: if `label_names` has duplicates, or `max_tokens` is below 2.
        DataError: if the lengths differ, a label is not in `label_names`, or a text has no token.

    """
    if len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts came with {len(labels)} labels; give one label for each text")
    numbers = _numbered(labels, label_names)
    tokens = _encode(tokenizer, texts, max_tokens, truncation=True, max_length=max_tokens)
    return Examples(tuple(map(tuple, tokens)), numbers)


def labelled_images(
    images: Sequence[bytes], labels: Sequence[str], *, label_names: Sequence[str], image_format: ImageFormat
) -> Examples:
    """Turn labelled images into examples, one for each image.

    Args:
        images: `(n,)` images from `image_format.read`.
        labels: `(n,)` label of each image.
        label_names: as in `tokenize_classification`.
        image_format: how the model takes them.

    Raises:
        ConfigError, DataError: as `tokenize_classification`.

    """
    place = (image_format.token,) * image_format.positions
    return Examples((place,) * len(images), _numbered(labels, label_names), images=tuple(images))


def tokenize_causal(texts: Sequence[str], *, tokenizer: Tokenizer, max_tokens: int) -> Examples:
    """Turn documents into examples for next-token prediction.

    Each document gets an end-of-text token and is cut into chunks; a last chunk of one token predicts
    nothing and is dropped. An example, and so the unit of example-level privacy, is one chunk: a document
    longer than `max_tokens` is several units.

    Args:
        texts: documents.
        tokenizer: tokenizer of the base model.
        max_tokens: longest chunk, at least 2.

    Raises:
        ConfigError: if `max_tokens` is below 2.
        ModelError: if the tokenizer has no end-of-text token.

    """
    documents = _ended(tokenizer, texts, max_tokens)
    chunks = (ids[at : at + max_tokens] for ids in documents for at in range(0, len(ids), max_tokens))
    return Examples(tuple(tuple(chunk) for chunk in chunks if len(chunk) >= 2))


def tokenize_image_text(
    texts: Sequence[str], images: Sequence[bytes], *, tokenizer: Tokenizer, max_tokens: int, image_format: ImageFormat
) -> Examples:
    """Turn images with texts into examples for predicting a text after its image, one for each row.

    Args:
        texts: `(n,)` texts; what does not fit is cut off, and an end-of-text token ends what fits.
        images: `(n,)` images from `image_format.read`.
        tokenizer: tokenizer of the base model.
        max_tokens: longest example, the places of the image included.
        image_format: how the model takes images.

    Raises:
        ConfigError: if `max_tokens` leaves no token for the text.
        ModelError: if the tokenizer has no end-of-text token.

    """
    place = (image_format.token,) * image_format.positions
    if max_tokens <= len(place):
        raise ConfigError(f"max_tokens must be more than the {len(place)} that an image takes, got {max_tokens}")
    # A text that spells out the image's token would ask for an image that is not there.
    bodies = [[i for i in ids if i != image_format.token] for ids in _ended(tokenizer, texts, max_tokens)]
    return Examples(tuple((*place, *ids)[:max_tokens] for ids in bodies), images=tuple(images))


def load_tokenizer(path: Path, gguf_file: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model on disk; no network, no code from the model's directory.

    Args:
        path: a transformers directory, a directory with `gguf_file`, or a `.gguf` file itself.
        gguf_file: name of the GGUF file in the directory `path`.

    Raises:
        ModelError: if there is no usable tokenizer.

    """
    from transformers import AutoTokenizer  # noqa: PLC0415  (seconds to import; reading tables needs none)

    folder, file = (path.parent, path.name) if path.suffix == ".gguf" else (path, gguf_file)
    if not (folder / (file or "")).exists():
        raise ModelError(f"there is no {folder / (file or '')} to load a tokenizer from; check the path")
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ModelError(
            f"cannot load a tokenizer from {path} ({type(error).__name__}: {error}); give a directory with "
            "tokenizer.json, or a .gguf file"
        ) from error
    return tokenizer


def _numbered(labels: Sequence[str], label_names: Sequence[str]) -> tuple[int, ...]:
    """Place of each label in the public list."""
    numbers = {name: number for number, name in enumerate(label_names)}
    if len(numbers) != len(label_names):
        raise ConfigError(f"the public label list has duplicates: {list(label_names)}; list each label once")
    for row, label in enumerate(labels):
        if label not in numbers:
            raise DataError(
                f"row {row} has label {label!r}, which is not in the public label list {list(label_names)}; "
                "add it to the list, or leave the row out"
            )
    return tuple(numbers[label] for label in labels)


def _ended(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Whole texts, each with an end-of-text token."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError("the tokenizer has no end-of-text token; choose the one of a causal language model")
    return [[*ids, end] for ids in _encode(tokenizer, texts, max_tokens, add_special_tokens=False)]


def _encode(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, **options: Any) -> list[list[int]]:
    """Tokenise without padding, so that the length of a text costs only that text."""
    if max_tokens < 2:
        raise ConfigError(f"max_tokens of an example must be at least 2, got {max_tokens}")
    if not texts:  # a client may hold nothing, but tokenizers refuse an empty batch
        return []
    ids: list[list[int]] = tokenizer(list(texts), padding=False, verbose=False, **options)["input_ids"]
    return ids
