"""One round, step by step; ARCHITECTURE in docs/architecture.md has the same numbering."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, final

import torch
from torch import Tensor

from dp_federated_lora.aggregation import (
    CONTROL,
    HEAD_ALONE,
    LENGTH,
    Gather,
    LinearMethod,
    ServerOptimizer,
    components,
    truncated,
)
from dp_federated_lora.aggregation.robust import LONGEST
from dp_federated_lora.errors import BudgetExhausted, IncompatiblePlan, PrivacyError
from dp_federated_lora.federated.checkpoint import ServerState
from dp_federated_lora.federated.client import Purpose, Request
from dp_federated_lora.federated.defence import UNDEFENDED, Defence, total
from dp_federated_lora.federated.secure import noise_of, rotation_of
from dp_federated_lora.federated.staleness import SYNCHRONOUS, Delays
from dp_federated_lora.lora import AdaptedModel, Factor
from dp_federated_lora.privacy import (
    BoundedSum,
    Ledger,
    Permit,
    PrivacyPlan,
    PrivacyUnit,
    PrivateEvaluation,
    Released,
    SecureRandom,
    Trust,
)
from dp_federated_lora.secagg import SharedNoise
from dp_federated_lora.training import LocalSteps
from dp_federated_lora.vector import Layout

Requests = Sequence[tuple[Request, Sequence[int]]]
"""Who is sent what: a request and the positions of its clients, everybody in one of them."""


Sites = Mapping[str, tuple[Permit, SecureRandom]]
"""Clients that add noise themselves, by name: a permit of each for its release, and the stream of its noise."""


class Exchange(Protocol):
    """Carries a request to clients and their bounded replies back: the only seam between engines."""

    @property
    def names(self) -> Sequence[str]:
        """All participants, in a fixed order."""

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Replies of the clients at these positions; a client that drops out is left out."""

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        """Replies `(size,)` of the clients named in `sites`, in order, with noise of their own for that permit from that stream.

        A client that drops out is left out, or has a reply of NaN, which counts as nothing.

        Raises:
            SecureSumAborted: if nobody replied, where clients can drop out.
        """

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        """The secure sum of some `members`, of `size` coordinates each, with a share of noise from each: integers `(d,)`.

        Raises:
            SecureSumAborted: if it cannot be opened; then nothing was.
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """Public facts and released values of one round; nothing else may leave it.

    No duration, no cohort size and no loss: each would tell something about the private sample.

    Args:
        round: 1-based.
        rounds: planned number.
        epsilon: spent so far.
        delta: at which epsilon holds.
        update_norm: L2 norm of the released mean update.
        noise_norm: expected L2 norm of the noise in it, a public number; with a robust rule, of the plain mean over groups.
        clip_norm: bound of one unit's contribution; it follows from public facts and released values.
        bytes_per_client: adapter bytes to a client and back, for the largest rank.
        public_metrics: quality on declared-public test data; empty in most rounds.
        private_metrics: noised quality on participants' held-out data, charged; empty in most rounds.
    """

    round: int
    rounds: int
    epsilon: float
    delta: float
    update_norm: float
    noise_norm: float
    clip_norm: float
    bytes_per_client: int
    public_metrics: Mapping[str, float]
    private_metrics: Mapping[str, float]

    def with_metrics(self, metrics: Mapping[str, float]) -> RoundReport:
        """The same report with public metrics."""
        return replace(self, public_metrics=dict(metrics))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What stays the same from round to round.

    Args:
        plan: the privacy plan.
        method: which factors are trained.
        optimizer: how the released mean becomes a step.
        layout: layout of all tensors that the method trains; `Factor.of` tells their kinds by name.
        head_scale: factor on the head's steps.
        settled: number of scalars that the server changes and nobody sends.
        delays: how many server steps participants take to answer.
        ranks: of all participants, in order; empty where all have the adapter's.
        seed: public randomness of a method that draws factors anew.
        defence: against participants who lie.
        local: the clients' local steps; None for the example unit.
    """

    plan: PrivacyPlan
    method: LinearMethod
    optimizer: ServerOptimizer
    layout: Layout
    head_scale: float = 1.0
    settled: int = 0
    delays: Delays = SYNCHRONOUS
    ranks: tuple[int, ...] = ()
    seed: int = 0
    defence: Defence = UNDEFENDED
    local: LocalSteps | None = None

    @classmethod
    def of(
        cls,
        model: AdaptedModel,
        plan: PrivacyPlan,
        method: LinearMethod,
        optimizer: ServerOptimizer,
        *,
        head_scale: float = 1.0,
        defence: Defence = UNDEFENDED,
        local: LocalSteps | None = None,
    ) -> tuple[Server, ServerState]:
        """A server for `model`, and its state before the first round; the head's steps are `head_scale` times as long."""
        layout = Layout.of(model.parameters(method.factors))
        settled = sum(p.numel() for n, p in model.parameters(method.settles).items() if n not in layout)
        server = cls(
            plan=plan,
            method=method,
            optimizer=optimizer,
            layout=layout,
            head_scale=head_scale,
            settled=settled,
            defence=defence,
            local=local,
        )
        noise = plan.start_noise(layout.size * defence.groups)
        last = torch.zeros(layout.size, dtype=torch.float64) if defence.active else None
        return server, ServerState(0, model.state(), optimizer.init(layout.size), plan.clip_norm, noise, aggregate=last)

    def layout_in(self, number: int) -> Layout:
        """Layout of what clients send in round `number`."""
        factors = self.method.factors_in(number)
        return Layout(tuple(entry for entry in self.layout.entries if Factor.of(entry[0]) in factors))

    def positions_in(self, number: int) -> Tensor:
        """Where the coordinates that are sent in round `number` lie among all, `(d,)`."""
        sent, everywhere = self.layout_in(number), torch.arange(self.layout.size)
        return torch.cat([everywhere[part] for name, _, part in self.layout.slices() if name in sent])

    def noise_norm(self, number: int, clip_norm: float) -> float:
        """Expected L2 norm of the noise in the released mean of round `number`; public."""
        layout = self.layout_in(number)
        size: float = layout.size
        # Where participants add noise they send it, too, for their own components only; one noise on the sum is on all.
        if self.ranks and self.plan.trust is Trust.LOCAL:
            size = sum(int(components(layout, rank).sum()) for rank in self.ranks) / len(self.ranks)
        return self.defence.price * self.plan.noise_norm(size, clip_norm, number=number)

    def bytes_per_client(self, number: int) -> int:
        """Bytes to a client of the largest rank, float32 of what such a round changes, and back, of what is sent."""
        sent = down = self.layout_in(number).size
        if self.method.factors_in(number) != HEAD_ALONE:
            down = (sent if self.method.settle is None else self.layout.size) + self.settled
        controlled = self.local is not None and self.local.control
        beside = sent * (self.defence.around_aggregate + controlled)
        up = self.method.sketch.size(sent)
        noise = self.plan.mechanism
        return 4 * (down + beside) + (noise.bytes_of(up) if isinstance(noise, SharedNoise) else 4 * up)

    def reserve(self, state: ServerState, ledger: Ledger, key: SecureRandom) -> Permit:
        """Charge the next round, durably, before any message is sent.

        Raises:
            BudgetExhausted: if it does not fit the budget, or a group's.
        """
        if self.plan.tiers and ledger.spent().charges >= self.plan.rounds and key.commitment not in ledger.commitments:
            raise BudgetExhausted(
                f"every group's budget is planned for {self.plan.rounds} charges and all are made: nothing was released; the run "
                "ends here"
            )
        number, purpose = state.round + 1, Purpose.TRAINING.value
        return ledger.reserve(self.plan.event_in(number), round=number, purpose=purpose, commitment=key.commitment)

    def run_round(self, state: ServerState, permit: Permit, exchange: Exchange, key: SecureRandom) -> tuple[ServerState, float]:
        """Collect, release, aggregate, step.

        Returns:
            The next state and the L2 norm of the released mean update.
        """
        plan, defence, number, clip_norm = self.plan, self.defence, state.round + 1, state.clip_norm
        layout, sent = self.layout_in(number), self.positions_in(number)
        last = torch.zeros(layout.size, dtype=torch.float64) if state.aggregate is None else state.aggregate[sent]
        centre = last if defence.around_aggregate else None
        control = layout.unflatten(state.optimizer[CONTROL][sent]) if CONTROL in state.optimizer else {}
        requests = [
            (
                Request(Purpose.TRAINING, number, plan.content_id, state.adapter_before(age), clip_norm, age, centre, control),
                clients,
            )
            for age, clients in enumerate(self.delays.groups(exchange.names, state.round))
        ]
        sketch, noise = self.method.sketch, state.noise
        size = sketch.size(layout.size) + plan.extra_coordinates
        gather = self.method.gather
        if gather is not None and self.method.factors_in(number) != HEAD_ALONE:
            return self._gathered(gather, state, self._reported(requests, permit, exchange, key, size=size), layout)
        parts: Iterable[Released]
        if plan.trust is Trust.LOCAL:
            parts = self._reported(requests, permit, exchange, key, size=size)
        elif plan.trust is Trust.DISTRIBUTED:
            (request, _), *_ = requests
            bound = plan.sensitivity(clip_norm)
            parts = self._opened(request, permit, exchange, key, size=size, bound=bound, defence=defence)
        else:
            sums = self._collected(requests, exchange, key, size=size, bound=plan.sensitivity(clip_norm), defence=defence)
            released, noise = plan.release(sums, noise, permit=permit, rng=key)
            parts = [replace(released, value=part) for part in released.value.reshape(defence.groups, size)]
        last = torch.nn.functional.pad(sketch.encode(last[None], number)[0], (0, plan.extra_coordinates))
        found = defence.aggregate(parts, plan=plan, method=self.method, last=last, rng=key)
        mean, extra = torch.tensor_split(found, [sketch.size(layout.size)])
        mean = sketch.decode(mean, layout.size, number)
        adapter, optimizer = self._step(state, mean, layout)
        following = ServerState(
            number,
            adapter,
            optimizer,
            plan.clip_norm_after(clip_norm, extra),
            noise=noise,
            earlier=self.delays.remember(state.adapter, state.earlier, (name for name, _ in self.layout.entries)),
            aggregate=None if state.aggregate is None else state.aggregate.index_copy(0, sent, mean),
        )
        return following, float(torch.linalg.vector_norm(mean))

    def _gathered(
        self, gather: Gather, state: ServerState, reports: Iterator[Released], layout: Layout
    ) -> tuple[ServerState, float]:
        """As `run_round`, of the participants' noised changes `(d,)` one by one.

        A participant's adapter is the global one up to its rank, after a step by its own change: scaled so that the mean of all
        changes is the one that their sum would have given.
        """
        number, plan = state.round + 1, self.plan
        if plan.trust is not Trust.LOCAL:
            raise IncompatiblePlan(
                f"{self.method.name} combines the adapters of single participants, which noise on their sum does not protect: it "
                'needs a plan with trust = "local"'
            )
        adapters, changes = [], torch.zeros(layout.size, dtype=torch.float64)
        for position, report in enumerate(reports):
            change = report.value if bool(report.value.isfinite().all()) else torch.zeros_like(report.value)
            start = replace(state, adapter=truncated(state.adapter, self.ranks[position])) if self.ranks else state
            adapters.append(self._step(start, change * (plan.sites / plan.divisor), layout)[0])
            changes += change
        if len(adapters) != plan.sites:
            raise PrivacyError(f"{len(adapters)} reports of {plan.sites}: {self.method.name} combines those of all participants")
        adapter = gather(state.adapter, adapters, self.seed + number)
        return replace(state, round=number, adapter=adapter), float(torch.linalg.vector_norm(changes / plan.divisor))

    def _step(self, state: ServerState, mean: Tensor, layout: Layout) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """The next adapter and optimiser state, given the released mean of the tensors of `layout`."""
        sent = self.positions_in(state.round + 1)
        before = {name: tensor[sent] for name, tensor in state.optimizer.items()}
        if self.local is not None:
            before[LENGTH] = torch.full_like(mean, self.local.in_round(state.round + 1).length)
        step, part = self.optimizer.update(mean, before)
        optimizer = {name: tensor.index_copy(0, sent, part[name]) for name, tensor in state.optimizer.items()}
        adapter = dict(state.adapter)
        for name, change in layout.unflatten(step).items():
            scale = self.head_scale if Factor.of(name) is Factor.HEAD else 1.0
            adapter[name] = (adapter[name].to(torch.float64) + scale * change).to(torch.float32)
        factors = self.method.factors_in(state.round + 1)
        settle = self.method.settle if factors != HEAD_ALONE else None
        return adapter if settle is None else settle(adapter, factors), optimizer

    def evaluate(
        self, state: ServerState, evaluation: PrivateEvaluation, permit: Permit, exchange: Exchange, key: SecureRandom
    ) -> dict[str, float]:
        """Noised scores of the adapter on participants' held-out data."""
        request = Request(Purpose.EVALUATION, state.round, self.plan.content_id, state.adapter, state.clip_norm)
        everybody = [(request, range(len(exchange.names)))]
        if self.plan.trust is Trust.LOCAL:
            return evaluation.metrics(
                total(self._reported(everybody, permit, exchange, key, size=evaluation.SIZE), evaluation.SIZE)
            )
        if self.plan.trust is Trust.DISTRIBUTED:
            sums = self._opened(request, permit, exchange, key, size=evaluation.SIZE, bound=evaluation.BOUND, defence=UNDEFENDED)
            return evaluation.metrics(total(sums, evaluation.SIZE))
        scores = self._collected(everybody, exchange, key, size=evaluation.SIZE, bound=evaluation.BOUND, defence=UNDEFENDED)
        released = evaluation.release(scores, permit=permit, rng=key)
        return evaluation.metrics(released.value)

    def _collected(
        self, requests: Requests, exchange: Exchange, key: SecureRandom, *, size: int, bound: float, defence: Defence
    ) -> BoundedSum:
        """Sums `(size,)` over the cohort's members in each of g groups side by side, `(g size,)`, without noise."""
        cohort: Sequence[int] = range(len(exchange.names))  # each client samples, or holds out, its own examples
        first, _ = requests[0]
        if first.purpose is Purpose.TRAINING and self.plan.unit is PrivacyUnit.CLIENT:
            cohort = self.plan.draw(cohort, key.derive("cohort"), number=first.round).tolist()
        stream, sums = key.derive("clients"), []
        for members in defence.deal(cohort, len(exchange.names), key.derive("groups")):
            asked = [(request, [client for client in clients if client in members]) for request, clients in requests]
            replies = (exchange(request, clients, stream) for request, clients in asked)
            sums.append(BoundedSum.merge(chain.from_iterable(replies), size=size, clip_norm=bound))
        return BoundedSum.in_blocks(sums, size=size, clip_norm=bound)

    def _reported(
        self, requests: Requests, permit: Permit, exchange: Exchange, key: SecureRandom, *, size: int
    ) -> Iterator[Released]:
        """What all participants send with noise of their own (trust = "local"), each `(size,)`, request by request."""
        names, sites = exchange.names, self._sites(permit, exchange, key)
        replies = (
            exchange.reports(request, {names[i]: sites[names[i]] for i in clients}, size=size) for request, clients in requests
        )
        for reply in chain.from_iterable(replies):
            if reply.value.shape != (size,):
                raise PrivacyError(f"a report of shape {tuple(reply.value.shape)} cannot enter a sum of {size} coordinates")
            # One that nobody's clipped and noised numbers could be would make an adapter that no client can compute with.
            honest = float(torch.linalg.vector_norm(reply.value)) < LONGEST
            yield reply if honest else replace(reply, value=torch.full_like(reply.value, math.nan))

    def _opened(
        self,
        request: Request,
        permit: Permit,
        exchange: Exchange,
        key: SecureRandom,
        *,
        size: int,
        bound: float,
        defence: Defence,
    ) -> Iterator[Released]:
        """Secure sums `(size,)` over each of g groups (trust = "distributed"), noise included."""
        names, sites = exchange.names, self._sites(permit, exchange, key)
        noise, _ = noise_of(self.plan, request.purpose)
        for members in defence.deal(range(len(names)), len(names), key.derive("groups")):
            integers = exchange.opened(request, sites, [names[i] for i in sorted(members)], size=size)
            rotation = rotation_of(request)
            yield noise.opened(integers, size=size, clip_norm=bound, rotation=rotation, insecure=key.insecure)

    def _sites(self, permit: Permit, exchange: Exchange, key: SecureRandom) -> Sites:
        """What each participant adds noise with, where all do."""
        if len(exchange.names) != self.plan.sites:
            raise PrivacyError(f"{len(exchange.names)} participants, but the plan says {self.plan.sites}; nothing was sent")
        return permit.divide(key, exchange.names)

    def report(
        self, state: ServerState, ledger: Ledger, *, update_norm: float, clip_norm: float, scores: Mapping[str, float]
    ) -> RoundReport:
        """Public facts of the round that led to `state`, with what was released and the clip norm that it used."""
        spend = ledger.spent()
        return RoundReport(
            round=state.round,
            rounds=self.plan.rounds,
            epsilon=spend.epsilon,
            delta=spend.delta,
            update_norm=update_norm,
            noise_norm=self.noise_norm(state.round, clip_norm),
            clip_norm=clip_norm,
            bytes_per_client=self.bytes_per_client(state.round),
            public_metrics={},
            private_metrics=scores,
        )
