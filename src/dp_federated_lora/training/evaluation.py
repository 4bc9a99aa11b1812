"""Quality on test data that its owner declared public."""

from __future__ import annotations

import math

import torch

from dp_federated_lora.data import Examples
from dp_federated_lora.errors import DataError
from dp_federated_lora.training.learner import Learner, losses_of


@torch.no_grad()
def evaluate_model(learner: Learner, examples: Examples) -> dict[str, float]:
    """Accuracy and macro-F1 (classification), or loss per token and perplexity (language modelling).

    Macro-F1 averages over the classes that occur among labels or predictions.

    Raises:
        DataError: if there are no examples.
    """
    if not len(examples):
        raise DataError("there are no test examples to evaluate on; check [data] test")
    if examples.labels is None:
        loss = tokens = 0.0
        for batch in learner.batches(examples, range(len(examples))):
            logits, ids, mask = learner.logits(examples, batch)
            predicted_tokens = mask[:, 1:].sum(dim=1)
            loss += float((losses_of(examples, batch, logits, ids, mask) * predicted_tokens).sum())
            tokens += float(predicted_tokens.sum())
        return {"loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}
    labels = torch.tensor(examples.labels)
    predicted = torch.empty_like(labels)
    for batch in learner.batches(examples, range(len(examples))):
        predicted[batch] = learner.logits(examples, batch)[0].argmax(dim=1)
    return {"accuracy": float((predicted == labels).double().mean()), "macro_f1": macro_f1(labels, predicted)}


@torch.no_grad()
def example_scores(learner: Learner, examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of right predictions and loss of each example, both `(n,)`: of its label, or averaged over its tokens."""
    correct, losses = torch.zeros(len(examples)), torch.zeros(len(examples))
    for batch in learner.batches(examples, range(len(examples))):
        logits, ids, mask = learner.logits(examples, batch)
        losses[batch] = losses_of(examples, batch, logits, ids, mask).float()
        if examples.labels is not None:
            correct[batch] = (logits.argmax(dim=1) == torch.tensor([examples.labels[i] for i in batch])).float()
        else:
            right = (logits[:, :-1].argmax(dim=2) == ids[:, 1:]) * mask[:, 1:]
            correct[batch] = right.sum(dim=1) / mask[:, 1:].sum(dim=1)
    return correct, losses


def macro_f1(labels: torch.Tensor, predicted: torch.Tensor) -> float:
    """Mean over occurring classes of F1 = 2 TP / (2 TP + FP + FN), labels and predictions `(n,)`."""
    classes = torch.unique(torch.cat([labels, predicted]))
    scores = [
        2 * float(((labels == c) & (predicted == c)).sum()) / float((labels == c).sum() + (predicted == c).sum()) for c in classes
    ]
    return sum(scores) / len(scores)
