"""The one function a client runs, whatever engine carries its request and its reply."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, final

import torch
from torch import Tensor, nn

from dp_federated_lora.aggregation import LinearMethod, components
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import IncompatiblePlan
from dp_federated_lora.federated.local_round import adapter_of, load_own, local_change
from dp_federated_lora.federated.memory import ClientMemory
from dp_federated_lora.federated.staleness import staleness_weight
from dp_federated_lora.privacy import (
    BoundedSum,
    CorrelatedGaussian,
    Permit,
    PrivacyPlan,
    PrivacyUnit,
    Released,
    SecureRandom,
    Trust,
    UnitId,
)
from dp_federated_lora.training import Learner, LocalSteps, example_gradients, example_scores
from dp_federated_lora.vector import Layout

WHOLE: Final = (0, 1)
"""The share that is all of a client's examples."""


class Purpose(Enum):
    """What a client is asked for: a contribution to the adapter, or scores of it on held-out examples."""

    TRAINING = "training"
    EVALUATION = "evaluation"


@final
@dataclass(frozen=True, slots=True)
class Request:
    """What the server sends: the purpose, the round, the plan it follows, and the global adapter.

    Args:
        purpose: what to compute.
        round: 1-based.
        plan_id: `PrivacyPlan.content_id` of the server's plan.
        adapter: global adapter tensors by name.
        clip_norm: C of this round.
        staleness: server steps that have been taken since `adapter`.
        centre: public vector `(d,)` around which contributions are clipped; None for zero.
        control: c of SCAFFOLD by name, of what the round sends; empty without it.
    """

    purpose: Purpose
    round: int
    plan_id: str
    adapter: Mapping[str, Tensor]
    clip_norm: float
    staleness: int = 0
    centre: Tensor | None = None
    control: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """Factor in (0, 1] on the contribution and on its bound; the server's choice, never the client's."""
        return staleness_weight(self.staleness)


@final
@dataclass(frozen=True, slots=True)
class Client:
    """A participant: its name, its examples, and the plan, method and local steps it agreed to.

    Args:
        name: unique among participants.
        examples: private data.
        plan: the privacy plan that this client agreed to.
        method: which factors are trained.
        local: local steps (client unit); None for the example unit.
        held_out: private examples that are never trained on, for evaluation.
        tier: which of the plan's groups of budgets it belongs to.
        rank: how many components of each pair it gets, trains and sends, a public fact; None for all.
        memory: where it keeps state from round to round; needed by methods that do.

    Raises:
        IncompatiblePlan: if it would keep state and has no memory, or a plan under which `memory.py` claims nothing.
    """

    name: str
    examples: Examples
    plan: PrivacyPlan
    method: LinearMethod
    local: LocalSteps | None
    held_out: Examples
    tier: int = 0
    rank: int | None = None
    memory: ClientMemory | None = None

    def __post_init__(self) -> None:
        if not self.keeps_state:
            return
        if self.memory is None:
            raise IncompatiblePlan(f"{self.name} keeps state from round to round: give it a ClientMemory")
        if self.plan.unit is PrivacyUnit.EXAMPLE or isinstance(self.plan.mechanism, CorrelatedGaussian):
            raise IncompatiblePlan(
                f"{self.name} keeps state from round to round: that is accounted for with unit = client and independent noise"
            )

    @property
    def keeps_state(self) -> bool:
        """Whether it starts a round from what it kept of an earlier one."""
        return bool(self.method.kept) or (self.local is not None and self.local.control)

    def require_plan(self, request: Request) -> None:
        """Refuse a request that follows another plan.

        Raises:
            IncompatiblePlan: naming both.
        """
        if request.plan_id != self.plan.content_id:
            raise IncompatiblePlan(
                f"{self.name} agreed to plan {self.plan.content_id[:12]}, the request of round {request.round} follows "
                f"{request.plan_id[:12]}: refused, nothing was computed"
            )

    def local_in(self, number: int) -> LocalSteps:
        """Local steps of round `number` (unit = client).

        Raises:
            IncompatiblePlan: if the client has none.
        """
        if self.local is None:
            raise IncompatiblePlan("unit = client trains locally; [training] needs local steps")
        return self.local.in_round(number)

    def sample(self, request: Request, rng: SecureRandom) -> tuple[Examples, list[UnitId]]:
        """The examples whose secret coins say yes in this round, and their units (unit = example)."""
        chosen = self.plan.draw(self.examples.units, rng.derive("sample"), number=request.round, tier=self.tier).tolist()
        picked = self.examples.subset(chosen)
        return picked, [UnitId(f"{self.name}/{unit}") for unit in picked.units]

    def clip(self, request: Request, rows: Tensor, units: Sequence[UnitId]) -> BoundedSum:
        """The sum of what units contribute, rows `(B, d)`: sketched, and clipped around the request's centre."""
        centre = 0.0 if request.centre is None else request.centre.to(rows.device)
        encoded = self.method.sketch.encode(rows - centre, request.round)
        return self.plan.clip(encoded, request.clip_norm, units, tier=self.tier, weight=request.weight)

    def merged(self, request: Request, learner: Learner, sums: Iterator[BoundedSum]) -> BoundedSum:
        """One sum of `sums` of what units contribute to the round, zero of none."""
        size = Layout.of(learner.model.parameters(self.method.factors_in(request.round))).size
        size = self.method.sketch.size(size) + self.plan.extra_coordinates
        return BoundedSum.merge(sums, size=size, clip_norm=self.plan.sensitivity(request.clip_norm))

    def clip_factor(self, change: Tensor, clip_norm: float) -> float:
        """By how much the plan shortens this client's change `(d,)`, at most 1."""
        bound = clip_norm * (self.plan.tiers[self.tier].clip_share if self.plan.tiers else 1.0)
        return min(1.0, bound / max(float(torch.linalg.vector_norm(change, dtype=torch.float64)), bound))


