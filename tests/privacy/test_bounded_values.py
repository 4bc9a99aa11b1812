import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from devices import NEEDS_GPU
from dp_federated_lora.errors import DuplicateContribution, PrivacyError
from dp_federated_lora.privacy import Bounded, BoundedSum, UnitId, clip_examples, clip_to
from dp_federated_lora.privacy.clipping import _to_lattice

vectors = arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
norms = st.floats(1e-6, 1e6)


def unit(name: str = "u") -> UnitId:
    return UnitId(name)


@given(vectors, norms)
@settings(deadline=None)
def test_clip_keeps_the_exact_integer_norm_below_the_bound_for_any_input_at_all(vector: np.ndarray, clip: float):
    lattice = clip_to(torch.from_numpy(vector), clip, unit())._value.tolist()
    assert sum(k * k for k in lattice) <= 4**22


@given(vectors, norms)
@settings(deadline=None)
def test_non_finite_contributions_become_zero_without_an_error(vector: np.ndarray, clip: float):
    vector = np.append(vector, np.float32("nan"))
    assert not clip_to(torch.from_numpy(vector), clip, unit())._value.any()


def test_infinity_and_overflowing_squares_do_not_pass_the_clip():
    assert not clip_to(torch.tensor([float("inf"), 1.0]), 1.0, unit())._value.any()
    huge = clip_to(torch.full((4,), 3e38), 1.0, unit())._value
    assert 0 < (huge * huge).sum() <= 4**22


def test_a_zero_update_is_an_ordinary_contribution():
    total = BoundedSum.collect([clip_to(torch.zeros(3), 1.0, unit())], size=3, clip_norm=1.0)
    assert not total._value.any()


def test_short_vectors_keep_their_direction_and_length_to_the_resolution():
    vector = torch.tensor([0.3, -0.4], dtype=torch.float64)
    lattice = clip_to(vector, 1.0, unit())._value.double() / 2**22
    assert torch.allclose(lattice, vector, atol=2**-22)
    long = clip_to(10 * vector, 1.0, unit())._value.double() / 2**22
    assert torch.allclose(long, 2 * vector, atol=2**-21)


def test_rows_are_clipped_one_by_one_and_summed():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [float("nan"), 0.0]])
    total = clip_examples(rows, 1.0, [unit("a"), unit("b"), unit("c")])._value.double() / 2**22
    assert torch.allclose(total, torch.tensor([0.9, 1.2], dtype=torch.float64), atol=2**-20)


