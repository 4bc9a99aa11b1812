"""Groups, rules and clips around the last aggregate, on rounds small enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dp_federated_lora.aggregation import FEDAVG, FFA, METHODS, LinearMethod, Sgd
from dp_federated_lora.audit import CanaryAudit, Transcript
from dp_federated_lora.errors import AggregationError, AuditError, DpflError, DuplicateContribution, IncompatiblePlan
from dp_federated_lora.federated import (
    Defence,
    Purpose,
    Request,
    RoundReport,
    Server,
    ServerState,
    handle,
    read_checkpoint,
    write_checkpoint,
)
from dp_federated_lora.lab.config import parse_config
from dp_federated_lora.lab.plans import privacy_plan
from dp_federated_lora.lab.workbench import Workbench
from dp_federated_lora.privacy import (
    BoundedSum,
    Ledger,
    Permit,
    PoissonSampler,
    PrivacyPlan,
    PrivacyUnit,
    Released,
    SecureRandom,
    Trust,
    UnitId,
    clip_examples,
)
from dp_federated_lora.vector import Layout
from plans import a_plan

Raw = dict[str, dict[str, object]]
D, N, EACH = 4000, 10, 20  # statistical bounds below are more than 6 standard errors wide: false positives under 1e-8
NOISE = 1.5 * 2.0 / (N * EACH)  # multiplier x clip norm on the sum, over the divisor
SMALL = torch.ones(4, dtype=torch.float64)  # as long as the clip norm; its coordinates stand out of the noise
LARGE = torch.full((D,), 2.0 / math.sqrt(D), dtype=torch.float64)
MEDIAN = Defence(rule="median", f=2, groups=5)
CENTRED = Defence(around_aggregate=True)


@cache
def everybody(trust: Trust = Trust.CENTRAL) -> PrivacyPlan:
    """Ten participants with twenty examples each, all of which take part in every round."""
    sites = N if trust is Trust.LOCAL else 1
    return a_plan(unit=PrivacyUnit.EXAMPLE, trust=trust, sites=sites, sampler=PoissonSampler(1.0), divisor=float(N * EACH))


class Ten:
    """An exchange of ten participants of whom the first ones lie; all clip around the request's centre, as `handle` does."""

    def __init__(self, honest: Tensor, *, lie: Tensor = SMALL, liars: int = 0, trust: Trust = Trust.CENTRAL) -> None:
        self.plan, self.values, self.broken = everybody(trust), [lie] * liars + [honest] * (N - liars), 0
        self.names = [f"c{i}" for i in range(N)]
        self.asked: list[Sequence[int]] = []

    def __call__(self, request: Request, clients: Sequence[int], rng: SecureRandom) -> Iterator[BoundedSum]:
        self.asked.append(clients)
        for index in clients:
            row = self.values[index] - (0 if request.centre is None else request.centre)
            units = [UnitId(f"{self.names[index]}/{i}") for i in range(EACH)]
            yield self.plan.clip(row.expand(EACH, -1), request.clip_norm, units)

    def reports(self, request: Request, sites: Mapping[str, tuple[Permit, SecureRandom]], *, size: int) -> Iterator[Released]:
        for index, name in enumerate(self.names):
            permit, rng = sites[name]
            (total,) = self(request, [index], rng)
            released, _ = self.plan.release(total, {}, permit=permit, rng=rng)
            yield replace(released, value=released.value * math.nan) if index < self.broken else released


@dataclass
class After:
    """What some rounds came to: the last aggregate, the state and the last report."""

    aggregate: Tensor
    state: ServerState
    report: RoundReport


def after(path: Path, exchange: Ten, defence: Defence, *, rounds: int = 1) -> After:
    plan, size = exchange.plan, len(exchange.values[-1])
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (size,)),)), defence=defence)
    last = torch.zeros(size, dtype=torch.float64) if defence.active else None
    state = ServerState(0, {"lora_B": torch.zeros(size)}, Sgd(1.0).init(size), plan.clip_norm, aggregate=last)
    ledger = Ledger.open(path / f"{len(list(path.iterdir()))}.sqlite", budget=plan.budget, owner="t")
    for number in range(1, rounds + 1):
        key = SecureRandom.insecure_from(number)
        permit = server.reserve(state, ledger, key)
        before, (state, norm) = state, server.run_round(state, permit, exchange, key)
        ledger.commit(permit.serial)
    assert ledger.spent().charges == rounds
    step = (state.adapter["lora_B"] - before.adapter["lora_B"]).double()
    return After(step, state, server.report(state, ledger, update_norm=norm, clip_norm=2.0, scores={}))


