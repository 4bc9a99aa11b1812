"""Batches by length, and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_federated_lora.data import collate, length_batches
from dp_federated_lora.errors import ConfigError

UNTIMED = settings(deadline=None)  # a busy machine is no failure

LENGTHS = st.lists(st.integers(1, 300), max_size=80)
BUDGETS = st.integers(1, 2000)


@UNTIMED
@given(LENGTHS, BUDGETS)
def test_every_index_is_in_exactly_one_batch(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, max_tokens=budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))


@UNTIMED
@given(LENGTHS, BUDGETS)
def test_no_padded_batch_exceeds_the_budget_unless_it_is_one_long_example(lengths: list[int], budget: int) -> None:
    for batch in length_batches(lengths, max_tokens=budget):
        longest = max(lengths[index] for index in batch)
        assert longest * len(batch) <= budget or len(batch) == 1


@UNTIMED
@given(LENGTHS, BUDGETS)
def test_batches_are_sorted_by_length_with_ties_in_order(lengths: list[int], budget: int) -> None:
    order = [index for batch in length_batches(lengths, max_tokens=budget) for index in batch]
    assert order == sorted(range(len(lengths)), key=lambda index: (lengths[index], index))


@UNTIMED
@given(LENGTHS, BUDGETS)
def test_neighbouring_batches_could_not_have_been_one(lengths: list[int], budget: int) -> None:
    batches = length_batches(lengths, max_tokens=budget)
    for batch, following in zip(batches, batches[1:], strict=False):
        assert lengths[following[0]] * (len(batch) + 1) > budget


def test_no_examples_give_no_batches() -> None:
    assert length_batches([], max_tokens=10) == []


def test_a_bad_budget_or_an_empty_example_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_tokens"):
        length_batches([1], max_tokens=0)
    with pytest.raises(ConfigError, match="example 1 has 0 tokens"):
        length_batches([3, 0], max_tokens=10)


@UNTIMED
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=12), min_size=1, max_size=8))
def test_collate_pads_on_the_right_and_the_mask_recovers_the_tokens(tokens: list[list[int]]) -> None:
    ids, mask = collate(tokens, pad_id=7)
    assert ids.shape == mask.shape == (len(tokens), max(map(len, tokens)))
    assert ids.dtype == mask.dtype == torch.int64
    assert [row[: int(seen.sum())].tolist() for row, seen in zip(ids, mask, strict=True)] == tokens
    assert bool((ids[mask == 0] == 7).all())
    assert bool((mask.diff(dim=1) <= 0).all())


def test_collate_of_nothing_is_an_empty_batch() -> None:
    ids, mask = collate([], pad_id=0)
    assert ids.shape == mask.shape == (0, 0)
