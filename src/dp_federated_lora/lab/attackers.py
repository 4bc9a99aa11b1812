"""Participants who lie, for experiments: what their attacks do to a run, with the defence that it has.

A liar knows what every honest participant sends and answers with an attack (`audit.byzantine`), or trains on poisoned examples.
What it sends goes through the plan's clip like everything else, under the units that are its own in that round: with
unit = "example" each of its sampled examples stands for an equal part of the lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, final

import torch
from torch import Tensor

from dp_federated_lora.audit import byzantine
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import AuditError
from dp_federated_lora.federated import (
    SYNCHRONOUS,
    Client,
    Exchange,
    Purpose,
    Request,
    Server,
    Sites,
    contributions,
    noise_of,
    report,
    rotation_of,
    share,
)
from dp_federated_lora.lab.config import Config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import BoundedSum, Ledger, Released, SecureRandom, UnitId
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.training import evaluate_model, example_scores
from dp_federated_lora.vector import Layout

Message = Callable[[Tensor, int, Layout], Tensor]
"""Honest contributions `(h, d)`, the number f of liars and the layout to what the liars send, `(f, d)`."""
Poison = Callable[[Examples, int], Examples]
"""A liar's examples and the number of labels to what it trains on."""

TRIGGER: Final = (5, 6, 5)
TARGET: Final = 0


def _gauge(honest: Tensor, f: int, layout: Layout) -> Tensor:
    """The mean adapter in other numbers, of which a method of fixed gauge sends one factor: a thousand times as large."""
    return layout.flatten(byzantine.gauge(layout.unflatten(honest.mean(0)), 1000.0)).expand(f, -1)


MESSAGES: Final[Mapping[str, Message]] = {
    "sign_flip": lambda honest, f, _: byzantine.sign_flip(honest, f),
    "inner_product": lambda honest, f, _: byzantine.inner_product(honest, f),
    "scaling": lambda honest, f, _: byzantine.scaling(honest, f, factor=-100.0),
    "alie": lambda honest, f, _: byzantine.alie(honest, f),
    "min_max": lambda honest, f, _: byzantine.min_max(honest, f),
    "min_sum": lambda honest, f, _: byzantine.min_sum(honest, f),
    "mimic": lambda honest, f, _: byzantine.mimic(honest, f),
    "free_rider": lambda honest, f, _: byzantine.free_rider(honest, f),
    "not_finite": lambda honest, f, _: byzantine.not_finite(honest, f),
    "gauge": _gauge,
}
POISONS: Final[Mapping[str, Poison]] = {
    "label_flip": byzantine.label_flip,
    "backdoor": lambda examples, _: byzantine.backdoor(examples, trigger=TRIGGER, target=TARGET),
}


@final
class Attackers:
    """Liars among the participants of a simulated run.

    Args:
        names: of the liars.
        attack: a name in `MESSAGES` or `POISONS`.

    Raises:
        AuditError: if there is no such attack.
    """

    def __init__(self, names: Sequence[str], attack: str) -> None:
        if attack not in {**MESSAGES, **POISONS}:
            raise AuditError(f"there is no attack called {attack!r}; choose from {', '.join((*MESSAGES, *POISONS))}")
        self._names, self._attack = names, attack

    def wrap(self, exchange: Exchange, server: Server) -> tuple[Exchange, Server]:
        """The same engine with liars in it: an `instrument` of `lab.run.Run`.

        Raises:
            AuditError: if a name is no participant's, all of them lie, or the engine is not a fresh `Simulator` without delays.
        """
        if not isinstance(exchange, Simulator):
            raise AuditError("liars know what everybody sends: they are played in the simulator, before anything else wraps it")
        if server.delays != SYNCHRONOUS:
            raise AuditError("liars answer to what others send in the same round: try attacks without federation.max_staleness")
        liars = [index for index, client in enumerate(exchange.clients) if client.name in self._names]
        if len(liars) != len(self._names) or not 0 < len(liars) < len(exchange.clients):
            raise AuditError(
                f"{list(self._names)} are not some of the participants {list(exchange.names)}, with others beside them"
            )
        if self._attack in MESSAGES:
            return _Lying(exchange, server, liars, MESSAGES[self._attack]), server
        clients, poison = list(exchange.clients), POISONS[self._attack]
        labels = 1 + max(label for client in clients for label in client.examples.labels or (0,))
        for index in liars:
            own = clients[index].examples
            clients[index] = replace(clients[index], examples=poison(own, labels))
            if clients[index].examples.tokens != own.tokens:
                exchange.learner.prepare(clients[index].examples)
        poisoned = Simulator(clients, exchange.learner, stack_tokens=exchange.stack_tokens, dropout_rate=exchange.dropout_rate)
        return poisoned, server


