"""Federated LoRA fine-tuning with differential privacy that is computed, enforced and auditable.

The names here are imported when they are first used, so `import dp_federated_lora` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_federated_lora.lab import Config, RunPlan, TrainResult, evaluate, load_config, plan_run, train

__all__ = ("Config", "RunPlan", "TrainResult", "evaluate", "load_config", "plan_run", "train")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dp_federated_lora import lab  # noqa: PLC0415  (torch and transformers load on first use)

    return getattr(lab, name)
