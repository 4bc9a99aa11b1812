"""From a configuration to the objects of a run: model, examples, clients, plan."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from dp_federated_lora.aggregation import METHODS, NO_SKETCH, Adam, Ftrl, LinearMethod, Scaffold, ServerOptimizer, Sgd, Sketch
from dp_federated_lora.data import (
    Examples,
    ImageFormat,
    Table,
    by_column,
    dirichlet,
    iid,
    labelled_images,
    load_tokenizer,
    read_table,
    resolve,
    tokenize_causal,
    tokenize_classification,
    tokenize_image_text,
)
from dp_federated_lora.errors import AggregationError, ConfigError, IncompatiblePlan
from dp_federated_lora.federated import Client, ClientMemory, Defence, Delays, Server, ServerState
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.plans import participant_tiers
from dp_federated_lora.lora import AdaptedModel, Classifier, Factor, Task, adapt, compute_device, load_backbone, vision_of
from dp_federated_lora.privacy import (
    PrivacyPlan,
)
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import Learner, LocalSteps

LABEL_WEIGHT: Final = 8.0
"""Length of a head's weights that start from label names: of the order of what training reaches on normalised features."""


def participant_ranks(config: Config) -> tuple[int, ...]:
    """The rank of each simulated participant; public; empty where all have lora.rank."""
    return tuple(group.rank for group in config.federation.ranks for _ in range(group.clients))


def defence(config: Config) -> Defence:
    """What is done about participants who lie."""
    section = config.robust
    if section is None:
        return Defence()
    return Defence(
        rule=section.rule,
        f=section.byzantine,
        before=section.before,
        parameters=section.parameters,
        groups=section.groups or 1,
        around_aggregate=section.clip_around_aggregate,
    )


def defence_problem(config: Config) -> list[str]:
    """Why a round could not be aggregated as [robust] says; empty if it can."""
    sources = config.federation.clients if config.privacy.trust == "local" else defence(config).groups
    try:
        defence(config).require(METHODS[config.method.name], sources)
    except (AggregationError, IncompatiblePlan) as error:
        return [f"robust: {error}"]
    return []


def defence_in_words(config: Config) -> str:
    """The defence and the price of its groups."""
    chosen, words = defence(config), list[str]()
    if chosen.rule is not None:
        over = f"{chosen.groups} groups, noise x {chosen.price:.4g}" if chosen.groups > 1 else "participants' reports"
        words.append(f"{' + '.join((*chosen.before, chosen.rule))} over {over}; at most {chosen.f} lie")
    if chosen.around_aggregate:
        words.append("clips around the last aggregate")
    return "; ".join(words)


def defence_notes(config: Config) -> tuple[str, ...]:
    """What a defence means for the guarantee, and what it costs."""
    section, notes = config.robust, list[str]()
    if section is not None and section.groups is not None:
        notes.append(
            f"a round releases the sums of {section.groups} groups of participants, each with the noise of a whole round; a unit "
            "is in one group, so this costs what one sum costs in privacy; in utility, the mean over groups has sqrt(groups) = "
            f"{defence(config).price:.4g} times the noise of one sum"
        )
    if section is not None and section.rule is not None:
        notes.append(f"the robust rule ({section.rule}) sees noised values alone; that at most {section.byzantine} participants")
        notes[-1] += " lie is assumed for utility and not for privacy"
    return tuple(notes)


def unit_notes(config: Config) -> tuple[str, ...]:
    """What the privacy unit means for this data, where its name does not say it."""
    if config.privacy.unit == "example" and config.model.task == "causal-lm":
        return (f"an example is a piece of text of at most {config.model.max_tokens} tokens: a longer text is several units",)
    if config.method.name == "fedsa":
        return ("each participant's own B stays where its data are: it has no noise, and who is given one is not covered",)
    return ()


def participant_names(config: Config) -> list[str]:
    """Names of the simulated participants; public."""
    width = len(str(config.federation.clients - 1))
    return [f"client-{number:0{width}d}" for number in range(config.federation.clients)]


def linear_method(config: Config) -> LinearMethod:
    """The method of a configuration, with its rounds of the head alone and its sketch."""
    sketch = Sketch(config.compression.ratio, config.run.seed) if config.compression else NO_SKETCH
    return replace(METHODS[config.method.name], head_rounds=config.training.head_rounds, sketch=sketch)


def server_optimizer(config: Config) -> ServerOptimizer:
    """The server optimiser of a configuration."""
    training = config.training
    optimizer: ServerOptimizer = Sgd(training.server_learning_rate, training.server_momentum)
    if training.server_optimizer == "ftrl":
        optimizer = Ftrl(training.server_learning_rate, training.server_momentum)
    elif training.server_optimizer != "sgd":
        optimizer = Adam(training.server_learning_rate, yogi=training.server_optimizer == "yogi")
    return Scaffold(optimizer, config.privacy.sampling_rate) if training.local_control else optimizer


