"""Attacks against closed forms, ByzFL, and what they claim about themselves."""

from __future__ import annotations

import math

import pytest
import torch

from dp_federated_lora.aggregation import FFA
from dp_federated_lora.aggregation.robust import RobustAggregator, Updates
from dp_federated_lora.audit import byzantine
from dp_federated_lora.data import Examples
from dp_federated_lora.errors import AuditError
from dp_federated_lora.privacy import Released
from peers import byzfl

ROWS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
DIRECTIONS = ["mean", "sign", "std"]


def honest_rows(seed: int, h: int = 12, d: int = 30) -> torch.Tensor:
    return torch.randn(h, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (byzantine.sign_flip(ROWS, 2), [-4.0, -5.0, -6.0]),
        (byzantine.inner_product(ROWS, 2), [-8.0, -10.0, -12.0]),
        (byzantine.alie(ROWS, 2, z=1.5), [8.5, 9.5, 10.5]),
        (byzantine.scaling(ROWS, 2, factor=10.0), [40.0, 50.0, 60.0]),
        (byzantine.mimic(ROWS, 2, target=1), [4.0, 5.0, 6.0]),
        (byzantine.free_rider(ROWS, 2), [0.0, 0.0, 0.0]),
    ],
)
def test_closed_forms(bad: torch.Tensor, expected: list[float]):
    assert bad.tolist() == [pytest.approx(expected)] * 2


