"""Quality on test data that its owner declared public."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch

from dp_federated_lora.data import Examples
from dp_federated_lora.errors import DataError
from dp_federated_lora.training.learner import Learner, losses_of


def evaluate_model(learner: Learner, examples: Examples) -> dict[str, float]:
    """Accuracy and macro-F1 (classification), or loss per token and perplexity (language modelling).

    Macro-F1 averages over the classes that occur among labels or predictions.

    Raises:
        DataError: if there are no examples.
    """
    if not len(examples):
        raise DataError("there are no test examples to evaluate on; check [data] test")
    batches = list(learner.batches(examples, range(len(examples))))
    if examples.labels is None:
        loss = tokens = 0.0
        for batch_loss, batch_tokens in learner.spread(partial(_token_losses, examples), batches):
            loss += batch_loss
            tokens += batch_tokens
        return {"loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}
    labels = torch.tensor(examples.labels)
    predicted = torch.empty_like(labels)
    for batch, classes in zip(batches, learner.spread(partial(_classes, examples), batches), strict=True):
        predicted[batch] = classes
    return {"accuracy": float((predicted == labels).double().mean()), "macro_f1": macro_f1(labels, predicted)}


def example_scores(learner: Learner, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of right predictions and loss of each example, both `(n,)`: of its label, or averaged over its tokens."""
    correct, losses = torch.zeros(len(examples)), torch.zeros(len(examples))
    batches = list(learner.batches(examples, range(len(examples))))
    for batch, scores in zip(batches, learner.spread(partial(_scores, examples), batches), strict=True):
        correct[batch], losses[batch] = scores
    return correct, losses


@torch.no_grad()
def _token_losses(examples: Examples, learner: Learner, batch: Sequence[int]) -> tuple[float, float]:
    logits, ids, mask = learner.logits(examples, batch)
    tokens = mask[:, 1:].sum(dim=1)
    return float((losses_of(examples, batch, logits, ids, mask) * tokens).sum()), float(tokens.sum())


@torch.no_grad()
def _classes(examples: Examples, learner: Learner, batch: Sequence[int]) -> torch.Tensor:
    return learner.logits(examples, batch)[0].argmax(dim=1).cpu()


@torch.no_grad()
def _scores(examples: Examples, learner: Learner, batch: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    logits, ids, mask = learner.logits(examples, batch)
    losses = losses_of(examples, batch, logits, ids, mask).float().cpu()
    if examples.labels is not None:
        return (logits.argmax(dim=1).cpu() == torch.tensor([examples.labels[i] for i in batch])).float(), losses
    right = (logits[:, :-1].argmax(dim=2) == ids[:, 1:]) * mask[:, 1:]
    return (right.sum(dim=1) / mask[:, 1:].sum(dim=1)).cpu(), losses


def macro_f1(labels: torch.Tensor, predicted: torch.Tensor) -> float:
    """Mean over occurring classes of F1 = 2 TP / (2 TP + FP + FN), labels and predictions `(n,)`."""
    classes = torch.unique(torch.cat([labels, predicted]))
    scores = [
        2 * float(((labels == c) & (predicted == c)).sum()) / float((labels == c).sum() + (predicted == c).sum()) for c in classes
    ]
    return sum(scores) / len(scores)
