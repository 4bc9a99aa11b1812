"""Robust aggregation: what released updates say together when some of their senders lie."""

from dp_federated_lora.aggregation.robust.registry import BEFORE, RULES, RobustAggregator, Stage
from dp_federated_lora.aggregation.robust.updates import LONGEST, Points, Updates

__all__ = ("BEFORE", "LONGEST", "RULES", "Points", "RobustAggregator", "Stage", "Updates")
