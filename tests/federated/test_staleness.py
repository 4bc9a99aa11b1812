"""Asynchronous rounds: who sees which adapter, what it weighs, and that nobody counts for more than in synchronous ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_federated_lora.aggregation import FFA, Sgd
from dp_federated_lora.errors import PrivacyError
from dp_federated_lora.federated import (
    SYNCHRONOUS,
    Delays,
    Purpose,
    Request,
    Server,
    ServerState,
    read_checkpoint,
    write_checkpoint,
)
from dp_federated_lora.privacy import (
    AdaptiveClip,
    BoundedSum,
    Budget,
    Ledger,
    Permit,
    PoissonSampler,
    PrivacyPlan,
    Released,
    SecureRandom,
    Tier,
    Trust,
    UnitId,
)
from dp_federated_lora.vector import Layout
from plans import a_plan

D, CLIENTS = 6, 12
NAMES = [f"client-{i}" for i in range(CLIENTS)]
EVERYBODY = {"sampler": PoissonSampler(1.0), "divisor": float(CLIENTS), "budget": Budget(1e6, 1e-5)}


class Targets:
    """An exchange whose clients pull the adapter towards targets of their own, and note what they were sent."""

    names = NAMES

    def __init__(self, plan: PrivacyPlan, targets: Tensor) -> None:
        self.plan, self.targets = plan, targets
        self.calls: list[tuple[Request, list[int]]] = []

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        self.calls.append((request, list(clients)))
        for index in clients:
            yield self._bounded(request, index)

    def reports(self, request: Request, sites: Mapping[str, tuple[Permit, SecureRandom]], *, size: int) -> Iterator[Released]:
        self.calls.append((request, [NAMES.index(name) for name in sites]))
        for name, (permit, rng) in sites.items():
            yield self.plan.release(self._bounded(request, NAMES.index(name)), {}, permit=permit, rng=rng)[0]

    def _bounded(self, request: Request, index: int) -> BoundedSum:
        pull = 0.5 * (self.targets[index] - request.adapter["lora_B"].double())
        return self.plan.clip(pull[None], request.clip_norm, [UnitId(NAMES[index])], weight=request.weight)


def targets(seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(CLIENTS, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapters(path: Path, exchange: Targets, delays: Delays, rounds: int, *, seed: int = 1) -> list[Tensor]:
    """The adapter before and after each round."""
    plan = exchange.plan
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (D,)),)), delays=delays)
    state = ServerState(0, {"lora_B": torch.zeros(D), "lora_A": torch.ones(2)}, Sgd(1.0).init(D), plan.clip_norm)
    ledger, seen = Ledger.open(path / "l.sqlite", budget=plan.budget, owner="t"), [state.adapter["lora_B"]]
    for number in range(1, rounds + 1):
        key = SecureRandom.insecure_from(seed).derive(number)
        permit = server.reserve(state, ledger, key)
        state, _ = server.run_round(state, permit, exchange, key)
        ledger.commit(permit.serial)
        seen.append(state.adapter["lora_B"])
        assert all(len(rows) == min(number, delays.longest) for rows in state.earlier.values())  # memory: no more than that
    return seen


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise."""
    monkeypatch.setattr(SecureRandom, "rounded_gaussian", lambda self, sigma, size, **_: np.zeros(size, dtype=np.int64))


# --- who sees what ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [Trust.CENTRAL, Trust.LOCAL])
def test_everybody_is_sent_the_adapter_of_its_own_delay_once_and_in_a_fixed_order(trust: Trust, tmp_path: Path):
    delays, rounds = Delays(longest=2, seed=3), 5
    sites = CLIENTS if trust is Trust.LOCAL else 1
    exchange = Targets(a_plan(**EVERYBODY, trust=trust, sites=sites, rounds=rounds), targets())
    history = adapters(tmp_path, exchange, delays, rounds)
    assert {delays.of(name) for name in NAMES} == {0, 1, 2}
    for number in range(1, rounds + 1):
        calls = [(request, clients) for request, clients in exchange.calls if request.round == number]
        assert [request.staleness for request, _ in calls] == list(range(min(number, 3)))
        assert sorted(client for _, clients in calls for client in clients) == list(range(CLIENTS))
        for request, clients in calls:
            for client in clients:
                began = max(0, number - 1 - delays.of(NAMES[client]))
                assert torch.equal(request.adapter["lora_B"], history[began])
            assert torch.equal(request.adapter["lora_A"], torch.ones(2))  # what is never trained is sent too
            assert request.weight == 1 / math.sqrt(1 + request.staleness)


