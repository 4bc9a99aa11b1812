"""What robust rules take in, and how they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dp_federated_lora.aggregation import FEDAVG, FFA
from dp_federated_lora.aggregation.robust import BEFORE, RULES, RobustAggregator, Updates
from dp_federated_lora.errors import AggregationError, IncompatiblePlan
from dp_federated_lora.privacy import Released, SecureRandom

ZEROS = torch.zeros(6, dtype=torch.float64)
PARAMETERS = {
    "centered_clipping": {"tau": 2.0},
    "dnc": {"rng": SecureRandom.insecure_from(1), "passes": 1},
    "fltrust": {"root": torch.ones(6, dtype=torch.float64)},
    "bucketing": {"bucket": 1, "rng": SecureRandom.insecure_from(1)},
    "clip": {"bound": 1.0},
}


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def collected(*values: torch.Tensor) -> Updates:
    updates = Updates(FFA, ZEROS, len(values))
    for value in values:
        updates.add(Released(value, 1.0, insecure=True))
    return updates


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("before", [(), *((name,) for name in sorted(BEFORE))])
def test_two_senders_of_nan_among_ten_change_nothing(rule: str, before: tuple[str, ...]):
    honest = rows(8)
    parameters = {key: value for stage in (rule, *before) for key, value in PARAMETERS.get(stage, {}).items()}
    rule_alone = RobustAggregator(rule=rule, f=0, before=before, parameters=parameters)
    with_bad = RobustAggregator(rule=rule, f=2, before=before, parameters=parameters)
    nan, infinite = honest[0].clone(), honest[1].clone()
    nan[3], infinite[0] = math.nan, -math.inf
    updates = collected(nan, *honest[:4], infinite, *honest[4:])
    assert (updates.non_finite, len(updates)) == (2, 8)
    if "rng" in parameters:  # the stream moves on between the two calls
        assert torch.isfinite(with_bad(updates)).all()
    else:
        assert torch.equal(with_bad(updates), rule_alone(collected(*honest)))


def test_lengths_whose_squares_overflow_count_as_not_finite():
    updates = collected(*rows(3), torch.full((6,), 1e30, dtype=torch.float64))
    assert (updates.non_finite, len(updates)) == (1, 3)


def test_an_exact_copy_is_one_update_and_counts_as_a_bad_sender():
    honest = rows(5)
    updates = collected(*honest, honest[2], honest[2])
    assert (updates.duplicates, len(updates)) == (2, 5)
    assert torch.equal(RobustAggregator(rule="krum", f=2)(updates), RobustAggregator(rule="krum", f=0)(collected(*honest)))


@pytest.mark.parametrize("value", [torch.zeros(5), torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64), torch.tensor(0.0)])
def test_another_shape_or_kind_of_number_is_refused_and_the_round_goes_on(value: torch.Tensor):
    updates = Updates(FFA, ZEROS, 2)
    with pytest.raises(AggregationError, match=r"shape \(6,\)"):
        updates.add(Released(value, 1.0, insecure=True))
    updates.add(Released(rows(1)[0], 1.0, insecure=True))
    assert torch.allclose(RobustAggregator(rule="median", f=0)(updates), rows(1)[0])


def test_more_updates_than_a_round_can_have_are_refused():
    updates = collected(*rows(3))
    with pytest.raises(AggregationError, match="room for 3"):
        updates.add(Released(rows(1)[0], 1.0, insecure=True))


def test_a_method_that_sends_both_factors_has_no_distances_to_compare():
    with pytest.raises(IncompatiblePlan, match=r"'fedavg' sends both factors: \(c B, A / c\) is the same adapter"):
        Updates(FEDAVG, ZEROS, 3)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_refuses_the_first_f_beyond_its_condition_by_name(rule: str):
    updates = collected(*rows(11))
    most = RULES[rule].most(11)
    parameters = PARAMETERS.get(rule, {})
    assert torch.isfinite(RobustAggregator(rule=rule, f=most, parameters=parameters)(updates)).all()
    with pytest.raises(AggregationError, match=f"{rule} needs .* f = {most + 1} of n = 11 .* at most {most}"):
        RobustAggregator(rule=rule, f=most + 1, parameters=parameters)(updates)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_update_at_all_is_an_error_and_not_a_zero(rule: str):
    with pytest.raises(AggregationError, match="n = 0"):
        RobustAggregator(rule=rule, f=0, parameters=PARAMETERS.get(rule, {}))(Updates(FFA, ZEROS, 3))


def test_buckets_leave_fewer_points_than_there_were_updates():
    aggregator = RobustAggregator(
        rule="median", f=2, before=("bucketing",), parameters={"bucket": 3, "rng": SecureRandom.insecure_from(1)}
    )
    with pytest.raises(AggregationError, match="median needs 2 f < n, but f = 2 of n = 4"):
        aggregator(collected(*rows(11)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "Krum"}, "no rule called 'Krum'; choose from mean, median"),
        ({"rule": "krum", "before": ("mean",)}, "no stage before a rule called 'mean'; choose from nnm"),
        ({"rule": "trimmed_mean", "parameters": {"F": 1}}, r"takes the parameters \[\], got \['F'\]; leave the others out"),
        ({"rule": "centered_clipping"}, "'tau' has no default"),
        ({"rule": "centered_clipping", "parameters": {"tau": 0.0}}, "tau must be positive and finite, got 0.0"),
        ({"rule": "krum", "before": ("clip",), "parameters": {"bound": math.nan}}, "bound must be positive and finite"),
        ({"rule": "krum", "f": -1}, "got -1; give 0 or more"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_any_round(arguments: dict[str, object], message: str):
    with pytest.raises(AggregationError, match=message):
        RobustAggregator(**{"f": 1} | arguments)


def test_searches_over_all_subsets_are_refused_where_they_would_not_end():
    updates = collected(*rows(60))
    with pytest.raises(AggregationError, match="smea needs .* 50,000 subsets .* f = 10 of n = 60 .* f of at most 3, "):
        RobustAggregator(rule="smea", f=10)(updates)


def test_passes_that_leave_nobody_are_an_error():
    rng = SecureRandom.insecure_from(1)
    with pytest.raises(AggregationError, match="dnc dropped all 5"):
        RobustAggregator(rule="dnc", f=2, parameters={"rng": rng, "passes": 200, "coordinates": 1})(
            collected(*torch.eye(5, 6).double())
        )


def test_inner_products_grown_on_arrival_are_those_of_the_whole():
    values = torch.randn(12, 20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    updates = Updates(FFA, values[0], 12)
    for value in values[1:]:
        updates.add(Released(value, 1.0, insecure=True))
    expected = torch.cdist(values[1:], values[1:]).square().numpy()
    assert np.allclose(updates.points().squares, expected, rtol=1e-5)
    assert np.allclose(
        updates.points().distances_to(np.zeros(11)), torch.linalg.vector_norm(values[1:] - values[0], dim=1), rtol=1e-5
    )
