"""lora_shrink.cu against the product of each row with its expert's factor in float64."""

from itertools import pairwise, product

import pytest
import torch

from cupymoe.kernels.lora_shrink import lora_shrink
from tests.helpers import poison_free_memory, transposed
from tests.kernels.test_grouped_linear import offsets_of

pytestmark = pytest.mark.gpu

# Slots of each expert, at the bounds of a block's slots, many, and none.
COUNTS = [0, 1, 63, 64, 65, 0, 127, 128, 129, 300, 2, 0]
MASKED = 5  # slots past the last expert's
NO_TOKEN = 2**30
RANKS = [16, 48, 64, 128]


def random_slots(counts, columns, dtype, gathered):
    """Rows, NaN where no slot may read; what a slot's row is; where the kernels find them."""
    kept = sum(counts)
    if gathered:
        rows = torch.randn(kept // 2 + 2, columns, device="cuda", dtype=dtype)
        rows[-1] = torch.nan  # of a token whose pairs are masked
        token_of_slot = torch.randint(len(rows) - 1, (kept + MASKED,), device="cuda", dtype=torch.int32)
        token_of_slot[kept:] = NO_TOKEN
        return rows, rows[token_of_slot[:kept].long()], offsets_of(counts), token_of_slot
    rows = torch.randn(kept + MASKED, columns, device="cuda", dtype=dtype)
    rows[kept:] = torch.nan
    return rows, rows[:kept], offsets_of(counts), None


def assert_close(output, truth, magnitude):
    """One rounding to the dtype, where it may be subnormal, and fp32 sums of terms of this magnitude."""
    rounding = 2.0**-24 if output.dtype == torch.float32 else torch.finfo(output.dtype).eps / 2
    rounded = truth.abs().clamp(min=torch.finfo(output.dtype).smallest_normal)
    assert output.shape == truth.shape
    assert ((output.double() - truth).abs() <= 1.01 * rounding * rounded + 2.0**-20 * magnitude).all()
    assert (output.double() - truth).norm() <= (rounding + 2.0**-14) * truth.norm()


def check(counts, depth, rank, dtype=torch.bfloat16, *, gathered=True, factor_transposed=False):
    rows, of_slots, expert_offsets, token_of_slot = random_slots(counts, depth, dtype, gathered)
    factor = torch.randn(len(counts), rank, depth, device="cuda", dtype=dtype)
    if factor_transposed:
        factor = transposed(factor)
    poison_free_memory()
    low = lora_shrink(rows, factor, expert_offsets, token_of_slot)
    assert low.dtype == dtype
    assert low.shape == (sum(counts) + MASKED, rank)
    for expert, (first, past) in enumerate(pairwise(expert_offsets.tolist())):
        left, right = of_slots[first:past].double(), factor[expert].double().T
        assert_close(low[first:past], left @ right, left.abs() @ right.abs())


@pytest.mark.parametrize(("rank", "factor_transposed", "gathered"), [*product(RANKS, (False, True), (False, True))])
def test_ranks_layouts_and_rows(rank, factor_transposed, gathered):
    for depth in (8, 64, 200, 704):
        check(COUNTS, depth, rank, gathered=gathered, factor_transposed=factor_transposed)


@pytest.mark.parametrize("factor_transposed", [False, True])
def test_float16(factor_transposed):
    check(COUNTS, 136, 16, torch.float16, factor_transposed=factor_transposed)


@pytest.mark.parametrize("counts", [[1], [0], [0, 0, 64], [130, 0, 0], torch.arange(1000).remainder(3).tolist()])
def test_few_and_many_experts(counts):
    check(counts, 72, 16)


def test_a_row_s_bits_are_its_own():
    rows, _, expert_offsets, _ = random_slots([40, 90], 200, torch.bfloat16, gathered=False)
    factor = torch.randn(2, 16, 200, device="cuda", dtype=torch.bfloat16)
    low = lora_shrink(rows, factor, expert_offsets)
    assert torch.equal(low[75:80], lora_shrink(rows[75:80], factor[1:], offsets_of([5])))
    assert torch.equal(low[:130], lora_shrink(rows, transposed(factor), expert_offsets)[:130])
