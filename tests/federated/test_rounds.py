"""The round itself, on a plan small enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dp_federated_lora.aggregation import FFA, Adam, Sgd
from dp_federated_lora.errors import ConfigError, DuplicateContribution, IncompatiblePlan
from dp_federated_lora.federated import Client, Purpose, Request, Server, ServerState, handle
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import (
    BoundedSum,
    Budget,
    GaussianMechanism,
    Ledger,
    PoissonSampler,
    PrivacyPlan,
    PrivacyUnit,
    SecureRandom,
    UnitId,
    clip_to,
)
from dp_federated_lora.runtime import Simulator
from dp_federated_lora.vector import Layout
from plans import a_plan

D = 200  # statistical bounds below are more than 5.4 standard errors wide: false positives under 1e-7


class Clients:
    """An exchange whose clients all send one vector; some drop out."""

    def __init__(self, value: torch.Tensor, *, drop: int = 0, clip_norm: float = 2.0) -> None:
        self.value, self.drop, self.clip_norm = value, drop, clip_norm
        self.cohorts: list[Sequence[int]] = []
        self.names = [f"c{i}" for i in range(100)]

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        self.cohorts.append(clients)
        for index in clients[self.drop :]:
            one = clip_to(self.value, self.clip_norm, UnitId(self.names[index]))
            yield BoundedSum.collect([one], size=len(self.value), clip_norm=self.clip_norm)


def one_round(tmp_path: Path, exchange: Clients, the_plan: PrivacyPlan, seed: int = 1) -> torch.Tensor:
    server = Server(plan=the_plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (D,)),)))
    state = ServerState(0, {"lora_B": torch.zeros(D)}, Sgd(1.0).init(D), the_plan.clip_norm)
    key = SecureRandom.insecure_from(seed)
    ledger = Ledger.open(tmp_path / f"{seed}.sqlite", budget=the_plan.budget, owner="t")
    after, _ = server.run_round(state, server.reserve(state, ledger, key), exchange, key)
    return after.adapter["lora_B"]


def test_the_released_mean_is_the_clipped_sum_plus_noise_over_a_public_constant(tmp_path: Path):
    exchange = Clients(torch.full((D,), 10.0))
    step = one_round(tmp_path, exchange, a_plan())
    cohort = len(exchange.cohorts[0])
    signal = cohort * (2.0 / math.sqrt(D)) / 50.0
    noise = step.double() - signal
    std = 1.5 * 2.0 / 50.0  # multiplier x clip norm on the SUM, over the divisor
    assert abs(float(noise.mean())) < 5.4 * std / math.sqrt(D)
    assert 0.7 * std < float(noise.std()) < 1.35 * std  # beyond 6 standard errors of a sample of 200


def test_dropouts_change_neither_the_divisor_nor_the_noise(tmp_path: Path):
    whole = one_round(tmp_path, Clients(torch.full((D,), 10.0)), a_plan(), seed=4)
    exchange = Clients(torch.full((D,), 10.0), drop=10)
    other = tmp_path / "other"
    other.mkdir()
    less = one_round(other, exchange, a_plan(), seed=4)
    # The same key, so the same noise: exactly ten clipped contributions are missing.
    assert torch.allclose(whole - less, torch.full((D,), 10 * (2.0 / math.sqrt(D)) / 50.0), atol=1e-5)


def test_an_empty_cohort_and_non_finite_updates_still_get_full_noise(tmp_path: Path):
    for seed, exchange in ((1, Clients(torch.full((D,), 1.0), drop=100)), (2, Clients(torch.full((D,), float("nan"))))):
        step = one_round(tmp_path, exchange, a_plan(), seed=seed)
        assert torch.isfinite(step).all()
        assert float(step.std()) > 0.7 * 1.5 * 2.0 / 50.0


def test_a_client_that_answers_twice_or_with_another_clip_norm_is_refused(tmp_path: Path):
    class Twice(Clients):
        def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
            yield from super().__call__(request, [*clients, clients[0]], rng)

    with pytest.raises(DuplicateContribution):
        one_round(tmp_path, Twice(torch.ones(D)), a_plan())
    with pytest.raises(Exception, match="one plan, one clip norm"):
        one_round(tmp_path, Clients(torch.ones(D), clip_norm=9.0), a_plan(), seed=2)


def test_cohorts_are_fresh_poisson_samples(tmp_path: Path):
    exchange = Clients(torch.ones(D))
    for seed in range(40):
        one_round(tmp_path, exchange, a_plan(), seed=seed)
    sizes = torch.tensor([len(c) for c in exchange.cohorts], dtype=torch.float64)
    assert len({tuple(c) for c in exchange.cohorts}) == 40
    assert abs(float(sizes.mean()) - 50) < 5.4 * 5 / math.sqrt(40)
    assert float(sizes.std()) > 1  # a fixed cohort size would be another mechanism


def test_plans_that_cannot_fit_or_make_no_sense_are_refused():
    with pytest.raises(IncompatiblePlan, match="raise the noise"):
        a_plan(budget=Budget(0.5, 1e-5))
    for change in ({"rounds": 0}, {"divisor": 0.0}, {"divisor": float("nan")}, {"clip_norm": -1.0}):
        with pytest.raises(IncompatiblePlan):
            a_plan(**change)
    with pytest.raises(IncompatiblePlan, match="sampling_rate"):
        PoissonSampler(0.0)
    with pytest.raises(IncompatiblePlan, match="noise_multiplier"):
        GaussianMechanism(0.0)
    with pytest.raises(IncompatiblePlan, match="population"):
        PrivacyPlan.calibrated(
            unit=PrivacyUnit.CLIENT, budget=Budget(1, 1e-5), population=0, sampling_rate=0.1, rounds=1, clip_norm=1.0
        )


def test_every_field_of_a_plan_is_in_its_identity():
    base = a_plan()
    changed = [
        replace(base, clip_norm=3.0),
        replace(base, rounds=2),
        replace(base, divisor=51.0),
        replace(base, mechanism=GaussianMechanism(1.6)),
        replace(base, sampler=PoissonSampler(0.4)),
        replace(base, unit=PrivacyUnit.EXAMPLE),
        replace(base, budget=Budget(99.0, 1e-5)),
    ]
    assert len({p.content_id for p in (base, *changed)}) == 8


def test_clients_refuse_a_plan_they_did_not_agree_to_and_names_are_unique(raw_config):
    config = parse_config(raw_config, where="x")
    bench = Workbench.of(config)
    clients = bench.clients(privacy_plan(config))
    request = Request(Purpose.TRAINING, 1, "0" * 64, bench.model.state(), 2.0)
    with pytest.raises(IncompatiblePlan, match="nothing was computed"):
        handle(request, clients[0], bench.learner, SecureRandom.insecure_from(0))
    with pytest.raises(ConfigError, match="unique"):
        Simulator([clients[0], clients[0]], bench.learner)
    lonely = Client("x", clients[0].examples, a_plan(), FFA, None, clients[0].held_out)
    with pytest.raises(IncompatiblePlan, match="local steps"):
        handle(
            Request(Purpose.TRAINING, 1, a_plan().content_id, bench.model.state(), 2.0),
            lonely,
            bench.learner,
            SecureRandom.insecure_from(0),
        )


def test_head_rounds_send_and_move_the_head_alone_and_its_steps_have_their_own_length(tmp_path: Path):
    layout = Layout((("lora_B", (30,)), ("head.weight", (D - 30,))))
    method = replace(FFA, head_rounds=1)
    server = Server(plan=a_plan(), method=method, optimizer=Sgd(1.0), layout=layout, head_scale=10.0)
    state = ServerState(0, {"lora_B": torch.zeros(30), "head.weight": torch.zeros(D - 30)}, Sgd(1.0).init(D), 2.0)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=a_plan().budget, owner="t")
    assert [server.bytes_per_client(n) for n in (1, 2)] == [8 * (D - 30), 8 * D]
    spreads = []
    for size in (D - 30, D):
        key = SecureRandom.insecure_from(size)
        permit = server.reserve(state, ledger, key)
        before = state.adapter
        state, _ = server.run_round(state, permit, Clients(torch.zeros(size)), key)
        ledger.commit(permit.serial)
        spreads.append({n: float((state.adapter[n] - before[n]).std()) for n in before})
        report = server.report(state, ledger, update_norm=0.0, clip_norm=2.0, scores={})
        assert report.noise_norm == pytest.approx(a_plan().noise_norm(size, 2.0))
    noise = 1.5 * 2.0 / 50.0
    assert spreads[0]["lora_B"] == 0.0
    for spread in spreads:
        assert 0.7 * 10 * noise < spread["head.weight"] < 1.35 * 10 * noise  # a sample of 170: beyond 5.5 standard errors
    assert 0.2 * noise < spreads[1]["lora_B"] < 2.0 * noise  # a sample of 30: likewise


def test_server_optimisers_follow_their_formulas():
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)
    sgd = Sgd(0.5, momentum=0.9)
    step, state = sgd.update(mean, sgd.init(2))
    assert torch.allclose(step, 0.5 * mean)
    step, _ = sgd.update(mean, state)
    assert torch.allclose(step, 0.5 * 1.9 * mean)
    adam = Adam(0.1)
    step, state = adam.update(mean, adam.init(2))
    assert torch.allclose(step, 0.1 * mean.sign(), atol=1e-6)
    reference = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    oracle = torch.optim.Adam([reference], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    total, state = torch.zeros(2, dtype=torch.float64), adam.init(2)
    for scale in (1.0, -0.3, 2.0):
        reference.grad = -scale * mean  # the server adds, torch subtracts
        oracle.step()
        step, state = adam.update(scale * mean, state)
        total += step
    assert torch.allclose(total, reference.detach(), atol=1e-9)
    # Yogi: the second moment grows by 1 % of the squares, and shrinks by 1 % of them where they are smaller.
    yogi = Adam(0.1, yogi=True)
    _, state = yogi.update(torch.ones(1, dtype=torch.float64), yogi.init(1))
    _, state = yogi.update(torch.full((1,), 0.09, dtype=torch.float64), state)
    assert state["second"].item() == pytest.approx(0.01 - 0.01 * 0.09**2)
