"""Engines that carry requests to clients and replies back."""

from dp_federated_lora.runtime.simulator import Simulator

__all__ = ("Simulator",)
