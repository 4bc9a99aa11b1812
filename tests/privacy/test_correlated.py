from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from scipy import stats

from dp_federated_lora.errors import (
    BudgetExhausted,
    IncompatiblePlan,
    ParticipationExceeded,
    PermitMismatch,
    PermitSpent,
    PrivacyError,
)
from dp_federated_lora.privacy import (
    BoundedSum,
    Budget,
    Composition,
    CorrelatedGaussian,
    Correlation,
    CyclicPoissonSampler,
    DpEvent,
    Ledger,
    NoiseState,
    Participation,
    SecureRandom,
    UnitId,
    clip_to,
    inverse,
    sensitivity,
)

ALPHA = 1e-9  # false-positive rate of each statistical test below, of which there are fewer than a hundred
FREE = NoOpDpEvent()


THREE_BANDS = Correlation((0.5, 0.25))
BUFFERS = Correlation((0.3, 0.2), (0.9, 0.5))


def a_mechanism(**changes: object) -> CorrelatedGaussian:
    """Six rounds of noise over three bands, with fields changed."""
    facts: dict[str, object] = {
        "correlation": THREE_BANDS,
        "noise_multiplier": 2.0,
        "clip_norm": 1.0,
        "rounds": 6,
        "participation": Participation(3, 2),
    }
    return CorrelatedGaussian(**(facts | changes))  # type: ignore[arg-type]


def dense(bands: Sequence[float], n: int) -> np.ndarray:
    """The matrix C `(n, n)`."""
    return sum(np.diag(np.full(n - j, c), -j) for j, c in enumerate(bands[:n]))


class Run:
    """A ledger and a stream of rounds."""

    def __init__(self, folder: Path, mechanism: CorrelatedGaussian, size: int = 4, *, keys: int | None = None) -> None:
        self.mechanism, self.size, self.keys = mechanism, size, keys
        self.path = folder / "ledger.sqlite"
        self.ledger = Ledger.open(self.path, budget=Budget(1e4, 1e-5), owner="t")
        self.state = mechanism.start(size)

    def sum(self, *, units: Sequence[str] = (), clip_norm: float = 1.0, value: float = 0.0, more: int = 0) -> BoundedSum:
        size = self.size + more
        parts = [clip_to(torch.full((size,), value), clip_norm, UnitId(unit)) for unit in units]
        return BoundedSum.collect(parts, size=size, clip_norm=clip_norm)

    def step(self, total: BoundedSum | None = None, charged: DpEvent | None = None, *, ledger_round: int | None = None):
        number = self.state.round + 1
        charged = charged or (self.mechanism.event if number == 1 else FREE)
        total = self.sum() if total is None else total
        key = SecureRandom.from_os() if self.keys is None else SecureRandom.insecure_from(self.keys).derive(number)
        permit = self.ledger.reserve(charged, round=ledger_round or number, purpose="training", commitment=key.commitment)
        released, self.state = self.mechanism.release(total, self.state, charged=charged, permit=permit, rng=key)
        self.ledger.commit(permit.serial)
        return released


# --- sensitivity ---------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0.0, 1.0), min_size=0, max_size=7),
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(1, 8),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_sensitivity_is_the_worst_over_all_patterns_of_participation(
    rest: list[float], n: int, separation: int, maximum: int, ordered: bool
):
    bands = np.array([1.0, *(sorted(rest, reverse=True) if ordered else [1.0 - 2.0 * c for c in rest][: separation - 1])])
    column, participation = np.pad(bands, (0, n))[:n], Participation(separation, maximum)
    C, worst = dense(column, n), 0.0
    for times in range(1, min(maximum, n) + 1):
        for rounds in itertools.combinations(range(n), times):
            if all(b - a >= separation for a, b in itertools.pairwise(rounds)):
                for signs in itertools.product((1.0, -1.0), repeat=times):  # corners; the norm is convex
                    worst = max(worst, float(np.linalg.norm(C[:, rounds] @ np.array(signs))))
    assert sensitivity(column, participation) == pytest.approx(worst, rel=1e-12)


