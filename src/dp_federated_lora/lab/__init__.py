"""A run from configuration to files: what the commands and the Python API call."""

from dp_federated_lora.lab.auditing import AuditResult, audit
from dp_federated_lora.lab.config import Config, load_config
from dp_federated_lora.lab.planning import RunPlan, plan_run
from dp_federated_lora.lab.run import TrainResult, train
from dp_federated_lora.lab.scoring import evaluate

__all__ = ("AuditResult", "Config", "RunPlan", "TrainResult", "audit", "evaluate", "load_config", "plan_run", "train")
