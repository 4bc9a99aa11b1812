"""Base models and their LoRA adapters."""

from dp_federated_lora.lora.adapter import AdaptedModel, Factor, adapt, block_list, orthonormal
from dp_federated_lora.lora.models import Task, TextClassifier, load_backbone

__all__ = ("AdaptedModel", "Factor", "Task", "TextClassifier", "adapt", "block_list", "load_backbone", "orthonormal")
