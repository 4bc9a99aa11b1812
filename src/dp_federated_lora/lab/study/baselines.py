"""What private federated training is held against: LoRA without privacy, and a private linear layer on frozen features.

Non-private training exists here and nowhere else in the project: as the anchor that a private result is a share of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from dp_federated_lora.aggregation import FEDAVG
from dp_federated_lora.data import Examples
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.lora import Factor
from dp_federated_lora.privacy import calibrate_noise_multiplier
from dp_federated_lora.training import evaluate_model
from dp_federated_lora.training.evaluation import example_scores, macro_f1

Scores = Mapping[str, float]

TEXTS: Final = 2**15
"""Examples of a language model's anchor, so that it takes minutes on two cores."""


def not_private(bench: Workbench, examples: Examples, test: Examples, seed: int) -> Scores:
    """Test scores of both factors and the head trained by AdamW with linear decay: the anchor.

    Three epochs of labelled examples. A language model, which has been through far more text, sees `TEXTS` of them once.
    """
    epochs, size = 3, 32
    if examples.labels is None:
        epochs, examples = 1, examples.subset(range(0, len(examples), -(-len(examples) // TEXTS)))
    bench.learner.prepare(examples, test)
    parameters = bench.model.train_only(FEDAVG.factors)
    head = [p for name, p in parameters.items() if Factor.of(name) is Factor.HEAD]
    rest = [p for name, p in parameters.items() if Factor.of(name) is not Factor.HEAD]
    optimizer = torch.optim.AdamW([{"params": rest, "lr": 1e-3}, {"params": head, "lr": 5e-2}], weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(examples) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            optimizer.zero_grad()
            for batch in bench.learner.batches(examples, chosen):
                torch.autograd.backward(bench.learner.losses(examples, batch).sum() / len(chosen))
            optimizer.step()
            schedule.step()
    if test.labels is not None:
        return evaluate_model(bench.learner, test)
    correct, losses = example_scores(bench.learner, test)  # as private evaluations score: each text counts once
    cap = bench.config.evaluation.loss_cap if bench.config.evaluation else math.inf
    return {"accuracy": float(correct.mean()), "loss": float(losses.clamp(max=cap).mean())}


def probe(bench: Workbench, examples: Examples, test: Examples, seed: int) -> Scores:
    """Test scores of a linear layer on frozen features by DP-SGD, every example protected (q = 0.1, 200 steps, clip norm 1).

    The best of four learning rates on the test table, which flatters it.
    """
    privacy = bench.config.privacy
    bench.learner.prepare(examples, test)
    features, labels = frozen_features(bench, examples)
    held_out, truth = frozen_features(bench, test)
    rate, steps, clip = 0.1, 200, 1.0
    multiplier = calibrate_noise_multiplier(epsilon=privacy.epsilon, delta=privacy.delta, sampling_rate=rate, rounds=steps)
    generator = torch.Generator().manual_seed(seed)
    best: dict[str, float] = {"accuracy": -1.0}
    for learning_rate in (8.0, 16.0, 32.0, 64.0):
        weight = torch.zeros(len(bench.config.data.labels), features.shape[1])
        for _ in range(steps):
            picked = torch.rand(len(labels), generator=generator) < rate
            x, y = features[picked], labels[picked]
            error = (x @ weight.T).softmax(dim=1)
            error[torch.arange(len(y)), y] -= 1.0
            norms = error.norm(dim=1) * x.norm(dim=1)  # of the outer product
            gradient = (error * (clip / norms).clamp(max=1.0)[:, None]).T @ x
            gradient += multiplier * clip * torch.randn(weight.shape, generator=generator)
            weight -= learning_rate * gradient / (rate * len(labels))
        predicted = (held_out @ weight.T).argmax(dim=1)
        accuracy = float((predicted == truth).double().mean())
        if accuracy > best["accuracy"]:
            best = {"accuracy": accuracy, "macro_f1": macro_f1(truth, predicted), "learning_rate": learning_rate}
    return best


@torch.no_grad()
def frozen_features(bench: Workbench, examples: Examples) -> tuple[Tensor, Tensor]:
    """Pooled features with a constant one, `(n, h + 1)`, and labels `(n,)`: the untouched backbone."""
    head = bench.model.module.get_submodule("head")
    rows, seen = torch.empty(len(examples), bench.model.module.get_parameter("head.weight").shape[1] + 1), []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in bench.learner.batches(examples, range(len(examples))):
        bench.learner.logits(examples, batch)
        rows[batch] = torch.nn.functional.pad(seen.pop().cpu(), (0, 1), value=1.0)
    handle.remove()
    return rows, torch.tensor(examples.labels)


BASELINES: Final[Mapping[str, Callable[[Workbench, Examples, Examples, int], Scores]]] = {
    "probe": probe,
    "not-private": not_private,
}