@given(st.integers(2, 7), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_contributions_of_many_coordinates_do_no_more(n: int, seed: int):
    column, participation = 1.0 / np.sqrt(np.arange(1, n + 1)), Participation(1, n)
    directions = np.random.default_rng(seed).normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert np.linalg.norm(dense(column, n) @ directions) <= sensitivity(column, participation) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("separation", "maximum", "squared"),
    # jax-privacy 2.0.0: toeplitz.minsep_sensitivity_squared(toeplitz.optimal_max_error_strategy_coefs(64), b, k, 64)
    [
        (1, 1, 2.388848108295435),
        (8, 8, 50.15585143397344),
        (8, 3, 12.936953309984117),
        (10, 7, 36.16083907518389),
        (1, 4, 28.93236571827363),
        (1, 64, 2628.165865876903),
    ],
)
def test_sensitivity_of_full_matrices_agrees_with_a_second_implementation(separation: int, maximum: int, squared: float):
    k = np.arange(1, 64)
    column = np.cumprod(np.append(1.0, (2 * k - 1) / (2 * k)))
    assert sensitivity(column, Participation(separation, maximum)) ** 2 == pytest.approx(squared, rel=1e-12)


def test_where_no_sensitivity_is_known_there_is_no_mechanism():
    for weights in ((0.5, 0.6), (0.5, -0.1)):
        with pytest.raises(IncompatiblePlan, match="never increase"):
            a_mechanism(correlation=Correlation(weights), participation=Participation(2, 2))
        a_mechanism(correlation=Correlation(weights), participation=Participation(3, 2))
    growing = Correlation((0.6, 0.6), (0.9, 0.9))  # c_1 = 1.2
    with pytest.raises(IncompatiblePlan, match="never increase"):
        a_mechanism(correlation=growing)
    a_mechanism(correlation=growing, participation=Participation(6, 1))


@given(st.lists(st.floats(-0.9, 0.9), min_size=1, max_size=12))
@settings(deadline=None, max_examples=50)
def test_the_inverse_is_the_inverse(rest: list[float]):
    column = np.array([1.0, *rest])
    assert dense(column, len(column)) @ inverse(column) == pytest.approx(np.eye(1, len(column))[0], abs=1e-9)


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [THREE_BANDS, BUFFERS])
def test_streamed_noise_is_the_dense_product_and_c_times_it_is_the_uncorrelated_noise(tmp_path: Path, correlation: Correlation):
    # Loud noise, so that rounding to the lattice is small beside it; the same stream gives round(N) for offset 0.
    mechanism = a_mechanism(correlation=correlation, noise_multiplier=2000.0, rounds=5, participation=Participation(5, 1))
    run = Run(tmp_path, mechanism, 40, keys=7)
    noise = np.stack([run.step().value.numpy() for _ in range(5)])
    std = mechanism.noise_std(1)
    lattice = 2.0**-22
    z = np.stack(
        [
            SecureRandom.insecure_from(7).derive(t).derive("noise").rounded_gaussian(std / lattice, 40) * lattice
            for t in range(1, 6)
        ]
    )
    C = dense(correlation.column(5), 5)
    assert np.abs(noise - np.linalg.solve(C, z)).max() <= 1e-9 * std
    assert np.abs(C @ noise - z).max() <= 1e-9 * std


@pytest.mark.parametrize("correlation", [Correlation(()), THREE_BANDS, Correlation((-0.75,)), BUFFERS])
def test_variance_in_every_round_and_of_the_sum_is_the_closed_form(tmp_path: Path, correlation: Correlation):
    size, mechanism, bands = 4000, a_mechanism(correlation=correlation), correlation.column(6)
    run = Run(tmp_path, mechanism, size)
    releases = [run.step() for _ in range(6)]
    noise = np.stack([released.value.numpy() for released in releases])
    inverted = np.linalg.inv(dense(bands, 6))
    together = bands + np.pad(bands[:3], (3, 0))  # of a unit in rounds 1 and 4
    scale = 2.0 * max(np.linalg.norm(together), np.sqrt(2.0) * np.linalg.norm(bands[:3]))  # z |C u|
    pairs = [(row, scale * np.linalg.norm(inverted[t])) for t, row in enumerate(noise)]
    for released, (_, std) in zip(releases, pairs, strict=True):
        assert std < released.noise_std < std * (1 + 2.0**-11)
    for row, std in [*pairs, (noise.sum(axis=0), scale * np.linalg.norm(inverted.sum(axis=0)))]:
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], size)  # seven such tests
        assert low < np.square(row / std).sum() < high
    whitened = dense(bands, 6) @ noise / scale
    assert stats.kstest(whitened.ravel(), "norm").pvalue > ALPHA
    for a, b in itertools.combinations(whitened, 2):
        assert stats.pearsonr(a, b).pvalue > ALPHA  # fifteen such tests