def along(aggregate: Tensor) -> float:
    """How much of what honest participants agree on is in an aggregate; noise of standard deviation s adds s / 2."""
    honest = SMALL if len(aggregate) == len(SMALL) else LARGE
    return float(aggregate @ honest) / 4.0


# --- groups ---------------------------------------------------------------------------------------


def test_a_mean_over_groups_has_a_root_of_their_number_times_the_noise_and_one_charge_pays(tmp_path: Path):
    exchange = Ten(LARGE)
    found = after(tmp_path, exchange, Defence(rule="mean", groups=5))
    assert [len(members) for members in exchange.asked] == [2] * 5
    assert sorted(index for members in exchange.asked for index in members) == list(range(N))
    assert abs(float((found.aggregate - LARGE).std()) / (NOISE * math.sqrt(5)) - 1) < 6.5 / math.sqrt(2 * D)
    assert abs(along(found.aggregate) - 1) < 6.5 * NOISE * math.sqrt(5) / 2
    assert found.report.noise_norm == pytest.approx(NOISE * math.sqrt(5 * D))


def test_each_group_has_the_noise_of_a_whole_round_and_shares_none_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []

    def keep(self: Defence, parts: Sequence[Released], **rest: object) -> Tensor:
        seen.extend(part.value for part in parts)
        return torch.zeros(D, dtype=torch.float64)

    monkeypatch.setattr(Defence, "aggregate", keep)
    after(tmp_path, Ten(torch.zeros(D)), MEDIAN)
    assert len(seen) == 5
    for part in seen:
        assert abs(float(part.std()) / (1.5 * 2.0) - 1) < 6.5 / math.sqrt(2 * D)
    assert float((torch.corrcoef(torch.stack(seen)) - torch.eye(5)).abs().max()) < 6.5 / math.sqrt(D)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32), st.data())
def test_groups_have_one_size_and_who_is_in_which_depends_on_no_member(g: int, each: int, seed: int, data: st.DataObject):
    roster, defence = g * each, Defence(rule="mean", groups=g)
    cohort = data.draw(st.lists(st.sampled_from(range(roster)), unique=True))
    whole = defence.deal(range(roster), roster, SecureRandom.insecure_from(seed))
    some = defence.deal(cohort, roster, SecureRandom.insecure_from(seed))
    assert {len(members) for members in whole} == {each}
    assert sorted(index for members in some for index in members) == sorted(cohort)
    assert all(set(part) <= set(group) for part, group in zip(some, whole, strict=True))


def test_groups_are_dealt_anew_with_each_key():
    assert len({str(MEDIAN.deal(range(N), N, SecureRandom.insecure_from(seed))) for seed in range(20)}) == 20


def test_a_unit_in_two_groups_is_refused(tmp_path: Path):
    exchange = Ten(SMALL)
    exchange.names = ["same"] * N
    with pytest.raises(DuplicateContribution):
        after(tmp_path, exchange, MEDIAN)


# --- liars ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "geometric_median", "multi_krum", "caf", "meamed"])
def test_liars_in_two_of_five_groups_turn_a_mean_and_no_robust_rule(tmp_path: Path, rule: str):
    lies = Ten(SMALL, lie=-1e9 * SMALL, liars=2)  # noise of 0.075 in each group's mean, of 0.017 along their mean
    assert along(after(tmp_path, lies, Defence()).aggregate) < 0.75
    assert along(after(tmp_path, lies, replace(MEDIAN, rule=rule)).aggregate) > 0.8


@pytest.mark.parametrize("before", ["nnm", "arc", "bucketing", "clip"])
def test_what_may_come_before_a_rule_runs_in_a_round(tmp_path: Path, before: str):
    defence = Defence(
        rule="median",
        f=1,
        groups=10,
        before=(before,),
        parameters={"bucketing": {"bucket": 3}, "clip": {"bound": 2.0}}.get(before, {}),
    )
    lies = Ten(SMALL, lie=-1e9 * SMALL, liars=1)
    assert along(after(tmp_path, lies, defence).aggregate) > 0.8


def test_under_local_trust_a_rule_sees_the_reports_of_all_participants(tmp_path: Path):
    lies = Ten(SMALL, lie=-1e9 * SMALL, liars=4, trust=Trust.LOCAL)  # noise of 0.15 in each mean
    assert along(after(tmp_path, lies, Defence()).aggregate) < 0.4
    found = after(tmp_path, lies, Defence(rule="median", f=4))
    assert along(found.aggregate) > 0.6
    assert found.report.noise_norm == pytest.approx(NOISE * math.sqrt(N * 4))


