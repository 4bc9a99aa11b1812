"""The configuration file: TOML to strict, frozen models, with errors that name the key, the reason and a fix."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import tomli_w
from pydantic import ValidationError, model_validator

from dp_federated_lora.errors import ConfigError
from dp_federated_lora.lab.sections import (
    MAX_DELTA,
    CompressionSection,
    CorrelatedSection,
    DataSection,
    EvaluationSection,
    FederationSection,
    LedgerSection,
    LoraSection,
    MethodSection,
    ModelSection,
    PrivacySection,
    RobustSection,
    RunSection,
    Section,
    SecureSumSection,
    TrainingSection,
)
from dp_federated_lora.lab.stateful import state_problems

MAX_EPSILON: Final = 10.0

LINEAR: Final = ("fedavg", "ffa", "rolora", "lalora", "fedask", "fedpower", "fedsb", "fedsa")

# Methods in which what a client sends means the same whatever round its adapter is of.
FIXED_COORDINATES: Final = ("fedavg", "ffa", "rolora", "lalora", "fedsb")

# Methods that combine whole adapters, and what for: the refusal under trust = "central" gives the reason.
GATHERED: Final = {
    "flora": "stacks the clients' adapters",
    "flexlora": "multiplies each client's factors before summing",
    "hetlora": "weights clients by norms of their private updates",
    "fedex": "needs each client's factors for its residual",
}


class Config(Section):
    """A whole configuration; every impossible combination is refused here, before any work."""

    model: ModelSection
    lora: LoraSection
    data: DataSection
    federation: FederationSection
    privacy: PrivacySection
    method: MethodSection = MethodSection()
    secure_sum: SecureSumSection | None = None
    compression: CompressionSection | None = None
    training: TrainingSection = TrainingSection()
    evaluation: EvaluationSection | None = None
    robust: RobustSection | None = None
    run: RunSection
    ledger: LedgerSection | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        problems = [*self._privacy_problems(), *self._task_problems(), *self._federation_problems(), *self._sending_problems()]
        problems += state_problems(self)
        problems += self._robust_problems(self.robust) if self.robust and not problems else []
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
        problems += self._gathered_problems(GATHERED[self.method.name]) if self.method.name in GATHERED else []
        if self.method.name not in (*LINEAR, *GATHERED):
            known = ", ".join((*LINEAR, *GATHERED))
            problems.append(f"method.name: unknown method {self.method.name!r}; use one of {known}")
        return problems

    def _gathered_problems(self, reason: str) -> list[str]:
        privacy, problems = self.privacy, []
        if privacy.trust != "local":
            problems.append(
                f"method.name: {self.method.name} {reason}, so its contribution is no sum, which central noise and secure "
                'aggregation protect alone; use trust = "local", where every participant noises its own, or "ffa" or "fedavg"'
            )
        if privacy.unit == "client" and privacy.sampling_rate < 1.0:
            problems.append(
                f"privacy.sampling_rate: {self.method.name} combines the adapters of all participants, and one whose coin says "
                "no has none; set it to 1.0"
            )
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
        changing = privacy.clip_quantile is not None or self.training.head_rounds or self.method.name in ("rolora", "fedpower")
        if changing or privacy.groups or privacy.trust != "central" or self.compression:
            problems.append(
                "privacy.correlated: cannot be combined with clip_quantile, groups, training.head_rounds, [compression], method "
                '"rolora" or "fedpower", or another trust than "central": noise cancels only between sums of one clip norm, the '
                "same for all, and one set of parameters"
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
        data, task, training, problems = self.data, self.model.task, self.training, []
        if task == "classification":
            if not data.label_column or len(data.labels) < 2:
                problems.append(
                    "data.label_column, data.labels: classification needs the label column and the public list of labels"
                )
        else:
            if data.label_column or data.labels:
                problems.append(f'data.label_column, data.labels: task = "{task}" has no labels; remove them')
            if training.server_head_learning_rate or training.head_rounds or training.head_start != "zero":
                problems.append(
                    f'training.server_head_learning_rate, head_rounds, head_start: task = "{task}" has no head; remove them'
                )
        if data.image_column and training.head_start == "labels":
            problems.append('training.head_start: "labels" compares texts with names, and data.image_column has none; remove it')
        if (task == "image-text" and not data.image_column) or (task == "causal-lm" and data.image_column):
            problems.append('data.image_column: task = "image-text" needs it and "causal-lm" has no place for it')
        if self.lora.vision_tower and (task != "image-text" or self.lora.last_layers is not None):
            problems.append(
                'lora.vision_tower: is for task = "image-text" without lora.last_layers, which are those of the language model'
            )
        if self.model.quantization and self.method.name == "fedsb":
            problems.append('model.quantization: "fedsb" takes its factors from the weights themselves; remove it or use "ffa"')
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
        kinds = private.groups or federation.ranks or self.evaluation
        if private.shuffler and (private.trust != "local" or private.unit != "client" or kinds):
            problems.append(
                'privacy.shuffler: hides a report among others that could be its own: with trust = "local" and unit = "client", '
                "all of one kind, so without privacy.groups, federation.ranks and [evaluation]; change those or remove it"
            )
        if federation.ranks and sum(group.clients for group in federation.ranks) != federation.clients:
            problems.append("federation.ranks: their clients must add up to federation.clients; every participant has one rank")
        if federation.ranks and max(group.rank for group in federation.ranks) != self.lora.rank:
            problems.append("federation.ranks: the largest must be lora.rank, the rank of the global adapter")
        if federation.ranks and self.robust and self.robust.clip_around_aggregate:
            problems.append(
                "federation.ranks: a participant sends nothing beyond its rank, which is no difference from the last aggregate; "
                "remove robust.clip_around_aggregate, or the ranks"
            )
        local = [training.local_steps, training.local_batch_size, training.local_learning_rate]
        if self.privacy.unit == "client" and None in local:
            problems.append('training.local_steps, local_batch_size, local_learning_rate: unit = "client" needs all three')
        plain = TrainingSection()
        changed = [key for key in TrainingSection.model_fields if getattr(training, key) != getattr(plain, key)]
        if self.privacy.unit == "example" and any(key.startswith("local_") for key in changed):
            problems.append('training.local_*: unit = "example" takes one noised step a round and no local steps; remove them')
        if training.server_optimizer not in ("sgd", "ftrl") and training.server_momentum:
            problems.append('training.server_momentum: belongs to server_optimizer = "sgd" or "ftrl"; remove it')
        if self.method.name == "lalora" and (training.local_steps or 1) < 2:
            problems.append(
                'method.name: "lalora" trains the factors in turn within a round: set training.local_steps >= 2, or "rolora"'
            )
        if self.method.name in ("fedask", "fedpower", *GATHERED) and (
            training.server_optimizer != "sgd" or training.server_momentum
        ):
            problems.append(
                f'method.name: "{self.method.name}" gives factors other coordinates after each round, so no memory of earlier '
                'steps fits; use server_optimizer = "sgd" without server_momentum'
            )
        problems += self._staleness_problems() if federation.max_staleness else []
        return problems + self._secure_sum_problems()

    def _sending_problems(self) -> list[str]:
        problems, power = [], self.method.name == "fedpower"
        if power and self.privacy.unit == "example":
            problems.append(
                'method.name: "fedpower" sends what local steps made of B A, and unit = "example" has none; of one gradient it '
                'would send what "rolora" does'
            )
        if power and (self.privacy.clip_quantile is not None or self.federation.ranks):
            problems.append(
                'method.name: "fedpower" clips the product before its norm could be counted, and turns its components; remove '
                "privacy.clip_quantile and federation.ranks"
            )
        apart = self.robust or self.federation.ranks or self.training.local_control
        if self.compression and (apart or self.method.name in GATHERED):
            problems.append(
                "compression: a sketch mixes coordinates, anew in each round, and only a sum can be decoded; remove [robust], "
                f"federation.ranks and training.local_control, and use one of {', '.join(LINEAR)}"
            )
        return problems

    def _secure_sum_problems(self) -> list[str]:
        privacy, federation, problems = self.privacy, self.federation, []
        if privacy.trust != "distributed":
            if self.secure_sum or federation.dropout_rate:
                problems.append('secure_sum, federation.dropout_rate: belong to privacy.trust = "distributed"; remove them')
            return problems
        if privacy.groups or federation.max_staleness:
            problems.append(
                'privacy.groups, federation.max_staleness: with trust = "distributed" all of a sum have one clip norm and one '
                "adapter to start from; remove them"
            )
        if self.run.stack_tokens:
            problems.append('run.stack_tokens: with trust = "distributed" each participant is computed alone; remove it')
        section, members = self.secure_sums, self.members_of_a_sum
        fewest = self.fewest_of_a_sum
        opening = (members + section.colluders) // 2 + 1
        if fewest < max(opening, section.colluders + 2):
            problems.append(
                f"secure_sum: of {members} participants in a sum {fewest} are certain, and {section.colluders} may collude: at "
                f"least {max(opening, section.colluders + 2)} must be: raise federation.clients, or lower dropouts, colluders "
                "or robust.groups"
            )
        return problems

    def _staleness_problems(self) -> list[str]:
        problems = []
        if self.federation.max_staleness >= self.privacy.rounds - 1:
            problems.append("federation.max_staleness: must be below privacy.rounds - 1, or some only ever see the first adapter")
        if self.method.name not in FIXED_COORDINATES:
            problems.append(
                "federation.max_staleness: what began earlier fits a later adapter only where coordinates mean the same in every "
                f'round, as they do not under "{self.method.name}"; use one of {", ".join(FIXED_COORDINATES)}'
            )
        if self.privacy.shuffler:
            problems.append(
                "federation.max_staleness: reports of different age weigh differently, and privacy.shuffler hides a report only "
                "among others of its kind; remove one of the two"
            )
        return problems

    def _robust_problems(self, section: RobustSection) -> list[str]:
        problems, clients, local = [], self.federation.clients, self.privacy.trust == "local"
        if section.rule is None:
            if not section.clip_around_aggregate:
                problems.append("robust: give a rule, clip_around_aggregate = true, or both; or remove the section")
            if section.byzantine or section.before or section.parameters or section.groups:
                problems.append("robust.byzantine, before, parameters, groups: belong to a rule; give one or remove them")
        else:
            if local == (section.groups is not None):
                problems.append(
                    'robust.groups: with trust = "central" a rule sees the noised sums of groups and needs their number, with '
                    '"local" it sees the reports of participants and has no groups'
                )
            if clients % (section.groups or 1):
                problems.append(f"robust.groups: must divide federation.clients = {clients}, so that groups have one size")
            if self.privacy.clip_quantile is not None:
                problems.append(
                    "privacy.clip_quantile: the count of bits would have the noise of each group, and liars would move the clip "
                    "norm; use a fixed one with robust.rule"
                )
        if not problems:
            from dp_federated_lora.lab.workbench import defence_problem  # noqa: PLC0415  (torch takes seconds to import)

            problems += defence_problem(self)
        return problems

    @property
    def secure_sums(self) -> SecureSumSection:
        """[secure_sum], or its defaults."""
        return self.secure_sum or SecureSumSection()

    @property
    def members_of_a_sum(self) -> int:
        """How many participants a secure sum has: those of a group, where a robust rule looks at groups."""
        return self.federation.clients // ((self.robust and self.robust.groups) or 1)

    @property
    def fewest_of_a_sum(self) -> int:
        """How many participants a secure sum has at least, whoever drops out."""
        return self.members_of_a_sum - int(self.secure_sums.dropouts * self.members_of_a_sum)

    @property
    def population(self) -> int:
        """Declared, public number of privacy units."""
        return self.privacy.population or self.federation.clients

    @property
    def content_id(self) -> str:
        """SHA-256 of everything but where the results go and where activations are kept."""
        facts = self.model_dump(mode="json", exclude_none=True)  # so that a key that a later version adds changes no id
        for key in ("out", "cache"):
            facts["run"].pop(key, None)
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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}; `dpfl init` writes one") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    return parse_config_text(text, where=str(path), overrides=overrides)


def parse_config_text(text: str, *, where: str, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, of a configuration as text; errors name `where`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, where=where)


def parse_config(raw: dict[str, Any], *, where: str) -> Config:
    """Check a configuration given as nested dictionaries.

    Raises:
        ConfigError: naming `where` and every key at fault.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where} cannot be used:{explained(error)}") from error


def explained(error: ValidationError) -> str:
    """Every key at fault and why, each on a line of its own after a line break."""
    return "".join(f"\n  {_explain(detail)}" for detail in error.errors())


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