@pytest.mark.parametrize(
    "correlation", [Correlation(tuple(1.0 / np.sqrt(np.arange(2, 33)))), Correlation((0.3, 0.15, 0.05), (0.9999, 0.97, 0.5))]
)
def test_what_float64_makes_of_the_memory_is_within_the_bound_that_the_noise_covers(correlation: Correlation):
    rounds, size, sigma = 200, 3, 2**28
    weights, decays = [Fraction(w) for w in correlation.weights], [Fraction(d) for d in correlation.decays]
    generator, memory = np.random.default_rng(1), torch.zeros(len(weights), size, dtype=torch.float64)
    exact, largest, error = [[Fraction(0)] * size for _ in weights], Fraction(0), Fraction(0)
    for noise in np.rint(generator.normal(0.0, sigma, (rounds, size))).astype(int).tolist():
        memory = correlation.remember(memory, torch.tensor(noise, dtype=torch.float64))
        if decays:
            exact = [[d * x + n for x, n in zip(row, noise, strict=True)] for d, row in zip(decays, exact, strict=True)]
        else:
            exact = [[Fraction(n) for n in noise], *exact[:-1]]
        computed = correlation.predict(memory).tolist()
        for i in range(size):
            largest = max(largest, *(abs(row[i]) for row in exact))
            true = sum((w * row[i] for w, row in zip(weights, exact, strict=True)), Fraction(0))
            error = max(error, abs(Fraction(computed[i]) - true))
    bound = Fraction(2) ** -51 * (rounds + len(weights)) * largest * sum(abs(w) for w in weights)
    assert 0 < error <= bound


def test_noise_too_loud_or_too_long_for_float64_is_refused():
    with pytest.raises(IncompatiblePlan, match="float64 cannot carry"):
        a_mechanism(noise_multiplier=1e6)
    for correlation in (THREE_BANDS, BUFFERS):
        a_mechanism(correlation=correlation).start(1000)
    loud = a_mechanism(correlation=BUFFERS, noise_multiplier=1e4)
    with pytest.raises(IncompatiblePlan, match="float64 cannot carry"):
        loud._require_precision(10**12)


def test_the_noise_does_not_depend_on_the_data_and_sums_come_through(tmp_path: Path):
    silent, loud = Run(tmp_path / "a", a_mechanism(), keys=3), Run(tmp_path / "b", a_mechanism(), keys=3)
    for number in range(1, 7):
        total = loud.sum(units=[f"{number % 3}"], value=0.5)
        assert torch.equal(loud.step(total).value - silent.step().value, torch.full((4,), 0.5, dtype=torch.float64))


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()


@pytest.mark.parametrize("correlation", [THREE_BANDS, BUFFERS])
def test_a_run_resumed_from_its_saved_state_draws_the_same_noise(tmp_path: Path, correlation: Correlation):
    mechanism = a_mechanism(correlation=correlation)
    whole, broken = Run(tmp_path / "a", mechanism, keys=5), Run(tmp_path / "b", mechanism, keys=5)
    for number in range(1, 7):
        units = [f"{number % 3}"]
        expected = whole.step(whole.sum(units=units)).value
        broken.state = broken.mechanism.restore(load(save(broken.state.tensors())))
        assert torch.equal(broken.step(broken.sum(units=units)).value, expected)
    assert broken.state.participation == whole.state.participation


def test_the_state_does_not_grow_with_rounds_and_does_not_print_itself(tmp_path: Path):
    run = Run(tmp_path, a_mechanism(rounds=40, participation=Participation(3, 14), noise_multiplier=10.0), size=1)
    sizes = set()
    for number in range(1, 41):
        run.step(run.sum(units=[f"{number % 3}"]))
        sizes.add(tuple(run.state.memory.shape))
    assert sizes == {(2, 1)}
    assert len(run.state.participation.taken) == 3
    assert str(run.state.memory[0, 0].item()) not in repr(run.state)


def test_a_state_of_other_bands_is_refused():
    state = a_mechanism().start(4)
    with pytest.raises(PrivacyError, match="2 rows"):
        a_mechanism(correlation=Correlation(())).restore(state.tensors())
    with pytest.raises(PrivacyError, match="after round 9"):
        a_mechanism().restore(replace(state, round=9).tensors())


# --- charges and refusals ------------------------------------------------------------------------


def test_a_run_is_charged_in_full_with_its_first_round_and_never_again(tmp_path: Path):
    run = Run(tmp_path, a_mechanism())
    run.step()
    once = Composition()
    once.add(GaussianDpEvent(2.0))
    assert run.ledger.spent().epsilon == once.epsilon(1e-5)
    for _ in range(5):
        run.step()
    assert Ledger.read(run.path).spent().epsilon == once.epsilon(1e-5)
    with pytest.raises(PrivacyError, match="round 7"):
        run.step()


