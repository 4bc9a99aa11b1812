"""How clients' contributions become the next global adapter."""

from dp_federated_lora.aggregation.compression import NO_SKETCH, Sketch
from dp_federated_lora.aggregation.lora.factors import components, truncated
from dp_federated_lora.aggregation.lora.gathered import Gather
from dp_federated_lora.aggregation.lora.methods import FEDAVG, FFA, HEAD_ALONE, METHODS, LinearMethod
from dp_federated_lora.aggregation.scaffold import CONTROL, LENGTH, Scaffold, control_after
from dp_federated_lora.aggregation.server_optimizer import Adam, Ftrl, ServerOptimizer, Sgd

__all__ = (
    "CONTROL",
    "FEDAVG",
    "FFA",
    "HEAD_ALONE",
    "LENGTH",
    "METHODS",
    "NO_SKETCH",
    "Adam",
    "Ftrl",
    "Gather",
    "LinearMethod",
    "Scaffold",
    "ServerOptimizer",
    "Sgd",
    "Sketch",
    "components",
    "control_after",
    "truncated",
)
