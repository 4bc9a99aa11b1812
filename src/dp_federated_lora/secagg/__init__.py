"""Secure aggregation: sums of clients' integers that show nothing but the sum, and the noise shares in them."""

from dp_federated_lora.secagg.client_session import ClientSession
from dp_federated_lora.secagg.field import Field
from dp_federated_lora.secagg.mechanisms import (
    DiscreteGaussian,
    DistributedMechanism,
    SecureSum,
    Skellam,
    calibrate_secure_sum,
)
from dp_federated_lora.secagg.server_session import SecureTotal, ServerSession
from dp_federated_lora.secagg.terms import Terms, degree_for

__all__ = (
    "ClientSession",
    "DiscreteGaussian",
    "DistributedMechanism",
    "Field",
    "SecureSum",
    "SecureTotal",
    "ServerSession",
    "Skellam",
    "Terms",
    "calibrate_secure_sum",
    "degree_for",
)
