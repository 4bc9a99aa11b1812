"""Examples to padded tensors: batches of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_federated_lora.errors import ConfigError


def length_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group examples, shortest first, into batches whose padded size stays within `max_tokens`.

    Every index appears exactly once. The result depends on the arguments only; equal lengths keep order.

    Args:
        lengths: `(n,)` tokens of each example.
        max_tokens: most tokens of a batch, padding included; a longer example gets a batch of its own.

    Raises:
        ConfigError: if `max_tokens` or a length is below 1.

    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens of a batch must be at least 1, got {max_tokens}")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[index] < 1:
            raise ConfigError(f"example {index} has {lengths[index]} tokens; leave empty examples out")
        # In ascending order the newest example is the longest, so it sets the padded width.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def collate(tokens: Sequence[Sequence[int]], *, pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad on the right to the longest example.

    Args:
        tokens: B examples of any length.
        pad_id: token written where the mask is 0.

    Returns:
        Token ids `(B, T)` int64 and attention mask `(B, T)` int64, 1 on tokens and 0 on padding.

    """
    width = max((len(example) for example in tokens), default=0)
    ids = torch.full((len(tokens), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(tokens), width), dtype=torch.int64)
    for row, example in enumerate(tokens):
        ids[row, : len(example)] = torch.tensor(example, dtype=torch.int64)
        mask[row, : len(example)] = 1
    return ids, mask
