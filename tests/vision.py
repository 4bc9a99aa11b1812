"""Small images, and models that take them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dp_federated_lora.data import Examples, ImageFormat
from dp_federated_lora.lora import Task

VIT_IMAGES = ImageFormat(channels=1, height=8, width=8, token=0, positions=5, mean=(0.5,), std=(0.5,))
LLAVA_IMAGES = ImageFormat(channels=3, height=8, width=8, token=49, positions=4)


def llava_config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=49)


def llava_backbone() -> nn.Module:
    return LlavaForConditionalGeneration(llava_config()).eval().requires_grad_(False)


def some_images(images: ImageFormat, task: Task) -> Examples:
    """Four random images; after those of a vision-language model comes text of several lengths."""
    generator = torch.Generator().manual_seed(2)
    shape = (4, images.height * images.width * images.channels)
    pixels = tuple(bytes(row) for row in torch.randint(0, 256, shape, generator=generator).tolist())
    place = (images.token,) * images.positions
    if task is Task.CLASSIFICATION:
        return Examples((place,) * 4, (0, 1, 2, 1), images=pixels)
    texts = [tuple(torch.randint(1, 49, (n,), generator=generator).tolist()) for n in (3, 7, 1, 5)]
    return Examples(tuple(place + text for text in texts), images=pixels)
