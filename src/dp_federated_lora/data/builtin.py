"""Sources that are made on this machine: scikit-learn's digits as tables of images, and a small ViT with random weights.

The digits are real data (1,797 scans, 8 x 8, 17 shades; Alpaydin and Kaynak 1998) that come with scikit-learn. The ViT knows
nothing: it stands in where no pretrained vision model is at hand, and every copy of it is the same.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import nn

from dp_federated_lora.errors import SourceError
from dp_federated_lora.files import write_durably

_TEST_EVERY: Final = 5


def builtin(name: str, root: Path) -> Path:
    """Write the source called `name` below `root`, anew: it costs less than to find out whether an old copy is whole.

    Raises:
        SourceError: if there is none of that name, or a package that it needs is missing.
        OSError, StorageError: if `root` cannot be written.
    """
    if name not in _MAKERS:
        raise SourceError(f"there is no builtin {name!r}; choose one of {list(_MAKERS)}")
    try:
        return _MAKERS[name](root / "builtin")
    except ImportError as error:
        raise SourceError(f"builtin {name!r}: {error}; pip install 'dp-federated-lora-lab[images]'") from error


def _digits(root: Path, *, test: bool) -> Path:
    """A table of `image` (PNG as data: URI) and `digit`; every fifth scan is for testing, so that both parts have all writers."""
    from PIL import Image  # noqa: PLC0415  (an extra)
    from sklearn.datasets import load_digits  # noqa: PLC0415  (an extra)

    digits = load_digits()
    lines = ["image,digit"]
    for number, (shades, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (number % _TEST_EVERY == _TEST_EVERY - 1) is test:
            png = io.BytesIO()
            Image.fromarray((shades * 255 / 16).astype("uint8")).save(png, "PNG")
            lines.append(f'"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",{digit}')
    path = root / "digits" / ("test.csv" if test else "train.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, ("\n".join(lines) + "\n").encode())
    return path


def _random_vit(root: Path) -> Path:
    """A ViT of two blocks for 8 x 8 grey images, as a transformers directory."""
    from transformers import ViTConfig, ViTModel  # noqa: PLC0415  (seconds to import)

    config: Any = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
    )
    model: nn.Module = ViTModel(config)
    generator = torch.Generator().manual_seed(0)
    path = root / "random-vit"
    path.mkdir(parents=True, exist_ok=True)
    write_durably(path / "config.json", config.to_json_string(use_diff=False).encode())
    weights = {name: _drawn(name, p.shape, generator) for name, p in model.state_dict().items()}
    write_durably(path / "model.safetensors", save(weights, metadata={"format": "pt"}))
    return path


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Outputs of a layer are about as large as its inputs, and places half as large as what is there."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    scale = 0.5 if name.startswith("embeddings") and len(shape) == 3 else float(shape[1:].numel()) ** -0.5
    return scale * torch.randn(shape, generator=generator)


_MAKERS: Final[Mapping[str, Callable[[Path], Path]]] = {
    "digits/train": partial(_digits, test=False),
    "digits/test": partial(_digits, test=True),
    "random-vit": _random_vit,
}