def test_coins_decide_who_takes_part_and_delays_do_not(tmp_path: Path):
    cohorts = []
    for longest in (0, 3):
        exchange = Targets(a_plan(sampler=PoissonSampler(0.5), rounds=6), targets())
        folder = tmp_path / str(longest)
        folder.mkdir()
        adapters(folder, exchange, Delays(longest), 6)
        drawn = [sorted(c for request, clients in exchange.calls if request.round == t for c in clients) for t in range(1, 7)]
        cohorts.append(drawn)
        # An exchange is asked as often whoever was drawn: the number of calls tells nothing.
        assert len(exchange.calls) == sum(min(t, longest + 1) for t in range(1, 7))
    assert cohorts[0] == cohorts[1]
    assert len({tuple(drawn) for drawn in cohorts[0]}) > 1


def test_a_delay_is_a_matter_of_the_name_alone_and_uniform():
    delays = Delays(longest=3, seed=1)
    whole = {name: delays.of(name) for name in NAMES}
    groups = delays.groups(NAMES[1:], 9)
    assert {NAMES[1:][position]: age for age, group in enumerate(groups) for position in group} == {
        n: whole[n] for n in NAMES[1:]
    }
    assert [delays.groups(NAMES, 0), Delays().groups(NAMES, 9)] == [[list(range(CLIENTS))]] * 2
    counts = np.bincount([delays.of(f"site {i}") for i in range(8000)])
    assert len(counts) == 4
    assert abs(counts - 2000).max() < 6 * math.sqrt(8000 * 3 / 16)  # fixed names: this is one number, not a draw
    assert [Delays(3, 2).of(name) for name in NAMES] != list(whole.values())


def test_the_mean_weight_is_that_of_the_delays():
    names = [f"client-{number}" for number in range(9)]
    weights = [1 / (1 + Delays(4, 1).of(name)) ** 0.5 for name in names]
    assert Delays(4, 1).mean_weight(names) == pytest.approx(sum(weights) / 9)
    assert min(weights) < 1 == SYNCHRONOUS.mean_weight(names)


