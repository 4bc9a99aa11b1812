"""Attacks on the guarantee: canaries with one-run bounds, and replays on neighbouring data."""

from dp_federated_lora.audit.canaries import CanaryAudit
from dp_federated_lora.audit.neighbours import Difference, Transcript, compare
from dp_federated_lora.audit.verdict import Verdict, judge

__all__ = ("CanaryAudit", "Difference", "Transcript", "Verdict", "compare", "judge")
