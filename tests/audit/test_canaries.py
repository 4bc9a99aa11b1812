"""Canaries go through the engine like any unit; those left out leave no trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from broken_builds import LAYOUT, SAMPLED, D, Sites, noise_times, run, updates
from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.audit import CanaryAudit
from dp_federated_lora.errors import AuditError
from dp_federated_lora.federated import Purpose, Request, Server, ServerState
from dp_federated_lora.privacy import BoundedSum, Ledger, PoissonSampler, PrivacyPlan, PrivacyUnit, SecureRandom
from plans import a_plan

FEW = 60


@pytest.fixture
def no_noise() -> Iterator[None]:
    """Sums can be read off the release."""
    with noise_times(0.0):
        yield


def inserted(seed: int = 1, count: int = FEW) -> CanaryAudit:
    return CanaryAudit(count, SecureRandom.insecure_from(seed))


def plan_for(unit: PrivacyUnit, rate: float = 1.0, rounds: int = 1) -> PrivacyPlan:
    return a_plan(unit=unit, sampler=PoissonSampler(rate), rounds=rounds, divisor=1.0)


class Noted(Sites):
    """Sites that note who was asked."""

    def __init__(self, plan: PrivacyPlan, count: int) -> None:
        super().__init__(plan, updates(count))
        self.asked: list[list[int]] = []

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom):
        self.asked.append(list(clients))
        return super().__call__(request, clients, rng)


@pytest.mark.parametrize("unit", list(PrivacyUnit))
def test_included_canaries_move_the_release_by_the_clip_norm_each_and_excluded_ones_not_at_all(
    unit: PrivacyUnit, tmp_path: Path, no_noise: None
):
    plan, audit = plan_for(unit), inserted()
    run(plan, Sites(plan, []), audit.wrap, tmp_path / "l.sqlite", 1)
    release = audit._released * math.sqrt(D)  # divisor 1: the noised sum
    expected = torch.zeros(D, dtype=torch.float64)
    for index in np.flatnonzero(audit.included):
        direction = audit.direction(int(index), D).double()
        expected += plan.clip_norm * direction / direction.norm()
    assert float((release - expected).abs().max()) < FEW * plan.clip_norm * 2.0**-22  # rounding to the lattice, towards zero


@pytest.mark.parametrize("unit", list(PrivacyUnit))
def test_the_sampler_draws_canaries_like_everybody_else(unit: PrivacyUnit, tmp_path: Path, no_noise: None):
    rounds, audit = 60, inserted(count=40)
    plan = plan_for(unit, rate=0.3, rounds=rounds)
    run(plan, Sites(plan, []), audit.wrap, tmp_path / "l.sqlite", 1)
    release = audit._released * math.sqrt(D)
    members = [audit.direction(int(i), D).double() for i in np.flatnonzero(audit.included)]
    counts = torch.tensor([float(release @ (m / m.norm())) / plan.clip_norm for m in members])  # rounds in which each took part
    n = rounds * len(members)
    # 5.4 standard errors: probability under 1e-7; other canaries add less than 0.1 to a count of 18
    assert abs(float(counts.sum()) / n - 0.3) < 5.4 * math.sqrt(0.21 / n) + 0.01
    assert float(counts.std()) > 0.5  # a fixed number of rounds for each would be another mechanism


def test_participants_are_drawn_as_they_would_be_without_canaries(tmp_path: Path):
    plan = plan_for(PrivacyUnit.CLIENT, rate=0.5, rounds=5)
    plain, audited = Noted(plan, 8), Noted(plan, 8)
    run(plan, plain, lambda exchange, server: (exchange, server), tmp_path / "a.sqlite", 1)
    run(plan, audited, inserted().wrap, tmp_path / "b.sqlite", 1)
    assert plain.asked == audited.asked


def test_scores_of_excluded_canaries_are_standard_normal(tmp_path: Path):
    """1,000 of them: mean within 5.4 standard errors, mean square likewise (sd sqrt(2)); false positives under 2e-7."""
    audit = inserted(count=2000)
    run(SAMPLED, Sites(SAMPLED, updates(3)), audit.wrap, tmp_path / "l.sqlite", 1)
    scores = audit.scores()[~audit.included]
    n = len(scores)
    assert abs(scores.mean()) < 5.4 / math.sqrt(n)
    assert abs((scores**2).mean() - 1) < 5.4 * math.sqrt(2 / n)
    assert audit.scores()[audit.included].mean() > 5.4 / math.sqrt(n)


def test_guesses_take_both_ends_and_abstain_between(tmp_path: Path):
    audit = inserted(count=100)
    perfect = np.where(audit.included, 1.0, -1.0) + np.arange(100) / 1000
    assert (audit.guesses(perfect).guesses, audit.guesses(perfect).correct) == (20, 20)
    assert audit.guesses(-perfect).correct == 0
    only_top = audit.guesses(perfect, top=0.3, bottom=0.0)
    assert (only_top.canaries, only_top.guesses, only_top.correct) == (100, 30, 30)


def test_rounds_of_the_head_alone_carry_the_head_of_the_direction(tmp_path: Path, no_noise: None):
    plan, audit = plan_for(PrivacyUnit.CLIENT, rounds=2), inserted()
    method = replace(FFA, head_rounds=1)
    server = Server(plan=plan, method=method, optimizer=Sgd(1.0), layout=LAYOUT)

    class Nobody:
        names: Sequence[str] = ()

        def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom):
            return iter(())

    exchange, server = audit.wrap(Nobody(), server)
    state = ServerState(0, {name: torch.zeros(shape) for name, shape in LAYOUT.entries}, server.optimizer.init(D), plan.clip_norm)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    moved = []
    for number in (1, 2):
        key, before = SecureRandom.insecure_from(number), state.adapter
        permit = server.reserve(state, ledger, key)
        state, _ = server.run_round(state, permit, exchange, key)
        ledger.commit(permit.serial)
        moved.append({name: state.adapter[name] - before[name] for name in before})
    assert not moved[0]["lora_B"].any()
    head = sum(audit.direction(int(i), D)[D // 2 :] for i in np.flatnonzero(audit.included))
    assert torch.cosine_similarity(moved[0]["head"], head, dim=0) > 0.99
    # Both rounds add about clip norm / divisor to the score of a canary, so that they count alike.
    scores = audit.scores()
    assert scores[audit.included].min() > scores[~audit.included].max()


def test_no_two_canaries_share_a_direction_and_each_keeps_its_own():
    audit = inserted(count=500)
    first = torch.stack([audit.direction(i, 8) for i in range(500)])
    assert len(torch.unique(first, dim=0)) == 500
    assert torch.equal(first[7], audit.direction(7, 8))
    other = CanaryAudit(500, SecureRandom.from_os())
    assert (other.included != CanaryAudit(500, SecureRandom.from_os()).included).any()
    assert 135 < other.included.sum() < 365  # beyond 10 standard deviations


def test_an_audit_that_could_say_nothing_or_confuse_units_is_refused(tmp_path: Path):
    with pytest.raises(AuditError, match="at least 20"):
        inserted(count=19)
    with pytest.raises(AuditError, match="nothing was released"):
        inserted().scores()
    for unit, name in (
        (PrivacyUnit.EXAMPLE, "auditor"),
        (PrivacyUnit.CLIENT, f"auditor/{np.flatnonzero(inserted().included)[0]}"),
    ):
        plan = plan_for(unit)
        sites = Sites(plan, updates(1))
        sites.names = [name]
        with pytest.raises(AuditError, match="rename"):
            inserted().wrap(sites, Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=LAYOUT))


def test_the_audit_holds_no_private_value():
    """What an audit keeps is a weighted sum of releases: it never sees a bounded sum."""
    audit = inserted()
    plan = plan_for(PrivacyUnit.CLIENT)
    exchange, _ = audit.wrap(Sites(plan, updates(1)), Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=LAYOUT))
    parts = list(
        exchange(Request(Purpose.TRAINING, 1, plan.content_id, {}, plan.clip_norm), [0, 1], SecureRandom.insecure_from(1))
    )
    assert [type(part) for part in parts] == [BoundedSum, BoundedSum]
    assert not audit._released.any()