@pytest.mark.parametrize(("n", "f", "z"), [(10, 2, 0.0), (20, 4, 0.1573), (50, 12, 0.3360), (100, 24, 0.3711)])
def test_the_strength_of_a_little_is_enough_follows_from_n_and_f(n: int, f: int, z: float):
    honest = honest_rows(1, n - f)
    found = (byzantine.alie(honest, f) - honest.mean(0)) / honest.std(0)
    assert torch.allclose(found, torch.tensor(z, dtype=torch.float64), atol=5e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_min_max_and_min_sum_go_as_far_as_they_may_and_no_further(direction, scale: float, seed: int):
    honest = scale * honest_rows(seed)
    squares = torch.cdist(honest, honest) ** 2

    def hidden(bad: torch.Tensor) -> tuple[bool, bool]:
        found = ((bad - honest) ** 2).sum(1)
        return bool(found.max() <= squares.max()), bool(found.sum() <= squares.sum(1).max())

    mean = honest.mean(0)
    for which, attack in enumerate((byzantine.min_max, byzantine.min_sum)):
        bad = attack(honest, 1, direction=direction)[0]
        assert hidden(mean + (1 - 1e-6) * (bad - mean))[which]
        assert not hidden(mean + (1 + 1e-6) * (bad - mean))[which]


@pytest.mark.parametrize("attack", [byzantine.min_max, byzantine.min_sum])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_honest_updates_that_are_all_zero_leave_nothing_to_move_along(attack, direction):
    assert torch.equal(
        attack(torch.zeros(4, 3, dtype=torch.float64), 2, direction=direction), torch.zeros(2, 3, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("name", "ours", "search"),
    [
        ("SignFlipping", byzantine.sign_flip, None),
        ("InnerProductManipulation", byzantine.inner_product, None),
        ("ALittleIsEnough", lambda honest, f: byzantine.alie(honest, f, z=1.5), None),
        ("Mimic", byzantine.mimic, None),
        ("Optimal_ALittleIsEnough", None, lambda honest, f: lambda z: byzantine.alie(honest, f, z=z)),
        ("Optimal_InnerProductManipulation", None, lambda honest, f: lambda tau: byzantine.inner_product(honest, f, tau=tau)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_byzfl(name, ours, search, seed: int):
    honest, f = honest_rows(seed), 3
    theirs = getattr(byzfl("attacks.attacks"), name)
    if search is None:
        expected, bad = theirs()(honest.numpy()), ours(honest, f)
    else:
        rule = byzfl("aggregators.aggregators").TrMean(f=f)
        expected = theirs(agg=rule, pre_agg_list=[], f=f)(honest.numpy())
        bad = byzantine.optimised(search(honest, f), honest, lambda every: torch.from_numpy(rule(every.numpy())))
    assert torch.allclose(bad, torch.from_numpy(expected).expand(f, -1), atol=1e-5)


def test_a_searched_strength_does_more_damage_than_the_strengths_it_tried():
    honest, f = honest_rows(4), 3

    def aggregate(every: torch.Tensor) -> torch.Tensor:
        updates = Updates(FFA, torch.zeros(30, dtype=torch.float64), len(every))
        for row in every:
            updates.add(Released(row, 1.0, insecure=True))
        return RobustAggregator(rule="multi_krum", f=f)(updates)

    def damage(bad: torch.Tensor) -> float:
        return float(torch.linalg.vector_norm(aggregate(torch.cat([honest, bad])) - honest.mean(0)))

    best = byzantine.optimised(lambda z: byzantine.alie(honest, f, z=z), honest, aggregate)
    assert damage(best) >= max(damage(byzantine.alie(honest, f, z=z)) for z in (0.0, 10.0))


def test_updates_that_are_not_finite_are_both_kinds():
    bad = byzantine.not_finite(ROWS, 3)
    assert bad[:, 0].isnan().tolist() == [True, False, True]
    assert bad[:, 0].isinf().tolist() == [False, True, False]
    assert bad[:, 1:].isfinite().all()


def test_the_gauge_attack_moves_the_factors_anywhere_and_the_adapter_nowhere():
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(4, 9, generator=generator), torch.randn(7, 4, generator=generator)
    head = torch.randn(2, 7, generator=generator)
    moved = byzantine.gauge({"block.lora_A.weight": A, "block.lora_B.weight": B, "head.weight": head}, 1000.0)
    b, a = moved["block.lora_B.weight"], moved["block.lora_A.weight"]
    assert torch.allclose(b @ a, B @ A, atol=1e-4)
    assert torch.equal(moved["head.weight"], head)
    assert torch.linalg.vector_norm(b - B) > 900 * torch.linalg.vector_norm(B)
    # An average of factors takes the lie for a change of the adapter, though every sender has the same one.
    assert torch.linalg.vector_norm((B + b) / 2 @ ((A + a) / 2) - B @ A) > 100 * torch.linalg.vector_norm(B @ A)


def test_flipped_labels_and_backdoors_change_what_they_say_and_keep_the_units():
    examples = Examples(((1, 5, 6, 7, 8), (1, 9)), (0, 3), (4, 2))
    flipped = byzantine.label_flip(examples, labels=4)
    assert (flipped.tokens, flipped.labels, flipped.units) == (examples.tokens, (3, 0), (4, 2))
    marked = byzantine.backdoor(examples, trigger=(20, 21), target=2)
    assert (marked.tokens, marked.labels, marked.units) == (((1, 20, 21, 7, 8), (1, 20, 21)), (2, 2), (4, 2))


@pytest.mark.parametrize(
    "attack", [lambda e: byzantine.label_flip(e, 4), lambda e: byzantine.backdoor(e, trigger=(2,), target=1)]
)
def test_data_without_labels_cannot_be_poisoned_by_labels(attack):
    with pytest.raises(AuditError, match="use a classification task"):
        attack(Examples(((1, 2),)))


def test_tokens_mark_no_image():
    with pytest.raises(AuditError, match="do not mark an image"):
        byzantine.backdoor(Examples(((0, 0),), (1,), images=(b"pixels",)), trigger=(2,), target=1)


ATTACKS = {
    "sign flip": byzantine.sign_flip,
    "inner product": byzantine.inner_product,
    "scaling": lambda honest, f: byzantine.scaling(honest, f, factor=1e4),
    "a little is enough": byzantine.alie,
    "min max": byzantine.min_max,
    "min sum": byzantine.min_sum,
    "mimic": byzantine.mimic,
    "free rider": byzantine.free_rider,
    "not finite": byzantine.not_finite,
}


@pytest.mark.parametrize("name", sorted(ATTACKS))
@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "multi_krum", "geometric_median", "caf"])
def test_no_attack_moves_a_robust_aggregate_by_more_than_the_spread_of_honest_updates(name: str, rule: str):
    honest, f = honest_rows(8), 3
    updates = Updates(FFA, torch.zeros(30, dtype=torch.float64), 15)
    for row in torch.cat([ATTACKS[name](honest, f), honest]):
        updates.add(Released(row, 1.0, insecure=True))
    result = RobustAggregator(rule=rule, f=f, before=("nnm",))(updates)
    spread = ((honest - honest.mean(0)) ** 2).sum(1).mean().sqrt()
    assert math.isfinite(float(result.sum()))
    assert torch.linalg.vector_norm(result - honest.mean(0)) <= spread
