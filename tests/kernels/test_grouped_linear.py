"""grouped_linear.cu against the product of each row with its expert's weight in float64."""

from itertools import pairwise, product

import pytest
import torch

from cupymoe.kernels.grouped_linear import grouped_linear
from tests.helpers import DTYPES, poison_free_memory

pytestmark = pytest.mark.gpu

# Slots of each expert: one, few and many of them, at the bounds of a tile, skewed, and none.
COUNTS = [[1], [16], [17], [64], [65], [0, 0, 5], [3, 0, 61, 1, 0], [65, 0, 63, 2, 130], [0, 700, 1, 0, 15], [0, 0]]
# (K, N): odd, and at the bounds of a step and of a tile.
SIZES = [(1, 1), (13, 7), (31, 63), (32, 64), (33, 65), (100, 200)]
MASKED = 3  # rows past the last expert's


def offsets_of(counts):
    return torch.tensor([0, *counts], device="cuda").cumsum(0).to(torch.int32)


def unaligned(tensor):
    """The same values one element past a 16-byte boundary."""
    moved = torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)
    assert moved.data_ptr() % 16
    return moved


def random_case(counts, depth, columns, row_dtype=torch.float32, weight_dtype=torch.float32):
    rows = torch.randn(sum(counts) + MASKED, depth, device="cuda", dtype=row_dtype)
    rows[sum(counts) :] = torch.nan
    weight = torch.randn(len(counts), columns, depth, device="cuda", dtype=weight_dtype)
    return rows, weight, offsets_of(counts)


def assert_is_sum(output, truth, magnitude, terms):
    """Within one float32 rounding of the magnitude for each term, and one rounding to the dtype."""
    info = torch.finfo(output.dtype)
    rounding = 0.0 if output.dtype == torch.float32 else info.eps / 2
    allowed = 1.01 * (truth.abs() * rounding + magnitude * terms * 2.0**-24) + info.smallest_normal * info.eps
    assert output.shape == truth.shape
    assert ((output.double() - truth).abs() <= allowed).all()


def check(rows, weight, expert_offsets, dtype=None):
    poison_free_memory()
    output = grouped_linear(rows, weight, expert_offsets, dtype)
    assert output.dtype == (dtype or rows.dtype)
    assert output.shape == (len(rows), weight.shape[1])
    ends = expert_offsets.tolist()
    for expert, (first, past) in enumerate(pairwise(ends)):
        its_rows, its_weight = rows[first:past].double(), weight[expert].double()
        magnitude = its_rows.abs() @ its_weight.abs().T
        assert_is_sum(output[first:past], its_rows @ its_weight.T, magnitude, rows.shape[1])


@pytest.mark.parametrize(("depth", "columns"), SIZES)
def test_sizes_and_counts(depth, columns):
    for counts in COUNTS:
        check(*random_case(counts, depth, columns))


@pytest.mark.parametrize(("row_dtype", "weight_dtype", "dtype"), [*product(DTYPES, DTYPES, (None, torch.float32))])
def test_dtypes(row_dtype, weight_dtype, dtype):
    for counts, (depth, columns) in (([65, 0, 3], (13, 7)), ([1, 2, 70], (176, 100))):
        check(*random_case(counts, depth, columns, row_dtype, weight_dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_starts_off_16_bytes(dtype):
    rows, weight, expert_offsets = random_case([70, 0, 5], 48, 72, dtype, dtype)
    check(unaligned(rows), unaligned(weight), expert_offsets)


def strided(kind):
    """A weight [3, 70, 48] of other strides."""
    if kind == "transposed":
        return torch.randn(3, 48, 70, device="cuda").transpose(1, 2)
    if kind == "every second":
        return torch.randn(6, 140, 96, device="cuda")[::2, ::2, 1::2]
    if kind == "one for all experts":
        return torch.randn(1, 70, 48, device="cuda").expand(3, -1, -1)
    return torch.randn(70, 48, 3, device="cuda").permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["transposed", "every second", "one for all experts", "experts innermost"])
def test_weights_of_any_strides(kind):
    weight = strided(kind)
    assert weight.shape == (3, 70, 48)
    assert not weight.is_contiguous()
    for counts in ([70, 0, 5], [3, 3, 3]):
        rows, _, expert_offsets = random_case(counts, 48, 70)
        check(rows, weight, expert_offsets)
        assert torch.equal(
            grouped_linear(rows, weight, expert_offsets)[: sum(counts)],
            grouped_linear(rows, weight.contiguous(), expert_offsets)[: sum(counts)],
        )


def test_a_row_s_bits_are_its_own():
    """Alone, among few and among many rows of its expert: whatever part of a tile they fill."""
    rows, weight, _ = random_case([130], 300, 90, torch.bfloat16, torch.bfloat16)
    expected = grouped_linear(rows, weight, offsets_of([130]), torch.float32)[:130]
    assert expected.isfinite().all()
    for count in (1, 16, 17, 64, 65):
        for first in (0, 130 - count):
            few = rows[first : first + count]
            output = grouped_linear(few, weight, offsets_of([count]), torch.float32)
            assert torch.equal(output, expected[first : first + count])


def test_as_many_experts_as_the_sort_serves():
    counts = torch.randint(3, (1024,)).tolist()
    counts[1023] = 100
    check(*random_case(counts, 20, 30))


def test_subnormal_operands_count():
    rows = torch.full((2, 8), 2.0**-140, device="cuda")
    weight = torch.full((1, 4, 8), 2.0**100, device="cuda")
    output = grouped_linear(rows, weight, offsets_of([2]))
    assert torch.equal(output, torch.full((2, 4), 2.0**-37, device="cuda"))


def test_no_columns():
    rows, weight, expert_offsets = random_case([3], 8, 0)
    assert grouped_linear(rows, weight, expert_offsets).shape == (3 + MASKED, 0)
