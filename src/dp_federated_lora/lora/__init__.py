"""Base models and their LoRA adapters."""

from dp_federated_lora.lora.adapter import AdaptedModel, Factor, adapt, block_list, orthonormal
from dp_federated_lora.lora.models import Classifier, Task, compute_device, load_backbone, preload
from dp_federated_lora.lora.vision import Vision, vision_of

__all__ = (
    "AdaptedModel",
    "Classifier",
    "Factor",
    "Task",
    "Vision",
    "adapt",
    "block_list",
    "compute_device",
    "load_backbone",
    "orthonormal",
    "preload",
    "vision_of",
)