def handle(
    request: Request, client: Client, learner: Learner, rng: SecureRandom, *, share: tuple[int, int] = WHOLE
) -> BoundedSum:
    """Compute a client's bounded contribution to a round, or to an evaluation.

    Client unit: local steps, then the whole update is clipped. Example unit: the client tosses a secret coin for
    each of its examples and sums their clipped gradients; an empty sample gives the zero sum, like any other. With a centre
    it is the difference from it that is clipped (Karimireddy et al. 2021, arXiv 2012.10333, in one step and at the client). Under
    other trust than "central" nobody else may learn whether a client takes part: in the client unit, too, its coin is its own.
    Of the components beyond its rank a client has zeros; they have no gradient, and its contribution is zero there.

    Args:
        request: from the server.
        client: the participant.
        learner: a model to compute with; its adapter is overwritten.
        rng: this client's stream for this round.
        share: (k, n) for the k-th of n shares of the sampled examples; what the n shares give merges to the whole. Nothing but
            gradients of examples (unit = example) is shared out.

    Raises:
        IncompatiblePlan: if the request follows another plan than the one agreed to.
        CheckpointError: if the client's state is missing or damaged.
    """
    client.require_plan(request)
    learner.model.load(adapter_of(request, client))
    if request.purpose is Purpose.EVALUATION:
        load_own(client, learner, before=request.round + 1)
        return _scores(client, learner)
    trained = learner.model.train_only(client.method.factors_in(request.round))
    parts = contributions(request, client, learner, trained, rng, share=share)
    return client.merged(request, learner, (client.clip(request, rows, units) for rows, units in parts))


def contributions(
    request: Request,
    client: Client,
    learner: Learner,
    trained: Mapping[str, nn.Parameter],
    rng: SecureRandom,
    *,
    share: tuple[int, int] = WHOLE,
) -> Iterator[tuple[Tensor, list[UnitId]]]:
    """What a client's units contribute to a round before sketch and clip: rows `(B, d)` with their units, for `handle`.

    Args:
        request: from the server.
        client: the participant.
        learner: the model at the request's adapter.
        trained: its parameters that the round trains; they define the layout.
        rng: this client's stream for this round.
        share: as `handle`.
    """
    plan = client.plan
    if plan.unit is PrivacyUnit.EXAMPLE:
        yield from example_gradients(learner, trained, *client.sample(request, rng), share=share)
        return
    local = client.local_in(request.round)
    if (
        plan.trust is not Trust.CENTRAL
        and not plan.draw(range(1), rng.derive("sample"), number=request.round, tier=client.tier).size
    ):
        return
    change = local_change(request, client, learner, local, batch_stream(rng))
    yield change[None], [UnitId(client.name)]


def batch_stream(rng: SecureRandom) -> torch.Generator:
    """What draws a client's local batches."""
    return torch.Generator().manual_seed(int(rng.derive("batches").uint64(1)[0] >> 1))


def report(request: Request, client: Client, learner: Learner, permit: Permit, rng: SecureRandom) -> Released:
    """What a client sends under trust = "local": its contribution with noise of the full size, its own, up to its rank.

    Args:
        request: from the server.
        client: the participant.
        learner: as `handle`.
        permit: proof that the release is charged.
        rng: this client's stream for this round; coins and noise come from it.

    Raises:
        IncompatiblePlan: as `handle`.
    """
    total = handle(request, client, learner, rng)
    evaluation = client.plan.evaluation if request.purpose is Purpose.EVALUATION else None
    if evaluation is not None:
        return evaluation.release(total, permit=permit, rng=rng)
    released = client.plan.release(total, {}, permit=permit, rng=rng)[0]
    if client.rank is None:
        return released
    sent = components(Layout.of(learner.model.parameters(client.method.factors_in(request.round))), client.rank)
    return replace(released, value=released.value * sent)


def _scores(client: Client, learner: Learner) -> BoundedSum:
    """Tally of the held-out examples; in the client unit, of their mean."""
    plan, examples = client.plan, client.held_out
    if plan.evaluation is None:
        raise IncompatiblePlan(f"{client.name} agreed to a plan without evaluation; nothing was scored")
    correct, losses = example_scores(learner, examples)
    units = [UnitId(f"{client.name}/{unit}") for unit in examples.units]
    if plan.unit is PrivacyUnit.CLIENT and units:
        correct, losses, units = correct.mean()[None], losses.mean()[None], [UnitId(client.name)]
    return plan.evaluation.tally(correct, losses, units)
