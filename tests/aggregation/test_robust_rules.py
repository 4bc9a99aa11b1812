"""Rules against closed forms, a second implementation, and the definition of robustness."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dp_federated_lora.aggregation import FFA
from dp_federated_lora.aggregation.robust import RULES, RobustAggregator, Updates
from dp_federated_lora.privacy import Released, SecureRandom
from peers import byzfl

ROWS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
LOW, MIDDLE = [2.5, 3.5, 4.5], [4.0, 5.0, 6.0]
# Parameters for rules that need some, and f for those that bear none.
PARAMETERS = {
    "centered_clipping": {"tau": 2.0, "steps": 3},
    "dnc": {"rng": SecureRandom.insecure_from(1), "passes": 1},
    "fltrust": {"root": torch.ones(6, dtype=torch.float64)},
}
DISTANCE_RULES = ["krum", "multi_krum", "mda", "smea", "caf", "geometric_median"]


def collected(rows: Tensor, reference: Tensor | None = None) -> Updates:
    start = torch.zeros(rows.shape[1], dtype=torch.float64) if reference is None else reference
    updates = Updates(FFA, start, len(rows))
    for row in rows:
        updates.add(Released(row, 1.0, insecure=True))
    return updates


def aggregate(rows: Tensor, rule: str, f: int, before: Sequence[str] = (), **parameters: object) -> Tensor:
    return RobustAggregator(rule=rule, f=f, before=tuple(before), parameters=parameters)(collected(rows))


def random_rows(seed: int, n: int = 11, d: int = 6, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> bool:
    return bool(torch.linalg.vector_norm(first - second) <= tolerance * max(1.0, float(torch.linalg.vector_norm(second))))


@pytest.mark.parametrize(
    ("rule", "f", "parameters", "expected"),
    [
        ("mean", 0, {}, MIDDLE),
        ("krum", 1, {}, [1.0, 2.0, 3.0]),
        ("multi_krum", 1, {}, LOW),
        ("median", 1, {}, MIDDLE),
        ("trimmed_mean", 1, {}, MIDDLE),
        ("meamed", 1, {}, LOW),
        ("mda", 1, {}, LOW),
        ("smea", 1, {}, LOW),
        ("bulyan", 0, {}, MIDDLE),
        ("geometric_median", 1, {"nu": 0.1, "steps": 3}, [3.787879, 4.787879, 5.787879]),
        ("centered_clipping", 1, {"tau": 1.0}, [0.408559, 0.559564, 0.710570]),
    ],
)
def test_closed_forms(rule: str, f: int, parameters: dict[str, object], expected: list[float]):
    assert aggregate(ROWS, rule, f, **parameters).tolist() == pytest.approx(expected, abs=1e-5)


def test_nearest_neighbour_mixing_has_its_closed_form():
    mixed = RobustAggregator(rule="median", f=1, before=("nnm",))._stages()["nnm"].apply(collected(ROWS).points(), 1)
    assert mixed.columns(slice(0, 1)).flatten().tolist() == pytest.approx([2.5, 2.5, 5.5])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("rule", "name", "parameters", "theirs"),
    [
        ("median", "Median", {}, {}),
        ("trimmed_mean", "TrMean", {}, {"f": 3}),
        ("meamed", "Meamed", {}, {"f": 3}),
        ("krum", "Krum", {}, {"f": 3}),
        ("multi_krum", "MultiKrum", {}, {"f": 3}),
        ("geometric_median", "GeometricMedian", {"nu": 0.1, "steps": 3}, {"nu": 0.1, "T": 3}),
        ("centered_clipping", "CenteredClipping", {"tau": 1.5, "steps": 4}, {"tau": 1.5, "L": 4}),
    ],
)
@pytest.mark.parametrize(("before", "pre_name"), [(None, None), ("nnm", "NNM"), ("arc", "ARC")])
def test_agreement_with_byzfl(seed, rule, name, parameters, theirs, before, pre_name):
    # Both count an update among its own n - f nearest.
    rows = random_rows(seed) + 0.5
    expected = rows.numpy().copy()
    if pre_name:
        expected = getattr(byzfl("aggregators.preaggregators"), pre_name)(f=3)(expected)
    expected = getattr(byzfl("aggregators.aggregators"), name)(**theirs)(expected)
    assert close(aggregate(rows, rule, 3, [before] if before else [], **parameters), torch.from_numpy(expected))


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_diameter_agrees_with_byzfl(seed: int):
    # Without a stage before it: after nnm several sets have one diameter, and rounding decides which comes first.
    rows = random_rows(seed)
    assert close(aggregate(rows, "mda", 3), torch.from_numpy(byzfl("aggregators.aggregators").MDA(f=3)(rows.numpy())))


def test_clip_before_the_mean_is_byzfls_clipping():
    rows = random_rows(3, spread=2.0)
    expected = byzfl("aggregators.preaggregators").Clipping(c=1.5)(rows.numpy().copy()).mean(0)
    assert close(aggregate(rows, "mean", 0, ["clip"], bound=1.5), torch.from_numpy(expected))


def covariance_filter(rows: np.ndarray, f: int) -> np.ndarray:
    """CAF from its definition, with the covariance matrix in d dimensions."""
    c, best, least = np.ones(len(rows)), None, np.inf
    while c.sum() > len(rows) - 2 * f:
        mean = c @ rows / c.sum()
        gaps = rows - mean
        values, vectors = np.linalg.eigh((c[:, None] * gaps).T @ gaps / c.sum())
        if values[-1] < least:
            best, least = mean, values[-1]
        tau = (gaps @ vectors[:, -1]) ** 2
        c = c * (1 - tau / tau[c > 0].max()).clip(min=0)
    return best


@pytest.mark.parametrize("seed", range(5))
def test_spectral_rules_equal_their_definitions_in_d_dimensions(seed: int):
    rows = random_rows(seed)
    rows[:3] += 4.0

    def spread(chosen: tuple[int, ...]) -> float:
        return float(np.linalg.eigvalsh(np.cov(rows[list(chosen)].numpy().T))[-1])

    least = min(combinations(range(11), 8), key=spread)
    assert close(aggregate(rows, "smea", 3), rows[list(least)].mean(0))
    assert close(aggregate(rows, "caf", 3), torch.from_numpy(covariance_filter(rows.numpy(), 3)))


@pytest.mark.parametrize("seed", range(3))
def test_bulyan_equals_its_definition(seed: int):
    rows, f = random_rows(seed, n=12), 2
    left, chosen = list(rows), []
    for _ in range(12 - 2 * f):
        squares = torch.cdist(torch.stack(left), torch.stack(left)) ** 2
        scores = squares.sort(1).values[:, : len(left) - f].sum(1)
        chosen.append(left.pop(int(scores.argmin())))
    ordered = torch.stack(chosen).sort(0).values
    middle = (ordered[3] + ordered[4]) / 2
    nearest = (ordered - middle).abs().argsort(0)[: 12 - 4 * f]
    assert close(aggregate(rows, "bulyan", f), ordered.gather(0, nearest).mean(0))


def test_divide_and_conquer_drops_what_stands_out_in_the_direction_of_most_variance():
    rows = random_rows(1)
    rows[4:6] += 30.0
    expected = rows[[0, 1, 2, 3, 6, 7, 8, 9, 10]].mean(0)
    assert close(aggregate(rows, "dnc", 2, rng=SecureRandom.insecure_from(3), passes=1, coordinates=5), expected)


def test_trust_in_a_root_update_drops_opposite_and_shortens_long_updates():
    root = torch.tensor([3.0, 4.0], dtype=torch.float64)
    rows = torch.tensor([[6.0, 8.0], [-3.0, -4.0], [0.0, 10.0]], dtype=torch.float64)
    expected = (1.0 * root + 0.8 * torch.tensor([0.0, 5.0])) / 1.8
    assert close(aggregate(rows, "fltrust", 1, root=root), expected)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"mda"}))  # of several sets of one diameter it takes the first
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), shift=st.floats(-5, 5))
def test_neither_the_order_of_updates_nor_the_origin_matters(rule: str, seed: int, shift: float):
    rows, f = random_rows(seed), 0 if rule == "mean" else 2
    given_ = PARAMETERS.get(rule, {})
    expected = aggregate(rows, rule, f, **given_)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
    moved = RobustAggregator(rule=rule, f=f, parameters=given_)(
        collected(rows[order] + shift, torch.full((6,), shift, dtype=torch.float64))
    )
    assert close(moved, expected + shift, tolerance=1e-4)


@pytest.mark.parametrize("rule", ["trimmed_mean", "meamed", "multi_krum", "mda", "smea", "caf", "bulyan", "dnc"])
def test_where_nobody_is_bad_the_result_is_the_mean(rule: str):
    rows = random_rows(9)
    assert close(aggregate(rows, rule, 0, **PARAMETERS.get(rule, {})), rows.mean(0))


KAPPA = {
    "trimmed_mean": lambda q: 6 * q * (1 + q),
    "krum": lambda q: 6 * (1 + q),
    "median": lambda q: 4 * (1 + q) ** 2,
    "geometric_median": lambda q: 4 * (1 + q) ** 2,
}


@pytest.mark.parametrize("rule", sorted(KAPPA))
@pytest.mark.parametrize("before", [(), ("nnm",)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), far=st.sampled_from([0.0, 1.0, 3.0, 30.0, 1e4]))
def test_the_result_is_near_the_mean_of_any_n_minus_f_compared_with_their_variance(rule, before, seed, far):
    # (f, kappa)-robustness (Allouah et al. 2023, arXiv 2302.01772); the constants are those usually quoted from there.
    n, f = 11, 3
    rows = random_rows(seed)
    rows[:f] = rows[:f] * 0.1 + far
    result = aggregate(rows, rule, f, before, **({"steps": 200} if rule == "geometric_median" else {}))
    q = f / (n - 2 * f)
    kappa = KAPPA[rule](q)
    if before:
        kappa = 8 * f / (n - f) * (kappa + 1)
    for chosen in combinations(range(n), n - f):
        honest = rows[list(chosen)]
        variance = ((honest - honest.mean(0)) ** 2).sum(1).mean()
        assert ((result - honest.mean(0)) ** 2).sum() <= kappa * variance * (1 + 1e-4)


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"mean"}))
@pytest.mark.parametrize("before", [(), ("nnm",), ("arc",)])
def test_updates_a_million_away_move_the_result_by_less_than_the_honest_diameter(rule: str, before: tuple[str, ...]):
    rows = random_rows(5)
    honest = rows[2:]
    rows[:2] = torch.tensor([1e6, -1e6])[:, None]
    result = aggregate(rows, rule, 2, before, **PARAMETERS.get(rule, {}))
    assert torch.linalg.vector_norm(result - honest.mean(0)) < torch.cdist(honest, honest).max()


@pytest.mark.parametrize("rule", DISTANCE_RULES)
@pytest.mark.parametrize("shift", [1e3, 1e5])
def test_updates_close_to_each_other_and_far_from_the_reference_keep_their_distances(rule: str, shift: float):
    rows = random_rows(7, n=9, d=3000) * torch.linspace(0.5, 2, 9, dtype=torch.float64)[:, None]
    near, far = aggregate(rows, rule, 2), aggregate(rows + shift, rule, 2) - shift
    # float32 holds a value near `shift` to 4e-8 of it; what is chosen does not change.
    assert torch.allclose(near, far, atol=2e-7 * shift)


def test_a_bucket_of_one_changes_nothing_and_a_bucket_of_all_is_the_mean():
    rows = random_rows(2)
    rng = SecureRandom.insecure_from(1)
    assert close(aggregate(rows, "median", 2, ["bucketing"], bucket=1, rng=rng), aggregate(rows, "median", 2))
    assert close(aggregate(rows, "median", 0, ["bucketing"], bucket=11, rng=rng), rows.mean(0))


def test_buckets_are_means_of_disjoint_groups():
    rows = random_rows(2, n=7)
    points = RobustAggregator(rule="median", f=0, before=("bucketing",), parameters={"bucket": 3, "rng": None})
    mixed = points._stages()["bucketing"].apply(collected(rows).points(), 0, bucket=3, rng=SecureRandom.insecure_from(4))
    sizes = torch.tensor([3.0, 3.0, 1.0])
    assert mixed.count == 3
    assert torch.allclose(sizes @ mixed.columns(slice(None)), rows.sum(0).float(), atol=1e-5)
