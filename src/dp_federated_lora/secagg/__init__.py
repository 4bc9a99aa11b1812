"""Secure aggregation: what a client sends so that only the sum of all can be read, and the noise shares in it."""

from dp_federated_lora.secagg.field import Field
from dp_federated_lora.secagg.mechanisms import (
    DiscreteGaussian,
    DistributedMechanism,
    SecureSum,
    Skellam,
    calibrate_secure_sum,
)

__all__ = ("DiscreteGaussian", "DistributedMechanism", "Field", "SecureSum", "Skellam", "calibrate_secure_sum")