@pytest.mark.parametrize("defence", [Defence(), CENTRED, MEDIAN, replace(MEDIAN, around_aggregate=True)])
@pytest.mark.parametrize("trust", [Trust.CENTRAL, Trust.LOCAL])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_two_of_ten_that_send_nan_poison_nothing(tmp_path: Path, defence: Defence, trust: Trust, value: float):
    local = trust is Trust.LOCAL
    exchange = Ten(SMALL, lie=value * SMALL, liars=2, trust=trust)
    if local:  # there a liar can send what never went through a clip
        exchange.broken, defence = 2, replace(defence, groups=1)
    found = after(tmp_path, exchange, defence, rounds=3)
    assert found.aggregate.isfinite().all()
    assert found.state.adapter["lora_B"].isfinite().all()
    assert along(found.aggregate) > 0.7  # two of ten are missing from a mean


# --- clips around the last aggregate ---------------------------------------------------------------


def test_clients_clip_around_the_last_aggregate_and_it_grows_by_a_clip_norm_a_round(tmp_path: Path):
    far = Ten(3 * SMALL)  # three clip norms long
    for rounds, expected in ((1, 1.0), (2, 2.0), (3, 3.0)):
        found = after(tmp_path, far, CENTRED, rounds=rounds)
        assert abs(along(found.aggregate) - expected) < 0.2
        assert torch.allclose(found.state.aggregate, found.aggregate, atol=1e-6)
    assert abs(along(after(tmp_path, far, Defence(), rounds=3).aggregate) - 1.0) < 0.2


def test_a_liar_moves_a_centred_aggregate_by_no_more_than_its_clip_norm_over_the_divisor(tmp_path: Path):
    honest, lies = (Ten(SMALL, lie=-1e9 * SMALL, liars=liars) for liars in (0, 2))
    moved = [after(tmp_path, exchange, CENTRED, rounds=1).aggregate for exchange in (honest, lies)]
    assert float((moved[0] - moved[1]).norm()) <= 2 / N * 4.0 * (1 + 1e-4)  # each from +C to -C; the noise is the same


def test_a_plain_run_keeps_no_aggregate_and_a_kept_one_survives_a_checkpoint(tmp_path: Path):
    assert after(tmp_path, Ten(SMALL), Defence()).state.aggregate is None
    state = after(tmp_path, Ten(SMALL), CENTRED).state
    write_checkpoint(tmp_path / "c", state, run_id="r", ledger_head="h")
    read, _ = read_checkpoint(tmp_path / "c", run_id="r")
    assert torch.equal(read.aggregate, state.aggregate)


def test_a_round_uses_and_changes_the_aggregate_of_what_it_sends_alone(tmp_path: Path):
    layout = Layout((("lora_B", (30,)), ("head.weight", (D - 30,))))
    plan = everybody()
    server = Server(plan=plan, method=replace(FFA, head_rounds=1), optimizer=Sgd(1.0), layout=layout, defence=CENTRED)
    adapter = {"lora_B": torch.zeros(30), "head.weight": torch.zeros(D - 30)}
    last, key = torch.full((D,), 0.01, dtype=torch.float64), SecureRandom.insecure_from(1)
    state = ServerState(0, adapter, Sgd(1.0).init(D), 2.0, aggregate=last)
    ledger = Ledger.open(tmp_path / "l.sqlite", budget=plan.budget, owner="t")
    state, _ = server.run_round(state, server.reserve(state, ledger, key), Ten(LARGE[30:]), key)
    assert torch.equal(state.aggregate[:30], last[:30])
    assert not torch.equal(state.aggregate[30:], last[30:])
    assert torch.allclose(state.adapter["head.weight"].double(), state.aggregate[30:], atol=1e-6)
    assert [server.bytes_per_client(number) for number in (1, 2)] == [12 * (D - 30), 12 * D]  # the aggregate goes down, too


