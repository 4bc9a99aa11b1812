"""Secure aggregation: sums of clients' integers that show nothing but the sum, and the noise shares in them."""

from dp_federated_lora.secagg.client_session import STAGES, ClientSession
from dp_federated_lora.secagg.field import Field
from dp_federated_lora.secagg.mechanisms import (
    DiscreteGaussian,
    DistributedMechanism,
    SecureSum,
    Skellam,
)
from dp_federated_lora.secagg.server_session import SecureTotal, ServerSession
from dp_federated_lora.secagg.shares import SharedNoise
from dp_federated_lora.secagg.terms import Terms, circle_for, degree_for

__all__ = (
    "STAGES",
    "ClientSession",
    "DiscreteGaussian",
    "DistributedMechanism",
    "Field",
    "SecureSum",
    "SecureTotal",
    "ServerSession",
    "SharedNoise",
    "Skellam",
    "Terms",
    "circle_for",
    "degree_for",
)
