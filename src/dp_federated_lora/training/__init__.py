"""Losses, local steps and evaluation of an adapted model on tokenised examples."""

from dp_federated_lora.training.cohort import local_updates
from dp_federated_lora.training.evaluation import evaluate_model, example_scores
from dp_federated_lora.training.learner import Learner
from dp_federated_lora.training.local import LocalSteps, example_gradients, local_update

__all__ = ("Learner", "LocalSteps", "evaluate_model", "example_gradients", "example_scores", "local_update", "local_updates")
