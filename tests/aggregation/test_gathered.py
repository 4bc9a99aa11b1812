"""What flora, fedex, flexlora and hetlora make of participants' adapters: exact without noise, or off by what theory says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.aggregation import components, truncated
from dp_federated_lora.aggregation.lora.factors import product_svd
from dp_federated_lora.aggregation.lora.gathered import Gather, fedex, flexlora, flora, hetlora
from dp_federated_lora.vector import Layout

A, B, M, HEAD = "x.lora_A.default.weight", "x.lora_B.default.weight", "x.increment.weight", "head.weight"
ROWS, COLUMNS = 20, 14  # of W
Adapter = dict[str, torch.Tensor]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapter(rank: int, seed: int) -> Adapter:
    b, a = normal(ROWS, rank, seed=seed).float(), normal(rank, COLUMNS, seed=seed + 1).float()
    return {A: a, B: b, M: normal(ROWS, COLUMNS, seed=seed + 2).float(), HEAD: normal(3, seed=seed + 3).float()}


def adapters(count: int, rank: int, seed: int) -> tuple[Adapter, list[Adapter]]:
    """A global adapter and those of participants, who have its increment and another rank each."""
    start = adapter(rank, seed)
    others = [truncated(adapter(rank, seed + 10 * k), 1 + k % rank) | {M: start[M]} for k in range(1, count + 1)]
    return start, others


def product(each: Adapter) -> torch.Tensor:
    return each[B].double() @ each[A].double()


def mean_product(gathered: list[Adapter]) -> torch.Tensor:
    return sum((product(each) for each in gathered), torch.zeros(ROWS, COLUMNS, dtype=torch.float64)) / len(gathered)


def total(each: Adapter) -> torch.Tensor:
    """What the layer adds to W0."""
    return each[M].double() + product(each)


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    return float((first - second).norm()) <= 1e-5 * (1.0 + float(second.norm()))  # adapters are float32


counts, ranks, seeds = st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6)
many = settings(deadline=None, max_examples=50)


@many
@given(counts, ranks, seeds)
@pytest.mark.parametrize("gather", [flora, fedex])
def test_flora_and_fedex_add_the_mean_of_products_to_the_frozen_weights_exactly(gather: Gather, count: int, rank: int, seed: int):
    start, gathered = adapters(count, rank, seed)
    after = dict(gather(start, gathered, 7))
    assert close(total(after), start[M].double() + mean_product(gathered))
    assert close(after[HEAD].double(), sum(each[HEAD].double() for each in gathered) / count)
    assert all(after[name].dtype is torch.float32 and after[name].shape == start[name].shape for name in start)


def test_flora_begins_anew_with_other_public_directions_in_each_round():
    start, gathered = adapters(3, 4, 0)
    first, again, other = (flora(start, gathered, seed) for seed in (1, 1, 2))
    assert not first[B].any()
    assert torch.allclose(first[A] @ first[A].T, torch.eye(4), atol=1e-6)
    assert torch.equal(first[A], again[A]) and not torch.allclose(first[A], other[A])


def test_p_k_applied_to_both_factors_would_be_another_product():
    _, gathered = adapters(4, 3, 0)
    halves = sum(product({A: each[A] / 4, B: each[B] / 4}) for each in gathered)
    assert float((halves - mean_product(gathered)).norm()) > 0.5 * float(mean_product(gathered).norm())


@many
@given(st.integers(1, 5), st.integers(1, 3), seeds)
def test_the_residual_of_fedex_has_rank_k_minus_one_times_r_at_most(count: int, rank: int, seed: int):
    start = adapter(rank, seed)
    gathered = [adapter(rank, seed + 10 * k) | {M: start[M]} for k in range(1, count + 1)]
    after = fedex(start | {M: torch.zeros_like(start[M])}, gathered, 0)
    singular = torch.linalg.svdvals(after[M].double())
    bound = (count - 1) * rank
    assert (singular[bound:] <= 1e-5 * (1.0 + float(mean_product(gathered).norm()))).all()
    if 0 < bound <= min(ROWS, COLUMNS):
        assert singular[bound - 1] > 1e-5  # and not less, for factors in general position
    mean = {name: sum(each[name].double() for each in gathered) / count for name in (A, B)}
    assert all(close(after[name].double(), mean[name]) for name in mean)


@many
@given(counts, ranks, seeds)
def test_flexlora_errs_by_the_singular_values_it_leaves_out_and_by_nothing_where_there_are_none(count: int, rank: int, seed: int):
    start, gathered = adapters(count, rank, seed)
    after = flexlora(start, gathered, 0)
    true = mean_product(gathered)
    u, s, vt = torch.linalg.svd(true)
    error, expected = float((product(after) - true).norm()), math.sqrt(float(s[rank:].square().sum()))
    assert error == pytest.approx(expected, abs=1e-5 * (1.0 + float(s[0])))
    for share in range(1, rank + 1):  # whoever gets the first components has the best product of that rank
        best = (u[:, :share] * s[:share]) @ vt[:share]
        gap = float((product(truncated(after, share)) - true).norm()) - float((best - true).norm())
        assert abs(gap) <= 1e-5 * (1.0 + float(s[0]))
    assert torch.equal(after[M], start[M])


def test_flexlora_of_full_rank_loses_nothing():
    start, gathered = adapters(3, COLUMNS, 0)
    assert close(product(flexlora(start, gathered, 0)), mean_product(gathered))


def test_the_small_svd_is_that_of_the_product_and_of_fedasks_double_sketch():
    # FedASK: Y = sum p_k B_k (A_k Omega), Q = qr(Y), P = sum p_k A_k^T (B_k^T Q); exact for K r columns of Omega.
    count, rank = 3, 4
    b = [normal(ROWS, rank, seed=k) for k in range(count)]
    a = [normal(rank, COLUMNS, seed=50 + k) for k in range(count)]
    omega = normal(COLUMNS, count * rank, seed=99)
    q = torch.linalg.qr(sum(x @ (y @ omega) for x, y in zip(b, a, strict=True)) / count).Q
    sketched = q @ (sum(y.T @ (x.T @ q) for x, y in zip(b, a, strict=True)) / count).T
    u, s, vt = product_svd(torch.cat(b, dim=1) / count, torch.cat(a))
    assert torch.allclose((u * s) @ vt, sketched, atol=1e-12)
    assert torch.allclose(s, torch.linalg.svdvals(sketched)[: len(s)], atol=1e-12)
    # Cut to rank r, both have the best rank-r error and no less.
    left_out = float(s[rank:].norm())
    assert float(((u[:, :rank] * s[:rank]) @ vt[:rank] - sketched).norm()) == pytest.approx(left_out, rel=1e-9)
    assert left_out > 0.1 * float(s.norm())


@many
@given(counts, ranks, seeds)
def test_hetlora_weighs_participants_by_the_norm_of_their_product(count: int, rank: int, seed: int):
    start, gathered = adapters(count, rank, seed)
    after = hetlora(start, gathered, 0)
    norms = [float(product(each).norm()) for each in gathered]
    for name in (A, B):
        expected = sum(w / sum(norms) * each[name].double() for w, each in zip(norms, gathered, strict=True))
        assert close(after[name].double(), expected)


def test_hetlora_weighs_all_alike_where_no_product_is_there_yet():
    start, gathered = adapters(3, 2, 0)
    gathered = [each | {B: torch.zeros(ROWS, 2)} for each in gathered]
    after = hetlora(start, gathered, 0)
    assert close(after[A].double(), sum(each[A].double() for each in gathered) / 3)


@many
@given(st.permutations(range(4)), seeds)
@pytest.mark.parametrize("gather", [flora, fedex, flexlora, hetlora])
def test_the_order_of_participants_does_not_matter(gather: Gather, order: list[int], seed: int):
    start, gathered = adapters(4, 3, seed)
    assert close(total(dict(gather(start, [gathered[k] for k in order], 1))), total(dict(gather(start, gathered, 1))))


def test_a_participant_has_the_first_components_of_each_pair_and_the_whole_head():
    whole = {A: torch.ones(3, 4), B: torch.ones(5, 3), "y.lora_B.default.core.weight": torch.ones(3, 3), HEAD: torch.ones(2)}
    part = truncated(whole, 2)
    assert part[A].sum(1).tolist() == [4, 4, 0] and part[B].sum(0).tolist() == [5, 5, 0]
    assert part["y.lora_B.default.core.weight"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert int(components(Layout.of(whole), 2).sum()) == 8 + 10 + 4 + 2
    assert all(torch.equal(truncated(whole, 3)[name], whole[name]) for name in whole)
