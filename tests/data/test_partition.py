"""Partitions: every example has one client, whatever the arguments."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.data import by_column, dirichlet, iid
from dp_federated_lora.errors import ConfigError

UNTIMED = settings(deadline=None)  # a busy machine is no failure

SEEDS = st.integers(0, 2**63 - 1)
LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=200)


def assert_covers(parts: list[list[int]], n: int) -> None:
    assert sorted(index for part in parts for index in part) == list(range(n))
    assert all(part == sorted(part) for part in parts)


@UNTIMED
@given(st.integers(1, 300), st.integers(1, 40), SEEDS)
def test_iid_deals_every_example_once_in_equal_shares(n: int, clients: int, seed: int) -> None:
    parts = iid(n, clients, seed)
    assert_covers(parts, n)
    assert len(parts) == clients
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@UNTIMED
@given(LABELS, st.integers(1, 30), st.floats(1e-9, 1e9), SEEDS)
def test_dirichlet_deals_every_example_once_for_any_concentration(
    labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    parts = dirichlet(labels, clients, alpha, seed)
    assert_covers(parts, len(labels))
    assert len(parts) == clients


@UNTIMED
@given(LABELS, st.integers(1, 30), SEEDS)
def test_the_seed_alone_decides_and_global_randomness_is_untouched(labels: list[int], clients: int, seed: int) -> None:
    before = torch.random.get_rng_state()
    assert iid(len(labels), clients, seed) == iid(len(labels), clients, seed)
    assert dirichlet(labels, clients, 0.3, seed) == dirichlet(labels, clients, 0.3, seed)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_another_partition() -> None:
    labels = [index % 4 for index in range(200)]
    assert iid(200, 10, 1) != iid(200, 10, 2)
    assert dirichlet(labels, 10, 1.0, 1) != dirichlet(labels, 10, 1.0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_a_tiny_alpha_gives_each_label_to_one_client_and_leaves_clients_empty(seed: int) -> None:
    labels = [index % 3 for index in range(300)]
    parts = dirichlet(labels, 10, 1e-6, seed)
    assert sum(1 for part in parts if part) <= 3
    assert all(len(part) % 100 == 0 for part in parts)


def test_a_large_alpha_gives_equal_shares_of_each_label() -> None:
    labels = [index % 2 for index in range(1000)]
    for part in dirichlet(labels, 10, 1e9, 0):
        counts = Counter(labels[index] for index in part)
        assert abs(counts[0] - 50) <= 1
        assert abs(counts[1] - 50) <= 1


def test_shares_have_the_variance_of_the_dirichlet_distribution() -> None:
    # p_i ~ Beta(a, (K - 1) a), so Var(p_i) = (K - 1) / (K^2 (K a + 1)). For K = 4, a = 1/2 its kurtosis is
    # 3, so a squared deviate has relative standard deviation sqrt(2). The bands are five standard errors.
    clients, alpha, n, draws = 4, 0.5, 100, 1000
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    shares = torch.tensor([len(dirichlet([0] * n, clients, alpha, seed)[0]) / n for seed in range(draws)])
    assert shares.mean().item() == pytest.approx(1 / clients, abs=5 * (expected / draws) ** 0.5)
    assert (shares - 1 / clients).square().mean().item() == pytest.approx(expected, rel=5 * (2 / draws) ** 0.5)


def test_examples_of_a_label_are_shuffled_before_they_are_split() -> None:
    part = dirichlet([0] * 100, 2, 1e9, 0)[0]
    assert part != list(range(len(part)))


@UNTIMED
@given(st.lists(st.text(max_size=3), min_size=1, max_size=100))
def test_by_column_gives_each_key_its_own_client_in_sorted_order(keys: list[str]) -> None:
    parts = by_column(keys)
    assert_covers(parts, len(keys))
    assert [{keys[index] for index in part} for part in parts] == [{key} for key in sorted(set(keys))]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iid(0, 2, 0), "at least one example"),
        (lambda: iid(3, 0, 0), "at least one client"),
        (lambda: iid(3, 2, -1), "seed"),
        (lambda: iid(3, 2, 2**63), "seed"),
        (lambda: dirichlet([], 2, 1.0, 0), "at least one example"),
        (lambda: dirichlet([0], 0, 1.0, 0), "at least one client"),
        (lambda: dirichlet([0], 2, 0.0, 0), "alpha"),
        (lambda: dirichlet([0], 2, -1.0, 0), "alpha"),
        (lambda: dirichlet([0], 2, float("nan"), 0), "alpha"),
        (lambda: dirichlet([0], 2, float("inf"), 0), "alpha"),
        (lambda: by_column([]), "at least one example"),
    ],
)
def test_an_argument_out_of_range_is_refused(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
