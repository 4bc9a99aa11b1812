"""Images of a table to the pixels that a model takes in."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from dp_federated_lora.data.tables import Table
from dp_federated_lora.errors import DataError, ModelError

# A few hundred bytes can claim billions of pixels; the size is in the header and is looked at before anything is decoded.
MAX_PIXELS: Final = 64_000_000
_BILINEAR: Final = 2  # Pillow's number, which preprocessor files use too


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFormat:
    """How a model takes an image: its shape, its normalisation, and the tokens that hold its place.

    Args:
        channels: 1 (grey) or 3 (red, green, blue).
        height, width: pixels; images of other sizes are scaled.
        token: token id that stands where the image is.
        positions: number of such tokens: what one image takes of a sequence.
        mean, std: of each channel, on a scale of 0 to 1.
        resample: Pillow's number of the filter that scales.
    """

    channels: int
    height: int
    width: int
    token: int
    positions: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = _BILINEAR

    @classmethod
    def of(cls, folder: Path, *, channels: int, height: int, width: int, token: int, positions: int) -> Self:
        """With the normalisation in a model's directory: `processor_config.json` or `preprocessor_config.json`, else 0.5.

        Raises:
            ModelError: if the model takes neither grey nor coloured images, or its file does not say how.
        """
        facts: dict[str, Any] = {}
        try:
            for name in ("preprocessor_config.json", "processor_config.json"):
                if (folder / name).exists():
                    found = json.loads((folder / name).read_text(encoding="utf-8"))
                    facts = found.get("image_processor", found)
            mean = tuple(map(float, facts.get("image_mean", (0.5,) * channels)))
            std = tuple(map(float, facts.get("image_std", (0.5,) * channels)))
            resample = int(facts.get("resample", _BILINEAR))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder} does not say how images are normalised: {error}; repair its preprocessor file") from error
        if channels not in (1, 3) or len(mean) != channels or len(std) != channels:
            raise ModelError(f"{folder} takes {channels} channels, normalised by {mean} and {std}; 1 or 3 can be read")
        if not all(math.isfinite(m) and math.isfinite(s) and s > 0 for m, s in zip(mean, std, strict=True)):
            raise ModelError(
                f"{folder} normalises images by {mean} and {std}, which is not possible; repair its preprocessor file"
            )
        return cls(
            channels=channels, height=height, width=width, token=token, positions=positions, mean=mean, std=std, resample=resample
        )

    def read(self, table: Table, column: str) -> tuple[bytes, ...]:
        """Images of a column, each as its bytes `(height, width, channels)`.

        A cell is the path of a file, relative to the table, or a `data:` URI that holds one; anything Pillow reads.

        Raises:
            DataError: if there is no such column, or an image cannot be had or has more than `MAX_PIXELS`; names the row.
        """
        images = []
        for row, cell in enumerate(table.column(column)):
            try:
                images.append(self._decode(_content(cell, table.path.parent)))
            except (OSError, ValueError, SyntaxError, binascii.Error) as error:  # Pillow raises all of these
                shown = cell if len(cell) <= 60 else f"{cell[:60]}..."
                raise DataError(
                    f"{table.path}, row {row}: column {column!r} has {shown!r}, which is not an image: {error}; give the path "
                    "of an image file, relative to the table, or a data: URI"
                ) from error
        return tuple(images)

    def pixels(self, images: Sequence[bytes]) -> Tensor:
        """Normalised pixels `(B, channels, height, width)` float32 of images from `read`."""
        raw = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8)
        shaped = raw.reshape(len(images), self.height, self.width, self.channels).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (shaped - mean) / std

    def _decode(self, content: bytes) -> bytes:
        from PIL import Image  # noqa: PLC0415  (an extra: only images need it)

        with Image.open(io.BytesIO(content)) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            mode = "L" if self.channels == 1 else "RGB"
            return image.convert(mode).resize((self.width, self.height), self.resample).tobytes()


def _content(cell: str, folder: Path) -> bytes:
    if not cell.startswith("data:"):
        return (folder / cell).read_bytes()
    head, comma, body = cell.partition(",")
    if not (comma and head.endswith(";base64")):
        raise ValueError("a data: URI must be base64")
    return base64.b64decode(body, validate=True)