def test_earlier_adapters_survive_in_the_checkpoint_to_the_bit(tmp_path: Path):
    state = ServerState(3, {"a": torch.randn(2, generator=torch.Generator().manual_seed(0))}, {}, 1.0)
    earlier = Delays(2).remember(state.adapter, {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, ["a"])
    state = replace(state, earlier=earlier)
    write_checkpoint(tmp_path / "c", state, run_id="r", ledger_head="h")
    read, _ = read_checkpoint(tmp_path / "c", run_id="r")
    assert [read.adapter_before(n)["a"].tolist() for n in (0, 1)] == [state.adapter["a"].tolist()] * 2
    assert read.adapter_before(2)["a"].tolist() == [1.0, 2.0]


# --- what it comes to -------------------------------------------------------------------------------


@pytest.mark.usefixtures("silent")
def test_without_noise_it_is_fedbuff_and_ends_at_the_weighted_optimum(tmp_path: Path):
    delays, rounds, goal = Delays(longest=3, seed=2), 60, targets()
    history = adapters(tmp_path, Targets(a_plan(**EVERYBODY, rounds=rounds), goal), delays, rounds)
    taus = [delays.of(name) for name in NAMES]
    x = [torch.zeros(D, dtype=torch.float64)]
    for t in range(1, rounds + 1):  # Nguyen et al. 2022, Algorithm 1, with a buffer that holds one update of everybody
        ages = [min(tau, t - 1) for tau in taus]
        pulls = [0.5 * (goal[k] - x[t - 1 - age]) / math.sqrt(1 + age) for k, age in enumerate(ages)]
        x.append(x[-1] + sum(pulls) / CLIENTS)
    for ours, reference in zip(history, x, strict=True):
        assert torch.allclose(ours.double(), reference, atol=2e-5)  # float32 adapters, and rounding to the lattice
    weights = torch.tensor([1 / math.sqrt(1 + tau) for tau in taus], dtype=torch.float64)
    optimum = weights @ goal / weights.sum()  # stale participants count for less, at the end too
    assert torch.allclose(history[-1].double(), optimum, atol=1e-4)
    assert not torch.allclose(goal.mean(dim=0), optimum, atol=1e-3)


def test_delays_of_zero_change_no_bit(tmp_path: Path):
    runs = []
    for delays in (Delays(), Delays(longest=0, seed=7)):
        folder = tmp_path / str(delays.seed)
        folder.mkdir()
        runs.append(adapters(folder, Targets(a_plan(rounds=3), targets()), delays, 3))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    # The one request of a synchronous round, written out: clipped sums plus the noise of the key, over the divisor.
    plan, key = a_plan(rounds=3), SecureRandom.insecure_from(1).derive(1)
    chosen = plan.draw(range(CLIENTS), key.derive("cohort"), number=1).tolist()
    unit = 2.0 / 2**22
    lattice = (0.5 * targets()[chosen] / unit).trunc().sum(dim=0)  # all shorter than the clip norm
    noise = torch.from_numpy(key.derive("noise").rounded_gaussian(1.5 * 2**22, D))
    assert torch.equal(runs[0][1], ((lattice + noise) * unit / 50.0).to(torch.float32))


# --- nobody counts for more -------------------------------------------------------------------------


PLAIN = a_plan()
TIERED = a_plan(tiers=tuple(Tier(Budget(1e6, 1e-5), 1, 0.5, share) for share in (1.0, 0.3)))
ADAPTIVE = a_plan(adaptive_clip=AdaptiveClip(quantile=0.5, learning_rate=0.2, bit_noise=5.0))


@settings(deadline=None, max_examples=200)
@given(
    row=st.lists(st.floats(width=32), min_size=1, max_size=5),
    staleness=st.integers(0, 10**6),
    clip_norm=st.sampled_from([1e-3, 0.7, 2.0]),
    tier=st.integers(0, 1),
)
def test_a_weight_lowers_the_bound_of_a_contribution_and_never_raises_it(
    row: list[float], staleness: int, clip_norm: float, tier: int
):
    weight = Request(Purpose.TRAINING, 1, "", {}, clip_norm, staleness).weight
    total = TIERED.clip(torch.tensor([row]), clip_norm, [UnitId("u")], tier=tier, weight=weight)
    squares = sum(int(k) ** 2 for k in total._value)
    assert squares <= (Fraction(weight) * Fraction((1.0, 0.3)[tier])) ** 2 * (1 + Fraction(1, 2**50)) * 4**22
    assert squares <= 4**22 and total.clip_norm == clip_norm
    if not np.isfinite(row).all():
        assert squares == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(0, 50), st.floats(0.01, 100.0))
def test_a_weighted_contribution_is_weight_times_the_clipped_one(seed: int, staleness: int, length: float):
    row = length * torch.randn(1, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = 1 / math.sqrt(1 + staleness)
    for plan in (PLAIN, ADAPTIVE):
        plain, weighted = (plan.clip(row, 2.0, [UnitId("u")], weight=w)._value for w in (1.0, weight))
        assert ((plain[:9] * weight - weighted[:9]).abs() <= 1 + weight).all()  # both are rounded towards zero
        assert torch.equal(plain[9:], weighted[9:])  # the bit of an adaptive clip norm is a vote, and votes are not weighted


@pytest.mark.parametrize("weight", [0.0, -0.5, 1.0 + 1e-9, 3.0, math.inf, math.nan])
def test_no_unit_counts_for_more_than_was_charged(weight: float):
    for plan in (PLAIN, TIERED, ADAPTIVE):
        with pytest.raises(PrivacyError, match="weight"):
            plan.clip(torch.ones(1, D), 2.0, [UnitId("u")], tier=0, weight=weight)
