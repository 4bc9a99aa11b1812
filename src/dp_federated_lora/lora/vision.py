"""What a model says about the images that it takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from dp_federated_lora.errors import ModelError
from dp_federated_lora.lora.models import Task

# Others place images by arguments of their own, see them with another attention mask, or leave black ones out.
_VISION_LANGUAGE = "llava"


class Vision(NamedTuple):
    """Shape of an image, and what it takes of a sequence: `positions` times the placeholder `token`."""

    channels: int
    height: int
    width: int
    token: int
    positions: int


@torch.no_grad()
def vision_of(backbone: nn.Module, task: Task) -> Vision:
    """Ask a backbone from `load_backbone` for its images, with one empty image for the number of positions.

    Raises:
        ModelError: if it takes none, or not one image as one sequence of vectors.
    """
    config: Any = backbone.config
    model: Any = backbone
    if task is Task.IMAGE_TEXT and config.model_type != _VISION_LANGUAGE:
        raise ModelError(
            f"[model] task: {task.value!r} is for models of type {_VISION_LANGUAGE!r}, this one is {config.model_type!r}"
        )
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if size is None:
        raise ModelError(f"[model] source: a model of type {config.model_type!r} takes no images; remove data.image_column")
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    empty = torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)
    try:
        if task is Task.IMAGE_TEXT:
            token, states = config.image_token_id, torch.stack(list(model.get_image_features(pixel_values=empty).pooler_output))
        else:
            token, states = 0, model(pixel_values=empty).last_hidden_state
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"[model] source: a model of type {config.model_type!r} takes images in another way: {error}") from error
    if states.ndim != 3 or len(states) != 1:
        raise ModelError(
            f"[model] source: a model of type {config.model_type!r} turns one image into {tuple(states.shape)}, not into one "
            "sequence of vectors; choose a ViT"
        )
    return Vision(channels, height, width, token, states.shape[1])
