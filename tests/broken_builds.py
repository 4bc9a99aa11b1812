"""Builds that are wrong in one place, made by patching the kernel, and a small engine to attack them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.audit import CanaryAudit, Difference, Transcript, Verdict, compare, judge
from dp_federated_lora.federated import Exchange, Request, Server, ServerState
from dp_federated_lora.privacy import (
    BoundedSum,
    DpEvent,
    GaussianMechanism,
    Ledger,
    Permit,
    PoissonSampler,
    PrivacyPlan,
    Released,
    SecureRandom,
    UnitId,
    clipping,
)
from dp_federated_lora.secagg import SharedNoise
from dp_federated_lora.vector import Layout
from plans import a_plan

D = 10_000
LAYOUT = Layout((("lora_B", (D // 2,)), ("head", (D // 2,))))
Wrap = Callable[[Exchange, Server], tuple[Exchange, Server]]

EVERYONE = a_plan(sampler=PoissonSampler(1.0), mechanism=GaussianMechanism(1.0), rounds=1)
SAMPLED = a_plan(sampler=PoissonSampler(0.25), mechanism=GaussianMechanism(2.0), rounds=16)


@dataclass(frozen=True, slots=True)
class Build:
    """A plan, what is wrong with its execution, and how that is made."""

    plan: PrivacyPlan
    wrong: str
    broken: Callable[[], AbstractContextManager[object]]


class Sites:
    """An exchange whose clients always send the same vectors."""

    def __init__(self, plan: PrivacyPlan, updates: Sequence[Tensor]) -> None:
        self.plan, self.updates = plan, updates
        self.names = [f"site{i}" for i in range(len(updates))]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        for index in clients:
            yield self.plan.clip(self.updates[index][None], request.clip_norm, [UnitId(self.names[index])])


def updates(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(D, generator=generator) for _ in range(count)]


def run(plan: PrivacyPlan, sites: Sites, wrap: Wrap, ledger_path: Path, seed: int) -> tuple[float, Transcript]:
    """All rounds of a plan; returns the epsilon charged and the reports."""
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=LAYOUT)
    exchange, server = wrap(sites, server)
    state = ServerState(0, {name: torch.zeros(shape) for name, shape in LAYOUT.entries}, server.optimizer.init(D), plan.clip_norm)
    ledger, notes = Ledger.open(ledger_path, budget=plan.budget, owner="audit"), Transcript()
    for number in range(1, plan.rounds + 1):
        key = SecureRandom.insecure_from(seed).derive("round", number)
        permit = server.reserve(state, ledger, key)
        clip_norm = state.clip_norm
        state, norm = server.run_round(state, permit, exchange, key)
        ledger.commit(permit.serial)
        notes.reports.append(server.report(state, ledger, update_norm=norm, clip_norm=clip_norm, scores={}))
    return ledger.spent().epsilon, notes


def with_canaries(plan: PrivacyPlan, ledger_path: Path, *, seed: int) -> Verdict:
    """What 2,000 canaries among five sites show at 95 %."""
    audit = CanaryAudit(2000, SecureRandom.insecure_from(seed).derive("audit"))
    epsilon, _ = run(plan, Sites(plan, updates(5)), audit.wrap, ledger_path, seed)
    return judge(audit, plan, claimed=epsilon, confidence=0.95)


def with_neighbours(plan: PrivacyPlan, folder: Path, last: Tensor, *, seed: int = 1) -> Difference:
    """Five sites against the same five and a last one."""
    transcripts: list[Transcript] = []
    for count in (5, 6):
        transcript = Transcript(replay=transcripts[0] if transcripts else None)
        sites = Sites(plan, [*updates(5), last][:count])
        ledger_path = folder / f"{len(list(folder.iterdir()))}.sqlite"
        _, notes = run(plan, sites, transcript.wrap, ledger_path, seed)
        transcript.reports += notes.reports
        transcripts.append(transcript)
    return compare(*transcripts, plan)


def ordinary() -> Tensor:
    return updates(6)[5]


def hostile() -> Tensor:
    """What a NaN that passes a clip would hide."""
    return torch.cat([torch.tensor([1e9, float("nan")]), torch.zeros(D - 2)])


@dataclass(frozen=True, slots=True)
class Found:
    """What all audits say about a build."""

    verdict: Verdict
    influence: float
    hostile_influence: float
    caught_by: tuple[str, ...]


def audits(build: Build, folder: Path, *, seed: int = 1) -> Found:
    """Attack a build: canaries at 95 %, and replays without one unit of either kind."""
    with build.broken():
        verdict = with_canaries(build.plan, folder / "canaries.sqlite", seed=seed)
        replay = with_neighbours(build.plan, folder, ordinary(), seed=seed)
        attack = with_neighbours(build.plan, folder, hostile(), seed=seed)
    named = {"canaries": verdict, "replay": replay, "replay, hostile unit": attack}
    caught = tuple(name for name, result in named.items() if not result.passed)
    return Found(verdict, replay.influence, attack.influence, caught)


# --- the builds -----------------------------------------------------------------------------------

_gaussian = SecureRandom.rounded_gaussian
_lattice = clipping._to_lattice
_release = GaussianMechanism.release


def noise_times(factor: float) -> AbstractContextManager[object]:
    def less(self: SecureRandom, sigma: float, n: int) -> object:
        return _gaussian(self, factor * sigma, n) if factor else np.zeros(n, dtype=np.int64)

    return patch.object(SecureRandom, "rounded_gaussian", less)


def _clip_by(to_lattice: Callable[[Tensor, float, float], Tensor]) -> AbstractContextManager[object]:
    return patch.object(clipping, "_to_lattice", to_lattice)


def _unclipped(row: Tensor, clip_norm: float, share: float) -> Tensor:
    return (row.double() / clipping.resolution(clip_norm)).trunc()


def _clip_each_factor(row: Tensor, clip_norm: float, share: float) -> Tensor:
    return torch.cat([_lattice(part, clip_norm) for part in row.chunk(2)])


def _nan_is_short(row: Tensor, clip_norm: float, share: float) -> Tensor:
    norm = torch.linalg.vector_norm(row, dtype=torch.float64)
    scale = torch.where(norm > clip_norm, clip_norm / norm, 1.0) / clipping.resolution(clip_norm)
    return (row.double().nan_to_num(nan=0.0) * scale).trunc()


def _divide_by_replies() -> AbstractContextManager[object]:
    def released(self: GaussianMechanism, total: BoundedSum, **paid: object) -> object:
        value = _release(self, total, **paid)  # type: ignore[arg-type]
        return replace(value, value=value.value * EVERYONE.divisor / max(len(total._units), 1))

    return patch.object(GaussianMechanism, "release", released)


def _through_shares(*, sized_for: int, staying: int) -> AbstractContextManager[object]:
    """The noise of a release comes in shares, under a secure sum in which so many participants stay."""
    noise = SharedNoise(
        noise_multiplier=EVERYONE.mechanism.noise_multiplier,
        bits=32,
        max_cohort=16,
        min_cohort=sized_for,
        colluders=0,
        units=4000,
    )

    def released(self: GaussianMechanism, total: BoundedSum, *, charged: DpEvent, permit: Permit, rng: SecureRandom) -> Released:
        permit.burn(charged, rng.commitment, total._units)
        vector = total._value.to(torch.float64) * clipping.resolution(1.0)  # all units are the first participant's
        shares = (noise.shared(vector * (number == 0), rng.derive("participant", number), bytes(32)) for number in range(staying))
        summed = torch.stack([*shares]).sum(dim=0)
        return noise.opened(summed, size=len(vector), clip_norm=total.clip_norm, rotation=bytes(32), insecure=rng.insecure)

    return patch.object(GaussianMechanism, "release", released)


def _always_available() -> AbstractContextManager[object]:
    return patch.object(PoissonSampler, "draw", lambda self, population, rng: np.arange(population))


INTACT = {
    "intact": Build(EVERYONE, "nothing", nullcontext),
    "intact, sampled": Build(SAMPLED, "nothing", nullcontext),
    "intact, in shares": Build(EVERYONE, "nothing", lambda: _through_shares(sized_for=2, staying=2)),
}
BROKEN = {
    "no noise": Build(EVERYONE, "the sum is released as it is", lambda: noise_times(0.0)),
    "half noise": Build(EVERYONE, "half the standard deviation that is charged", lambda: noise_times(0.5)),
    "dropouts forgotten": Build(
        EVERYONE,
        "shares of noise are sized for all 16 participants, and 2 stay",
        lambda: _through_shares(sized_for=16, staying=2),
    ),
    "clip off": Build(EVERYONE, "contributions enter the sum at full length", lambda: _clip_by(_unclipped)),
    "divisor from private size": Build(EVERYONE, "the noised sum is divided by the number of replies", _divide_by_replies),
    "noise after averaging": Build(
        SAMPLED,
        "noise is added to the mean with the standard deviation for a mean over the population, not the cohort",
        lambda: noise_times(SAMPLED.sampler.sampling_rate),
    ),
    "two factors, one charge": Build(
        EVERYONE, "each factor is clipped and noised, one is accounted for", lambda: _clip_by(_clip_each_factor)
    ),
    "expected participation": Build(
        SAMPLED, "units take part in every round and are charged for a quarter of them, as planned", _always_available
    ),
    "non-finite passes": Build(EVERYONE, "the norm of a NaN is not above the clip norm", lambda: _clip_by(_nan_is_short)),
}