def test_a_block_of_rows_is_clipped_like_each_row_alone():
    """As on a GPU, where rows come in blocks: whatever the other rows are."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 1e6, 1e300, math.inf, math.nan], dtype=torch.float64)
    rows = sizes[:, None] * torch.randn(8, 57, generator=generator, dtype=torch.float64)
    rows[5, 0] = 0.0
    rows[3, 7] = -math.inf
    rows[2, 7] = math.nan
    block = _to_lattice(rows, 0.7)
    assert torch.equal(block, torch.stack([_to_lattice(row, 0.7) for row in rows]))
    assert all(sum(int(k) ** 2 for k in row.tolist()) <= 4**22 for row in block)
    assert [bool(row.any()) for row in block] == [False, False, False, False, True, False, False, False]


@pytest.mark.parametrize("clip", [1e-101, 7.2e-317])
def test_clip_norms_whose_lattice_floats_cannot_hold_are_refused(clip: float):
    with pytest.raises(PrivacyError, match="at least 1e-100"):
        clip_to(torch.tensor([0.3, 0.4]), clip, unit())


@given(arrays(np.float64, st.integers(1, 9), elements=st.floats(allow_nan=False, allow_infinity=False)), st.floats(1e-100, 1e300))
@settings(deadline=None)
def test_the_bound_holds_for_float64_of_any_size(vector: np.ndarray, clip: float):
    lattice = clip_to(torch.from_numpy(vector), clip, unit())._value.tolist()
    assert sum(k * k for k in lattice) <= 4**22


@NEEDS_GPU
def test_rows_on_a_gpu_are_clipped_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    sizes = [0.0, 1e-30, 1e-3, 1.0, 1e6, 3e37, float("inf"), float("nan")]
    for size in sizes:
        rows = size * torch.randn(50, 301, generator=generator)
        for number, row in enumerate(rows):
            (there,) = (clip_to(row.cuda(), 0.7, unit())._value.tolist(),)
            assert sum(k * k for k in there) <= 4**22, (size, number)
        units = [unit(str(number)) for number in range(len(rows))]
        sums = [BoundedSum.merge([clip_examples(each, 0.7, units)], size=301, clip_norm=0.7) for each in (rows, rows.cuda())]
        here, there = (each._value for each in sums)
        assert int((here - there).abs().max()) <= len(rows)  # towards zero, by one at most for each row
        assert bool(here.any()) == (0.0 < size < float("inf") and size > 1e-20)


@given(st.integers(0, 5), norms)
@settings(deadline=None)
def test_leaving_one_unit_out_moves_the_sum_by_at_most_the_clip_norm(dropped: int, clip: float):
    generator = torch.Generator().manual_seed(dropped)
    vectors = [100 * torch.randn(7, generator=generator) for _ in range(6)]
    parts = [clip_to(v, clip, unit(str(i))) for i, v in enumerate(vectors)]
    whole = BoundedSum.collect(parts, size=7, clip_norm=clip)._value
    less = BoundedSum.collect(parts[:dropped] + parts[dropped + 1 :], size=7, clip_norm=clip)._value
    assert sum(k * k for k in (whole - less).tolist()) <= 4**22


def test_nobody_taking_part_is_the_zero_sum():
    assert not BoundedSum.collect([], size=3, clip_norm=1.0)._value.any()
    assert not BoundedSum.merge([], size=3, clip_norm=1.0)._value.any()


def test_one_unit_twice_two_clip_norms_and_two_shapes_are_refused():
    a = clip_to(torch.ones(2), 1.0, unit("a"))
    with pytest.raises(DuplicateContribution, match="'a'"):
        BoundedSum.collect([a, a], size=2, clip_norm=1.0)
    one = BoundedSum.collect([a], size=2, clip_norm=1.0)
    with pytest.raises(DuplicateContribution):
        BoundedSum.merge([one, one], size=2, clip_norm=1.0)
    for other in (clip_to(torch.ones(2), 2.0, unit("b")), clip_to(torch.ones(3), 1.0, unit("b"))):
        with pytest.raises(PrivacyError, match="one plan, one clip norm"):
            BoundedSum.collect([a, other], size=2, clip_norm=1.0)
    with pytest.raises(PrivacyError, match="exactly one row"):
        clip_examples(torch.ones(2, 2), 1.0, [unit("a"), unit("a")])


BOUNDED = clip_to(torch.ones(2), 1.0, unit("a"))
SUM = BoundedSum.collect([BOUNDED], size=2, clip_norm=1.0)


@pytest.mark.parametrize("value", [BOUNDED, SUM], ids=["Bounded", "BoundedSum"])
@pytest.mark.parametrize(
    "use",
    [
        lambda v: v * 2,
        lambda v: v / 2,
        lambda v: v + v,
        lambda v: -v,
        lambda v: len(v),
        lambda v: list(v),
        lambda v: float(v),
        lambda v: np.asarray(v),
        lambda v: bool(v),
        lambda v: torch.as_tensor(v),
        lambda v: pickle.dumps(v),
        lambda v: copy.copy(v),
        lambda v: copy.deepcopy(v),
        lambda v: v < v,
    ],
)
def test_sealed_values_cannot_be_scaled_weighted_read_copied_or_compared(value: object, use):
    with pytest.raises((TypeError, PrivacyError, RuntimeError)):
        use(value)


def test_sealed_values_show_nothing_and_cannot_be_made_by_hand():
    assert repr(BOUNDED) == "<Bounded: sealed>"
    with pytest.raises(PrivacyError, match="clip_to"):
        Bounded(object(), torch.ones(1), 1.0, unit())
    with pytest.raises(PrivacyError, match="collect"):
        BoundedSum(object(), torch.ones(1), 1.0, frozenset())


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_clip_norms_are_refused(clip: float):
    with pytest.raises(PrivacyError, match="clip norm"):
        clip_to(torch.ones(1), clip, unit())


def test_a_matrix_is_not_one_contribution():
    with pytest.raises(PrivacyError, match="one flat vector"):
        clip_to(torch.ones(2, 2), 1.0, unit())