def head_scale(config: Config) -> float:
    """Length of the head's steps relative to the adapter's."""
    training = config.training
    return (training.server_head_learning_rate or training.server_learning_rate) / training.server_learning_rate


def local_steps(config: Config) -> LocalSteps | None:
    """Local steps of unit = client, None for unit = example."""
    training = config.training
    if training.local_steps and training.local_batch_size and training.local_learning_rate:
        return LocalSteps(
            steps=training.local_steps,
            batch_size=training.local_batch_size,
            learning_rate=training.local_learning_rate,
            optimizer=training.local_optimizer,
            proximal=training.local_proximal,
            schedule=training.local_schedule,
            rounds=config.privacy.rounds,
            steps_end=training.local_steps_end,
            control=training.local_control is not None,
        )
    return None


@final
@dataclass(frozen=True, slots=True)
class Workbench:
    """Model and what turns a table into its examples.

    Args:
        config: what they were made from.
        model: the adapted model at its start.
        learner: batches examples into it.
        method: which factors are trained.
        tokenizer: of the base model; None where only images go in.
        images: how the model takes images; None where none go in.
    """

    config: Config
    model: AdaptedModel
    learner: Learner
    method: LinearMethod
    tokenizer: Any
    images: ImageFormat | None

    @classmethod
    def of(cls, config: Config) -> Workbench:
        """Load the model; set the number of threads, once and here only.

        Raises:
            SourceError, ModelError: if the model cannot be had or adapted.
        """
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        path = resolve(config.model.source, sha256=config.model.sha256)
        task = Task(config.model.task)
        method = linear_method(config)
        dtype, device = getattr(torch, config.model.dtype), compute_device(config.run.device)
        backbone = load_backbone(path, task, dtype=dtype, quantization=config.model.quantization, device=device)
        images = ImageFormat.of(path, **vision_of(backbone, task)._asdict()) if config.data.image_column else None
        model = adapt(
            backbone,
            task=task,
            classes=len(config.data.labels),
            pooling=config.model.pooling,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            targets=config.lora.targets,
            last_layers=config.lora.last_layers,
            seed=config.run.seed,
            cores=Factor.CORE in method.factors,
            increments=Factor.INCREMENT in method.settles,
            vision_tower=config.lora.vision_tower,
        )
        tokenizer: Any = load_tokenizer(path) if images is None or task is Task.IMAGE_TEXT else None
        learner = Learner(
            model,
            pad_id=(tokenizer.pad_token_id or 0) if tokenizer else 0,
            batch_tokens=config.training.batch_tokens,
            last_layers=config.lora.last_layers,
            keep_features=config.training.head_rounds > 0,
            images=images,
            cache=Path(config.run.cache) if config.run.cache else None,
            threads=torch.get_num_threads() if device.type == "cpu" else 1,
        )
        bench = cls(config, model, learner, method, tokenizer, images)
        bench.start_head()
        return bench

    def start_head(self) -> None:
        """Set the head's weights to those that training starts from, with the adapter at its own start."""
        heads = self.model.parameters(frozenset((Factor.HEAD,)))
        self.model.load({name: torch.zeros_like(parameter) for name, parameter in heads.items()})
        if self.config.training.head_start == "labels":
            self.model.load({"head.weight": head_of_labels(self.model, self.tokenizer, self.config.data.labels)})

    def server(self, plan: PrivacyPlan) -> tuple[Server, ServerState]:
        """The server of a run by `plan`, and its state before the first round."""
        config = self.config
        server, state = Server.of(
            self.model,
            plan,
            self.method,
            server_optimizer(config),
            head_scale=head_scale(config),
            defence=defence(config),
            local=local_steps(config),
        )
        delays = Delays(config.federation.max_staleness, config.run.seed)
        return replace(server, delays=delays, ranks=participant_ranks(config), seed=config.run.seed), state

    @property
    def trainable_fraction(self) -> float:
        """Trained scalars over parameters of the base model."""
        trained = sum(p.numel() for p in self.model.parameters(self.method.factors).values())
        return trained / self.model.base_parameters

    def tokenize(self, table: Table) -> Examples:
        """Examples of a table, as the configuration describes its columns."""
        data, tokenizer, longest = self.config.data, self.tokenizer, self.config.model.max_tokens
        labels = None if data.label_column is None else table.column(data.label_column)
        if self.images is None or data.image_column is None:
            texts = table.column(data.text_column)
            if labels is None:
                return tokenize_causal(texts, tokenizer=tokenizer, max_tokens=longest)
            return tokenize_classification(texts, labels, label_names=data.labels, tokenizer=tokenizer, max_tokens=longest)
        images = self.images.read(table, data.image_column)
        if labels is not None:
            return labelled_images(images, labels, label_names=data.labels, image_format=self.images)
        texts = table.column(data.text_column)
        return tokenize_image_text(texts, images, tokenizer=tokenizer, max_tokens=longest, image_format=self.images)

    def training_table(self) -> Table:
        """The table that simulated participants share out."""
        return read_table(resolve(self.config.data.train, sha256=self.config.data.train_sha256))

    def clients(self, plan: PrivacyPlan, memory: ClientMemory | None = None) -> list[Client]:
        """The simulated participants; `memory` is where they keep state, if they do. Errors are those of `tables`."""
        names = participant_names(self.config)
        members = enumerate(zip(names, self.tables(), strict=True))
        return [self.client(plan, name, number, table, memory) for number, (name, table) in members]

    def tables(self) -> Iterator[Table]:
        """The training table, partitioned among participants.

        Raises:
            ConfigError: if the table yields another number of clients than declared.
        """
        federation, table = self.config.federation, self.training_table()
        if federation.partition == "column":
            keys = [" / ".join(key) for key in zip(*(table.column(c) for c in federation.columns), strict=True)]
            parts = by_column(keys)
            if len(parts) != federation.clients:
                raise ConfigError(
                    f"federation.clients: {federation.clients} declared, but columns {list(federation.columns)} of the training "
                    f"table have {len(parts)} distinct values"
                )
        elif federation.partition == "dirichlet":
            whole = self.tokenize(table)
            parts = dirichlet(whole.labels or (), federation.clients, federation.alpha, self.config.run.seed)
        else:
            parts = iid(len(table), federation.clients, self.config.run.seed)
        yield from (_rows(table, part) for part in parts)

    def client(self, plan: PrivacyPlan, name: str, number: int, table: Table, memory: ClientMemory | None = None) -> Client:
        """Participant `number`, from 0 on, with its own `table`."""
        examples, evaluation = self.tokenize(table), self.config.evaluation
        # Not all from 0: where units take turns by number, those of small participants would all have the same ones.
        examples = replace(examples, units=tuple(range(number, number + len(examples))))
        rest, held_out = examples, examples.subset(())
        if evaluation is not None:
            rest, held_out = examples.split(evaluation.holdout, self.config.run.seed)
        tier, ranks = participant_tiers(self.config)[number], participant_ranks(self.config)
        rank = ranks[number] if ranks else None
        return Client(name, rest, plan, self.method, local_steps(self.config), held_out, tier, rank, memory)

    def simulator(self, clients: Sequence[Client]) -> Simulator:
        """An engine of these clients in this process, as the configuration says."""
        return Simulator(
            clients,
            self.learner,
            stack_tokens=self.config.run.stack_tokens,
            dropout_rate=self.config.federation.dropout_rate or 0.0,
        )

    def prepare(self, plan: PrivacyPlan, *sets: Examples, on_progress: Callable[[float], None] = lambda _: None) -> bool:
        """Compute what never changes of examples, if one is expected to be used more than once; whether it was."""
        steps = self.config.training.local_steps or 1
        if plan.rounds * plan.divisor / self.config.population * steps <= 1:
            return False
        self.learner.prepare(*sets, on_progress=on_progress)
        return True

    def test_examples(self, source: str | None = None, *, limit: int | None = None) -> Examples | None:
        """Declared-public test examples, the first `limit` of an even spread; None where none are configured."""
        source = source or self.config.data.test
        if source is None:
            return None
        digest = self.config.data.test_sha256 if source == self.config.data.test else None
        examples = self.tokenize(read_table(resolve(source, sha256=digest)))
        if limit is None or limit >= len(examples):
            return examples
        return examples.subset(range(0, len(examples), -(-len(examples) // limit)))


@torch.no_grad()
def head_of_labels(model: AdaptedModel, tokenizer: Any, labels: Sequence[str]) -> Tensor:
    """Weights `(classes, h)` of a head that prefers the label whose name is most like the text, by the encoder's features.

    Names are read with their separators as spaces, features are centred over labels. Label names are public, so nothing is
    charged; a text's features and a name's are those of one encoder, as in zero-shot classification (Yin et al. 2019,
    arXiv 1909.00161, baseline of label similarity).
    """
    classifier = cast(Classifier, model.module)
    names = [re.sub(r"[\W_]+", " ", label).strip() or label for label in labels]
    batch = tokenizer(names, padding=True, return_tensors="pt").to(model.device)
    features = classifier.features(batch["input_ids"], batch["attention_mask"])
    return LABEL_WEIGHT * (features - features.mean(dim=0))


def data_id(clients: list[Client]) -> str:
    """SHA-256 over all clients' examples: a resumed run must see the data it started with.

    It is a function of private data and stays inside the state folder, hashed into the run id.
    """
    total = hashlib.sha256()
    for client in clients:
        for examples in (client.examples, client.held_out):
            total.update(repr((client.name, examples.tokens, examples.labels)).encode())
            for image in examples.images:
                total.update(image)
    return total.hexdigest()


def _rows(table: Table, indices: list[int]) -> Table:
    return Table({name: [values[i] for i in indices] for name, values in table.columns.items()}, table.path)
