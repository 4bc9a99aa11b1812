"""Engines that carry requests to clients and replies back."""

from dp_federated_lora.runtime.simulator import Simulator
from dp_federated_lora.runtime.wire import decode_report, decode_request, encode_report, encode_request

__all__ = ("Simulator", "decode_report", "decode_request", "encode_report", "encode_request")