def test_one_participation_in_a_tree_sized_run_costs_its_exact_gaussian():
    # Tree aggregation of 1024 steps: sensitivity sqrt(11), z = 10.
    composition = Composition()
    composition.add(GaussianDpEvent(10.0 / np.sqrt(11.0)))
    assert composition.epsilon(1e-5) == pytest.approx(1.26406, abs=1e-3)


def test_a_round_begun_under_a_lost_key_is_not_repeated_for_nothing(tmp_path: Path):
    run = Run(tmp_path, a_mechanism())
    run.step()
    lost, fresh = SecureRandom.from_os(), SecureRandom.from_os()
    run.ledger.reserve(FREE, round=2, purpose="training", commitment=lost.commitment)
    run.ledger.reserve(FREE, round=2, purpose="training", commitment=lost.commitment)  # the same release again
    with pytest.raises(PrivacyError, match="charge the whole run again"):
        run.ledger.reserve(FREE, round=2, purpose="training", commitment=fresh.commitment)
    before = run.ledger.spent().epsilon
    run.step(charged=run.mechanism.event)
    assert run.ledger.spent().epsilon > before


def test_a_run_that_does_not_fit_the_budget_does_not_begin(tmp_path: Path):
    run = Run(tmp_path, a_mechanism())
    run.ledger = Ledger.open(tmp_path / "small.sqlite", budget=Budget(0.5, 1e-5), owner="t")
    with pytest.raises(BudgetExhausted):
        run.step()


def later(run: Run) -> Run:
    run.step(run.sum(units=["a"]))
    return run


REFUSED = {
    "a first round for nothing": (PermitMismatch, lambda r: r.step(charged=FREE)),
    "less noise than charged": (PermitMismatch, lambda r: r.step(charged=GaussianDpEvent(3.0))),
    "a run charged as one sampled release": (
        PermitMismatch,
        lambda r: r.step(charged=PoissonSampledDpEvent(0.1, r.mechanism.event)),
    ),
    "a round of the ledger that is not the state's": (PermitMismatch, lambda r: later(r).step(ledger_round=3)),
    "an old state": (PrivacyError, lambda r: (later(r), setattr(r, "state", r.mechanism.start(4)), r.step())),
    "another clip norm": (PrivacyError, lambda r: r.step(r.sum(clip_norm=2.0))),
    "another size": (PrivacyError, lambda r: r.step(r.sum(more=1))),
    "a unit too soon": (ParticipationExceeded, lambda r: later(r).step(r.sum(units=["b", "a"]))),
}


@pytest.mark.parametrize("name", REFUSED)
def test_this_release_is_refused(name: str, tmp_path: Path):
    error, attempt = REFUSED[name]
    with pytest.raises(error):
        attempt(Run(tmp_path, a_mechanism()))


def test_a_permit_buys_one_release_and_is_kept_when_a_unit_may_not_take_part(tmp_path: Path):
    run = later(Run(tmp_path, a_mechanism()))
    key = SecureRandom.from_os()
    permit = run.ledger.reserve(FREE, round=2, purpose="training", commitment=key.commitment)

    def release(total: BoundedSum) -> NoiseState:
        return run.mechanism.release(total, run.state, charged=FREE, permit=permit, rng=key)[1]

    with pytest.raises(ParticipationExceeded, match=r"unit 'a' took part 1 times, last in round 1"):
        release(run.sum(units=["a"]))
    assert release(run.sum(units=["b"])).round == 2
    with pytest.raises(PermitSpent):
        release(run.sum(units=["b"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"rounds": 0},
        {"rounds": 2},
    ],
)
def test_impossible_mechanisms_are_refused(changes: dict[str, object]):
    with pytest.raises(IncompatiblePlan):
        a_mechanism(**changes)


@pytest.mark.parametrize(
    ("weights", "decays"),
    [((math.inf,), ()), ((math.nan,), (0.5,)), ((0.5, 0.2), (0.5,)), ((0.5,), (1.0,)), ((0.5,), (-0.1,)), ((0.5,), (math.nan,))],
)
def test_impossible_correlations_are_refused(weights: tuple[float, ...], decays: tuple[float, ...]):
    with pytest.raises(IncompatiblePlan):
        Correlation(weights, decays)


def test_columns_are_bands_or_sums_of_decaying_ones():
    assert THREE_BANDS.column(5).tolist() == [1.0, 0.5, 0.25, 0.0, 0.0]
    assert THREE_BANDS.column(2).tolist() == [1.0, 0.5]
    assert BUFFERS.column(4) == pytest.approx([1.0, 0.5, 0.3 * 0.9 + 0.2 * 0.5, 0.3 * 0.81 + 0.2 * 0.25])


