"""Newswire from start to end: this package beside a script of Opacus and PEFT, both at epsilon = 8 and delta = 1e-5.

    python benchmarks/epoch.py [--epochs 2] [--tokens 64] [--rows "Opacus, mean pooling" "ours, same work"]

The script is written as Opacus' text classification tutorial: a sequence classifier of transformers, texts padded to max_length,
`make_private_with_epsilon`, `BatchMemoryManager`, AdamW; it trains LoRA r = 8 on query and value, and the head. "Mean pooling"
has the mean over tokens, as this encoder was trained, in place of the pooler of "tutorial". Batch size, clip norm and learning
rates of LoRA and head are the best of a few on the test texts.

Ours goes through `dp_federated_lora.train`. "Same work" has the script's layers, epochs, sampling rate and clip norm, and Adam;
"last two blocks" adapts those only, so that what the blocks below make of a text is computed once; "recipe" is
examples/newswire.toml as it ships, but in float32 and with --tokens: 20 participants, 185 rounds of the head alone, then 15 of
the adapter too, a fifth of all texts in each.

Float32, all cores or --threads of them, wall clock. Training is all between loading and scoring the test texts: in ours, frozen
activations are part of it, and so are the recipe's scores on some test texts every ten rounds. Examples are those that sampling
is expected to draw. The script computes every token of a padded text; ours makes batches of texts of similar length.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import opacus
import peft
import torch
import transformers
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from dp_federated_lora import Config, load_config, train
from dp_federated_lora.data import read_table, resolve
from dp_federated_lora.federated import RoundReport
from dp_federated_lora.training.evaluation import macro_f1

RECIPE: Final = Path(__file__).parents[1] / "examples" / "newswire.toml"
STEPS_OF_AN_EPOCH: Final = 22
PHYSICAL_BATCH: Final = 32
CLIP_NORM: Final = 0.1
RATE: Final = 1e-3
HEAD_RATE: Final = 5e-2
OUR_HEAD_RATE: Final = 3 * HEAD_RATE
"""Features have length 1 in ours, and about 3 in the script."""


class Figures(NamedTuple):
    """Seconds, examples and scores of a run.

    `parts` of training are frozen activations, rounds of the head alone and others; `examples` are those of the latter two.
    `course` has seconds of training, and the accuracy by then on the test texts that the recipe scores every ten rounds.
    """

    loading: float
    parts: Sequence[float]
    examples: tuple[float, float]
    scoring: float
    accuracy: float
    macro_f1: float
    epsilon: float
    course: Sequence[tuple[float, float]]

    @property
    def speed(self) -> float:
        """Examples per second of training."""
        return sum(self.examples) / sum(self.parts)


class MeanPooled(nn.Module):
    """Encoder, mean over tokens, linear head."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits `(B, classes)` of token ids and mask `(B, T)`."""
        states, mask = (
            self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,
            attention_mask[..., None],
        )
        return SequenceClassifierOutput(logits=self.classifier((states * mask).sum(dim=1) / mask.sum(dim=1)))


def encoded(config: Config, source: str | None) -> TensorDataset:
    """Token ids, mask and label of each text, padded to max_length."""
    table, tokenizer = read_table(resolve(source or "")), transformers.AutoTokenizer.from_pretrained(resolve(config.model.source))
    texts, longest = table.column(config.data.text_column), config.model.max_tokens
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
    labels = [config.data.labels.index(label) for label in table.column(config.data.label_column or "")]
    return TensorDataset(batch["input_ids"], batch["attention_mask"], torch.tensor(labels))


def adapted(config: Config, mean_pooling: bool) -> nn.Module:
    """The sequence classifier with LoRA, in training mode as the tutorial has it."""
    folder, classes, lora = resolve(config.model.source), len(config.data.labels), config.lora
    base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
    if mean_pooling:
        base = MeanPooled(transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False), classes)
    options = {"lora_dropout": 0.05, "target_modules": list(lora.targets), "modules_to_save": ["classifier"]}
    return peft.get_peft_model(base, peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, **options)).train()