@pytest.mark.parametrize("unit", ["example", "client"])
def test_what_a_client_clips_is_its_difference_from_the_centre(request: pytest.FixtureRequest, unit: str):
    raw: Raw = request.getfixturevalue("client_config" if unit == "client" else "raw_config")
    raw["privacy"] |= {"clip_norm": 1e3, "sampling_rate": 1.0}
    config = parse_config(raw, where="t")
    bench, plan, rng = Workbench.of(config), privacy_plan(config), SecureRandom.insecure_from(1)
    client = bench.clients(plan)[0]
    size = Layout.of(bench.model.parameters(FFA.factors)).size
    centre = torch.linspace(-1, 1, size, dtype=torch.float64)
    plain = Request(Purpose.TRAINING, 1, plan.content_id, bench.model.state(), 1e3)
    sums = [handle(each, client, bench.learner, rng) for each in (plain, replace(plain, centre=centre))]
    count = 1 if unit == "client" else len(client.examples)
    difference = (sums[0]._value - sums[1]._value).double() * (1e3 / 2**22)
    assert torch.allclose(difference, count * centre, atol=count * 2e3 / 2**22)
    assert torch.equal(
        handle(replace(plain, centre=centre * math.nan), client, bench.learner, rng)._value, torch.zeros(size).long()
    )


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defence", "method", "sources", "error", "message"),
    [
        (MEDIAN, FEDAVG, 5, IncompatiblePlan, r"\(c B, A / c\) is the same adapter"),
        (MEDIAN, METHODS["lalora"], 5, IncompatiblePlan, "use a method that sends one factor"),
        (MEDIAN, METHODS["fedask"], 5, IncompatiblePlan, "gives B other coordinates after each round"),
        (CENTRED, METHODS["fedask"], 1, IncompatiblePlan, "gives B other coordinates after each round"),
        (MEDIAN, FFA, 4, AggregationError, "median needs 2 f < n, but f = 2 of n = 4 .* f of at most 1"),
        (replace(MEDIAN, rule="bulyan"), FFA, 10, AggregationError, r"bulyan needs 4 f \+ 3 <= n"),
        (replace(MEDIAN, rule="mean"), FFA, 5, AggregationError, "mean needs f = 0"),
        (replace(MEDIAN, before=("bucketing",), parameters={"bucket": 3}), FFA, 12, AggregationError, "f = 2 of n = 4"),
        (
            replace(MEDIAN, before=("bucketing",), parameters={"bucket": 1.5}),
            FFA,
            9,
            AggregationError,
            "bucket is a whole number",
        ),
        (replace(MEDIAN, rule="centered_clipping"), FFA, 5, AggregationError, "'tau' has no default"),
        (replace(MEDIAN, rule="smea", f=20), FFA, 60, AggregationError, "50,000 subsets"),
        (replace(MEDIAN, rule="fltrust"), FFA, 5, IncompatiblePlan, "from public data, and there is none"),
        (replace(MEDIAN, rule="dnc"), FFA, 5, IncompatiblePlan, "use 'caf'"),
        (replace(MEDIAN, rule="guess"), FFA, 5, AggregationError, "no rule called 'guess'"),
    ],
)
def test_what_could_not_aggregate_a_round_is_refused_before_the_first(
    defence: Defence, method: LinearMethod, sources: int, error: type[DpflError], message: str
):
    with pytest.raises(error, match=message):
        defence.require(method, sources)


def test_methods_that_send_one_factor_at_a_time_and_both_factors_around_a_centre_are_not_refused():
    MEDIAN.require(FFA, 5)
    MEDIAN.require(METHODS["rolora"], 5)
    CENTRED.require(FEDAVG, 1)


@pytest.mark.parametrize("wrap", [Transcript().wrap, CanaryAudit(20, SecureRandom.insecure_from(1)).wrap])
def test_audits_of_releases_refuse_what_makes_something_else_of_them(wrap: Callable[..., object]):
    plan = everybody()
    server = Server(plan=plan, method=FFA, optimizer=Sgd(1.0), layout=Layout((("lora_B", (D,)),)), defence=MEDIAN)
    with pytest.raises(AuditError, match=r"without (either|\[robust\])"):
        wrap(Ten(SMALL), server)


# --- the kernel -------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 6), st.integers(0, 2**20))
def test_one_unit_more_changes_one_block_and_no_more_than_its_clip_norm(g: int, size: int, seed: int):
    rows = torch.randn(2 * g, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10
    names = [UnitId(f"u{i}") for i in range(2 * g)]

    def blocks(last: int) -> Tensor:
        sums = [clip_examples(rows[b:last:g], 2.0, names[b:last:g]) for b in range(g)]
        return BoundedSum.in_blocks(sums, size=size, clip_norm=2.0)._value.reshape(g, size)

    change = blocks(2 * g) - blocks(2 * g - 1)
    assert change[:-1].count_nonzero() == 0
    assert int((change**2).sum()) <= 4**22


def test_blocks_of_another_shape_or_clip_norm_or_with_a_unit_twice_are_refused():
    def one(size: int, clip_norm: float, name: str) -> BoundedSum:
        return clip_examples(torch.ones(1, size), clip_norm, [UnitId(name)])

    for other in (one(4, 2.0, "b"), one(3, 1.0, "b")):
        with pytest.raises(DpflError, match="one plan, one clip norm, one layout"):
            BoundedSum.in_blocks([one(3, 2.0, "a"), other], size=3, clip_norm=2.0)
    with pytest.raises(DuplicateContribution):
        BoundedSum.in_blocks([one(3, 2.0, "a"), one(3, 2.0, "a")], size=3, clip_norm=2.0)
