"""grouped_outer.cu against the product over each expert's slots in float64."""

from itertools import pairwise, product

import pytest
import torch

from cupymoe.kernels.grouped_outer import grouped_outer
from tests.helpers import DTYPES, poison_free_memory
from tests.kernels.test_grouped_linear import COUNTS, MASKED, assert_is_sum, offsets_of, unaligned

pytestmark = pytest.mark.gpu

# (M, N): odd, below and above what makes few lines, and at the bounds of a tile.
SIZES = [(1, 1), (13, 7), (16, 65), (17, 64), (64, 63), (65, 130)]


def random_case(counts, lines, columns, left_dtype=torch.float32, right_dtype=torch.float32):
    left, right = (
        torch.randn(sum(counts) + MASKED, size, device="cuda", dtype=dtype)
        for size, dtype in ((lines, left_dtype), (columns, right_dtype))
    )
    left[sum(counts) :], right[sum(counts) :] = torch.nan, torch.nan  # of masked pairs: they must not leak
    return left, right, offsets_of(counts)


def check(left, right, expert_offsets, dtype=None):
    poison_free_memory()
    output = grouped_outer(left, right, expert_offsets, dtype)
    assert output.dtype == (dtype or left.dtype)
    assert output.shape == (len(expert_offsets) - 1, left.shape[1], right.shape[1])
    ends = expert_offsets.tolist()
    for expert, (first, past) in enumerate(pairwise(ends)):
        its_left, its_right = left[first:past].double(), right[first:past].double()
        magnitude = its_left.abs().T @ its_right.abs()
        assert_is_sum(output[expert], its_left.T @ its_right, magnitude, past - first)
        assert past > first or not output[expert].any()


@pytest.mark.parametrize(("lines", "columns"), SIZES)
def test_sizes_and_counts(lines, columns):
    for counts in COUNTS:
        check(*random_case(counts, lines, columns))


@pytest.mark.parametrize(("left_dtype", "right_dtype", "dtype"), [*product(DTYPES, DTYPES, (None, torch.bfloat16))])
def test_dtypes(left_dtype, right_dtype, dtype):
    for counts, (lines, columns) in (([65, 0, 3], (13, 7)), ([1, 2, 70], (100, 176))):
        check(*random_case(counts, lines, columns, left_dtype, right_dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_off_16_bytes(dtype):
    left, right, expert_offsets = random_case([70, 0, 5], 48, 72, dtype, dtype)
    check(unaligned(left), unaligned(right), expert_offsets)


def test_slots_are_added_in_ascending_order():
    """2^24 + 1 - 2^24 is 0 in float32, and 2^24 - 2^24 + 1 is 1."""
    right = torch.ones(3, 5, device="cuda")
    for values, expected in (([2.0**24, 1.0, -(2.0**24)], 0.0), ([2.0**24, -(2.0**24), 1.0], 1.0)):
        left = torch.tensor(values, device="cuda")[:, None].expand(-1, 20).contiguous()
        output = grouped_outer(left, right, offsets_of([3]))
        assert torch.equal(output, torch.full((1, 20, 5), expected, device="cuda"))


def test_an_expert_s_bits_are_its_own():
    left, right, expert_offsets = random_case([0, 40, 90], 70, 50)
    output = grouped_outer(left, right, expert_offsets)
    alone = grouped_outer(left[40:130], right[40:130], offsets_of([90]))
    assert alone.isfinite().all()
    assert torch.equal(output[2], alone[0])


@pytest.mark.parametrize(("lines", "columns"), [(0, 4), (4, 0)])
def test_of_nothing(lines, columns):
    assert grouped_outer(*random_case([3], lines, columns)).shape == (1, lines, columns)