def script(config: Config, epochs: int, *, mean_pooling: bool = True) -> Figures:
    """Opacus and PEFT."""
    transformers.set_seed(0)
    start = time.perf_counter()
    data, test = encoded(config, config.data.train), encoded(config, config.data.test)
    model: Any = adapted(config, mean_pooling)
    factors, head = (
        [p for name, p in model.named_parameters() if p.requires_grad and ("lora" in name) == it] for it in (True, False)
    )
    engine, criterion = PrivacyEngine(), nn.CrossEntropyLoss()
    made: Any = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW([{"params": factors}, {"params": head, "lr": HEAD_RATE}], lr=RATE),
        data_loader=DataLoader(data, batch_size=-(-len(data) // STEPS_OF_AN_EPOCH)),
        target_epsilon=config.privacy.epsilon,
        target_delta=config.privacy.delta,
        epochs=epochs,
        max_grad_norm=CLIP_NORM,
    )
    model, optimizer, loader = made
    loaded = time.perf_counter()
    for _ in range(epochs):
        with BatchMemoryManager(data_loader=loader, max_physical_batch_size=PHYSICAL_BATCH, optimizer=optimizer) as batches:
            for ids, mask, labels in batches:
                optimizer.zero_grad()
                criterion(model(input_ids=ids, attention_mask=mask).logits, labels).backward()
                optimizer.step()
    end = time.perf_counter()
    model.eval()
    with torch.no_grad():
        predicted = [model(input_ids=ids, attention_mask=mask).logits.argmax(dim=1) for ids, mask, _ in DataLoader(test, 64)]
    labels = test.tensors[2]
    right = (torch.cat(predicted) == labels).double()
    some = right[:: -(-len(right) // config.run.evaluate_examples)]
    return Figures(
        loading=loaded - start,
        parts=(0.0, 0.0, end - loaded),
        examples=(0.0, epochs * len(data)),
        scoring=time.perf_counter() - end,
        accuracy=float(right.mean()),
        macro_f1=macro_f1(labels, torch.cat(predicted)),
        epsilon=engine.get_epsilon(config.privacy.delta),
        course=[(end - loaded, float(some.mean()))],
    )


def same_work(epochs: int, *, blocks: int) -> list[str]:
    """What makes the recipe do the script's work, with the last so many of MiniLM's six blocks adapted."""
    return [
        f"lora.last_layers={blocks}",
        "federation.clients=1",
        "federation.partition=iid",
        f"privacy.clip_norm={CLIP_NORM}",
        f"privacy.sampling_rate={1 / STEPS_OF_AN_EPOCH}",
        f"privacy.rounds={epochs * STEPS_OF_AN_EPOCH}",
        "method.name=fedavg",
        "training.head_rounds=0",
        "training.server_optimizer=adam",
        f"training.server_learning_rate={RATE}",
        f"training.server_head_learning_rate={OUR_HEAD_RATE}",
        "run.evaluate_every=1000000",
    ]


def ours(config: Config) -> Figures:
    """The public API, whose callbacks tell the parts of training apart."""
    prepared, rounds, course = list[float](), list[float](), list[tuple[float, float]]()

    def on_phase(name: str, _: float) -> None:
        if name == "preparing examples":
            prepared.append(time.perf_counter())

    def on_round(report: RoundReport) -> None:
        rounds.append(time.perf_counter())
        if report.public_metrics:
            course.append((rounds[-1] - prepared[0], report.public_metrics["accuracy"]))

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, out=Path(folder) / "run", on_phase=on_phase, on_round=on_round)
    end, head, cohort = time.perf_counter(), config.training.head_rounds, config.privacy.sampling_rate * config.population
    marks = (prepared[0], prepared[-1], rounds[head - 1] if head else prepared[-1], rounds[-1])
    return Figures(
        loading=prepared[0] - start,
        parts=[after - before for before, after in pairwise(marks)],
        examples=(head * cohort, (len(rounds) - head) * cohort),
        scoring=end - rounds[-1],
        epsilon=result.epsilon,
        course=course,
        **result.metrics,
    )


def rows(tokens: int, epochs: int) -> dict[str, Callable[[], Figures]]:
    """What can be measured, by name."""
    shipped = [f"model.max_tokens={tokens}", "model.dtype=float32"]
    recipe, same, upper = (
        load_config(RECIPE, overrides=shipped + changes)
        for changes in ([], same_work(epochs, blocks=6), same_work(epochs, blocks=2))
    )
    return {
        "Opacus, tutorial": partial(script, recipe, epochs, mean_pooling=False),
        "Opacus, mean pooling": partial(script, recipe, epochs),
        "ours, same work": partial(ours, same),
        "ours, last two blocks": partial(ours, upper),
        "ours, recipe": partial(ours, recipe),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, choices=range(2, 41), default=2, metavar="2..40")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rows", nargs="+", default=["Opacus, mean pooling", "ours, same work", "ours, last two blocks", "ours, recipe"]
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, Opacus {opacus.__version__}, PEFT "
        f"{peft.__version__}, transformers {transformers.__version__}; {options.tokens} tokens, {options.epochs} epochs"
    )
    print(f"{'':24}{'load, s':>9}{'train, s':>10}{'examples/s':>12}{'ratio':>7}", end="")
    print(f"{'score, s':>10}{'accuracy':>10}{'macro-F1':>10}{'epsilon':>9}")
    runs, measured = rows(options.tokens, options.epochs), dict[str, Figures]()
    for name in options.rows:
        run = measured[name] = runs[name]()
        first = measured[options.rows[0]]
        print(f"{name:24}{run.loading:9.1f}{sum(run.parts):10.1f}{run.speed:12.1f}{run.speed / first.speed:7.2f}", end="")
        print(f"{run.scoring:10.1f}{100 * run.accuracy:10.1f}{100 * run.macro_f1:10.1f}{run.epsilon:9.3f}", flush=True)
    seconds, goal = first.course[-1]
    for name, run in measured.items():
        if not name.startswith("ours"):
            continue
        frozen, head, rest = run.parts
        print(f"{name}: frozen activations {frozen:.1f} s, rounds of the head alone {head:.1f} s, others {rest:.1f} s", end=" ")
        print(f"({run.examples[1] / rest:.1f} examples/s)")
        if reached := [f"{second:.1f}" for second, accuracy in run.course if accuracy >= goal]:
            print(f"  {100 * goal:.1f} % on the scored texts after {reached[0]} s; the first row has that after {seconds:.1f} s")


if __name__ == "__main__":
    main()
