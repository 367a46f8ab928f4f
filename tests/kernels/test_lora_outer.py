"""lora_outer.cu against the product over each expert's slots in float64."""

from itertools import pairwise, product

import pytest
import torch

from cupymoe.kernels.lora_outer import lora_outer
from tests.helpers import poison_free_memory
from tests.kernels.test_grouped_linear import offsets_of
from tests.kernels.test_lora_shrink import COUNTS, RANKS, assert_close, random_slots

pytestmark = pytest.mark.gpu


def output_of(num_experts, ranks, columns, dtype, layout):
    """``[E, r, C]`` in the orders of the gradients of A, of B, and of PEFT's B."""
    sizes = {"ranks": (num_experts, ranks, columns), "columns": (num_experts, columns, ranks)}
    if layout == "experts innermost":
        return torch.empty(columns, ranks, num_experts, device="cuda", dtype=dtype).permute(2, 1, 0)
    output = torch.empty(sizes[layout], device="cuda", dtype=dtype)
    return output.transpose(1, 2) if layout == "columns" else output


def check(
    counts,
    ranks,
    columns,
    dtype=torch.bfloat16,
    output_dtype=torch.float32,
    *,
    layout="ranks",
    gathered=True,
    is_weighted=False,
    scale=1.0,
):
    rows, of_slots, expert_offsets, token_of_slot = random_slots(counts, columns, dtype, gathered)
    low = torch.randn(sum(counts) + 5, -(-ranks // 16) * 16, device="cuda", dtype=dtype)
    low[sum(counts) :] = torch.nan
    low[: sum(counts), ranks:] = 0
    weights = torch.randn(len(low), device="cuda") if is_weighted else None
    poison_free_memory()
    output = output_of(len(counts), ranks, columns, output_dtype, layout)
    lora_outer(low, rows, expert_offsets, output, token_of_slot, weights, scale)
    weighted = low if weights is None else (low.float() * weights[:, None]).to(dtype)
    for expert, (first, past) in enumerate(pairwise(expert_offsets.tolist())):
        left, right = weighted[first:past, :ranks].double().T, of_slots[first:past].double()
        assert_close(output[expert], scale * left @ right, abs(scale) * left.abs() @ right.abs())
        assert past > first or not output[expert].any()


@pytest.mark.parametrize(("ranks", "gathered", "is_weighted"), [*product(RANKS, (False, True), (False, True))])
def test_ranks_rows_and_weights(ranks, gathered, is_weighted):
    for columns in (8, 128, 200, 704):
        check(COUNTS, ranks, columns, gathered=gathered, is_weighted=is_weighted)


@pytest.mark.parametrize("layout", ["ranks", "columns", "experts innermost"])
@pytest.mark.parametrize("ranks", [1, 4, 8, 12, 16])
def test_padded_ranks_and_layouts(ranks, layout):
    check(COUNTS, ranks, 136, layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype):
    for output_dtype, scale in product((torch.float32, dtype), (1.0, -0.375)):
        check(COUNTS, 16, 136, dtype, output_dtype, layout="columns", scale=scale)


@pytest.mark.parametrize("counts", [[1], [0], [0, 0, 5000], torch.arange(1000).remainder(3).tolist()])
def test_few_and_many_experts(counts):
    check(counts, 16, 72, is_weighted=True)


def test_an_expert_s_bits_are_its_own():
    rows, _, expert_offsets, _ = random_slots([0, 40, 90], 136, torch.bfloat16, gathered=False)
    low = torch.randn(len(rows), 16, device="cuda", dtype=torch.bfloat16)
    output, alone = torch.empty(3, 16, 136, device="cuda"), torch.empty(1, 16, 136, device="cuda")
    lora_outer(low, rows, expert_offsets, output)
    lora_outer(low[40:130], rows[40:130], offsets_of([90]), alone)
    assert alone.isfinite().all()
    assert torch.equal(output[2], alone[0])