# --- participation -------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), max_size=25))
@settings(deadline=None)
def test_whatever_is_admitted_stays_within_the_limit(separation: int, maximum: int, steps: list[tuple[int, int]]):
    record, history, number = Participation(separation, maximum), {}, 0
    for ahead, who in steps:
        number, unit = number + ahead, UnitId(str(who))
        before = history.get(unit, [])
        fits = len(before) < maximum and (not before or number - before[-1] >= separation)
        assert record.allows(unit, number) == fits
        if fits:
            record = record.admit([unit], number)
            history[unit] = [*before, number]
        else:
            with pytest.raises(ParticipationExceeded):
                record.admit([unit], number)
    assert record.taken == {unit: (rounds[-1], len(rounds)) for unit, rounds in history.items()}
    assert record.times(10) == min(maximum, -(-10 // separation))


def test_participation_below_one_is_refused():
    for separation, maximum in ((0, 1), (1, 0)):
        with pytest.raises(IncompatiblePlan, match="at least 1"):
            Participation(separation, maximum)


# --- turns of groups -----------------------------------------------------------------------------


def test_amplified_bands_cost_what_sampled_rounds_without_correlation_do():
    # arXiv 2306.08153, Theorem 4: T = 1000, b = 10, q = 0.1 and z = 1 in a turn is DP-SGD with q = 0.1, T = 100.
    sampler = CyclicPoissonSampler(10, 0.1)
    mechanism = a_mechanism(noise_multiplier=0.1, rounds=1000, participation=sampler.participation(1000))
    composition = Composition()
    composition.add(sampler.amplify(mechanism))
    assert composition.epsilon(1e-5) == pytest.approx(7.0466, abs=2e-3)
    assert mechanism.noise_std(1) == pytest.approx(np.linalg.norm((1.0, 0.5, 0.25)), rel=2.0**-11)  # z = 1 of one column


def test_turns_without_coins_cost_the_run_as_a_whole():
    sampler = CyclicPoissonSampler(3, 1.0)
    mechanism = a_mechanism(participation=sampler.participation(6))
    turns, whole = Composition(), Composition()
    turns.add(sampler.amplify(mechanism))
    whole.add(mechanism.event)
    assert turns.epsilon(1e-5) == pytest.approx(whole.epsilon(1e-5), rel=1e-3)


def test_amplification_needs_turns_of_the_same_length_and_no_more_bands(tmp_path: Path):
    with pytest.raises(IncompatiblePlan, match="not that of"):
        CyclicPoissonSampler(4, 0.1).amplify(a_mechanism())
    overlapping = CyclicPoissonSampler(2, 0.1)
    with pytest.raises(IncompatiblePlan, match="3 bands"):
        overlapping.amplify(a_mechanism(participation=overlapping.participation(6)))
    sampler = CyclicPoissonSampler(3, 0.5)
    run = Run(tmp_path, a_mechanism(participation=sampler.participation(6)))
    with pytest.raises(PermitMismatch):
        run.step(charged=sampler.amplify(replace(run.mechanism, noise_multiplier=4.0)))
    run = Run(tmp_path / "a", run.mechanism)
    assert run.step(charged=sampler.amplify(run.mechanism)).noise_std == run.mechanism.noise_std(1)
    run.step()


def test_units_take_part_in_their_own_turn_only_by_coins():
    sampler, units = CyclicPoissonSampler(4, 0.5), [7 * i for i in range(20_000)]
    record, seen = sampler.participation(12), 0
    for number in range(1, 13):
        cohort = sampler.draw(units, SecureRandom.from_os(), number=number)
        record = record.admit([UnitId(str(i)) for i in cohort], number)  # never too soon
        assert {units[i] % 4 for i in cohort} == {(number - 1) % 4}
        seen += len(cohort)
    assert stats.binomtest(seen, 60_000, 0.5).pvalue > ALPHA


@given(st.sets(st.integers(0, 200)), st.integers(1, 9), st.integers(1, 30))
def test_without_coins_a_turn_is_a_function_of_the_unit_and_the_round_alone(units: set[int], groups: int, number: int):
    sampler, ordered = CyclicPoissonSampler(groups, 1.0), sorted(units)
    everyone = sampler.draw(range(201), SecureRandom.from_os(), number=number)
    some = sampler.draw(ordered, SecureRandom.from_os(), number=number)
    assert [ordered[i] for i in some] == [i for i in everyone.tolist() if i in units]
