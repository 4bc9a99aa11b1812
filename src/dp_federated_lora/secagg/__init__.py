"""Secure aggregation: what a client sends so that only the sum of all can be read."""

from dp_federated_lora.secagg.field import Field

__all__ = ("Field",)