@final
class _Lying:
    """A simulator in which some participants answer with an attack; what they send is chosen once a round."""

    def __init__(self, inner: Simulator, server: Server, liars: Sequence[int], message: Message) -> None:
        self._inner, self._server, self._liars, self._message = inner, server, liars, message
        self._lies: tuple[int, dict[int, Tensor]] = (0, {})

    @property
    def names(self) -> Sequence[str]:
        """All participants."""
        return self._inner.names

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        """Replies of those asked; the scores of an evaluation are true."""
        liars = self._liars if request.purpose is Purpose.TRAINING else ()
        yield from self._inner(request, [index for index in clients if index not in liars], rng)
        for index in clients:
            if index in liars:
                yield self._lie(request, index, rng.derive)

    def reports(self, request: Request, sites: Sites, *, size: int) -> Iterator[Released]:
        """Noised replies: a liar's noise is as it should be, so that its report looks like the others."""
        for index, client in enumerate(self._inner.clients):
            permit, rng = sites[client.name]
            if request.purpose is Purpose.TRAINING and index in self._liars:
                lie = self._lie(request, index, lambda name: sites[name][1])
                yield client.plan.release(lie, {}, permit=permit, rng=rng)[0]
            else:
                yield report(request, client, self._inner.learner, permit, rng)

    def opened(self, request: Request, sites: Sites, members: Sequence[str], *, size: int) -> Tensor:
        """A secure sum into which liars put their lie, clipped and with the noise that they should add."""
        clients = {client.name: (index, client) for index, client in enumerate(self._inner.clients)}

        def contributions(_: bytes, names: Sequence[str]) -> Iterator[Tensor]:
            for name in names:
                (index, client), (permit, rng) = clients[name], sites[name]
                if request.purpose is Purpose.TRAINING and index in self._liars:
                    lie = self._lie(request, index, lambda name: sites[name][1])
                    noise, charged = noise_of(client.plan, request.purpose)
                    yield noise.release(lie, charged=charged, permit=permit, rng=rng, rotation=rotation_of(request))
                else:
                    yield share(request, client, self._inner.learner, permit=permit, rng=rng)

        streams = {name: sites[name][1] for name in members}
        return self._inner.secure_sums.open(request, self._server.plan, streams, contributions, size=size)

    def _lie(self, request: Request, index: int, stream: Callable[[str], SecureRandom]) -> BoundedSum:
        client = self._inner.clients[index]
        if self._lies[0] != request.round:
            rest = [each for number, each in enumerate(self._inner.clients) if number not in self._liars]
            honest = torch.stack([self._honest(request, each, stream(each.name)) for each in rest])
            sent = self._message(honest, len(self._liars), self._server.layout_in(request.round))
            self._lies = (request.round, dict(zip(self._liars, sent, strict=True)))
        units = [unit for _, some in self._rows(request, client, stream(client.name)) for unit in some]
        row = self._lies[1][index] / max(len(units), 1) - self._centre(request)
        rows = client.method.sketch.encode(row.expand(len(units), -1), request.round)
        return client.plan.clip(rows, request.clip_norm, units, tier=client.tier)

    def _honest(self, request: Request, client: Client, rng: SecureRandom) -> Tensor:
        """What a client's contribution means to the server, `(d,)`: the centre and the clipped difference of each unit."""
        centre = self._centre(request)
        total = torch.zeros_like(centre)
        for rows, _ in self._rows(request, client, rng):
            away = rows.to("cpu", torch.float64) - centre
            lengths = torch.linalg.vector_norm(away, dim=1, keepdim=True)
            total += (centre + away * (request.clip_norm / lengths).clamp(max=1.0)).sum(0)
        return total

    def _rows(self, request: Request, client: Client, rng: SecureRandom) -> Iterator[tuple[Tensor, list[UnitId]]]:
        model = self._inner.learner.model
        model.load(request.adapter)
        trained = model.train_only(client.method.factors_in(request.round))
        return contributions(request, client, self._inner.learner, trained, rng)

    def _centre(self, request: Request) -> Tensor:
        size = self._server.layout_in(request.round).size
        return torch.zeros(size, dtype=torch.float64) if request.centre is None else request.centre


def scores_under_attack(
    config: Config, *, attack: str | None, liars: int, bench: Workbench | None = None, limit: int = 300
) -> dict[str, float]:
    """Train with the first `liars` participants lying; scores on the public test data.

    The rounds are those of a run, charged to a ledger that is thrown away: nothing is saved and nothing can be resumed.

    Args:
        config: of the run; it needs public test data.
        attack: a name in `MESSAGES` or `POISONS`; None for a run in which nobody lies.
        liars: how many participants lie.
        bench: a model whose examples are prepared, to share between runs that differ in privacy, defence or training alone; it is
            left as it was.
        limit: examples that the backdoor is tried on.

    Returns:
        Scores; with a backdoor, `backdoor` is the share of examples with the trigger that get its label.

    Raises:
        AuditError: if there is no such attack, or no test data.
    """
    plan = privacy_plan(config)
    bench = replace(bench, config=config) if bench else prepared_bench(config)
    test, clients = bench.test_examples(), bench.clients(plan)
    if test is None:
        raise AuditError("what an attack does shows in scores: configure public data.test")
    untrained = bench.model.state()
    server, state = bench.server(plan)
    exchange: Exchange = bench.simulator(clients)
    if attack is not None:
        exchange, server = Attackers(exchange.names[:liars], attack).wrap(exchange, server)
    with TemporaryDirectory() as folder:
        ledger = Ledger.open(Path(folder) / "ledger.sqlite", budget=plan.budget, owner="an experiment")
        for number in range(1, plan.rounds + 1):
            seed = config.run.insecure_seed
            key = SecureRandom.from_os() if seed is None else SecureRandom.insecure_from(seed).derive("round", number)
            permit = server.reserve(state, ledger, key)
            state, _ = server.run_round(state, permit, exchange, key)
            ledger.commit(permit.serial)
    bench.model.load(state.adapter)
    scores = evaluate_model(bench.learner, test)
    if attack == "backdoor":
        others = [index for index, label in enumerate(test.labels or ()) if label != TARGET][:limit]
        marked = byzantine.backdoor(test.subset(others), trigger=TRIGGER, target=TARGET)
        scores["backdoor"] = float(example_scores(bench.learner, marked)[0].mean())
    bench.model.load(untrained)
    return scores


def prepared_bench(config: Config) -> Workbench:
    """A model with the examples of a configuration, for several calls of `scores_under_attack`."""
    bench = Workbench.of(config)
    sets = [client.examples for client in bench.clients(privacy_plan(config))]
    for examples in (*sets, bench.test_examples()):
        if examples is not None:
            bench.learner.prepare(examples)
    return bench
