"""lora_back.cu against both of its products in float64, and one of them against the bits of lora_outer.cu."""

from itertools import pairwise, product

import pytest
import torch

from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.lora_back import MAX_RANK, lora_back, shared_bytes, tiling, tiling_of
from cupymoe.kernels.lora_outer import lora_outer
from tests.helpers import poison_free_memory, transposed
from tests.kernels.test_grouped_linear import offsets_of
from tests.kernels.test_lora_outer import output_of
from tests.kernels.test_lora_shrink import COUNTS, MASKED, assert_close, random_slots

# One block with columns that are none, one that is full, clusters of two and four, with the last block full and not.
COLUMNS = [8, 200, 704, 1408, 1416, 2816, 2880, 5760]


def check(
    counts,
    ranks,
    columns,
    dtype=torch.bfloat16,
    output_dtype=torch.float32,
    *,
    layout="columns",
    gathered=True,
    is_weighted=False,
    factor_transposed=True,
    scale=1.0,
    its_tiling=None,
):
    rows, of_slots, expert_offsets, token_of_slot = random_slots(counts, columns, dtype, gathered)
    kept, rank = sum(counts), -(-ranks // 16) * 16
    factor = torch.randn(len(counts), rank, columns, device="cuda", dtype=dtype)
    if factor_transposed:
        factor = transposed(factor)
    low = torch.randn(kept + MASKED, rank, device="cuda", dtype=dtype)
    low[kept:] = torch.nan
    low[:kept, ranks:] = 0
    weights = torch.randn(len(low), device="cuda") if is_weighted else None
    its_tiling = its_tiling or tiling(columns, rank)
    poison_free_memory()
    output, of_outer = (output_of(len(counts), ranks, columns, output_dtype, layout) for _ in range(2))
    grad_low = lora_back(rows, factor, low, expert_offsets, output, its_tiling, token_of_slot, weights, scale)
    lora_outer(low, rows, expert_offsets, of_outer, token_of_slot, weights, scale)
    assert torch.equal(output, of_outer)
    assert grad_low.dtype == dtype
    assert grad_low.shape == low.shape
    weighted = low if weights is None else (low.float() * weights[:, None]).to(dtype)
    for expert, (first, past) in enumerate(pairwise(expert_offsets.tolist())):
        its_rows, its_factor = of_slots[first:past].double(), factor[expert].double().T
        assert_close(grad_low[first:past], its_rows @ its_factor, its_rows.abs() @ its_factor.abs())
        left = weighted[first:past, :ranks].double().T
        assert_close(output[expert], scale * left @ its_rows, abs(scale) * left.abs() @ its_rows.abs())
        assert past > first or not output[expert].any()
    again = torch.empty_like(output)
    low_again = lora_back(rows, factor, low, expert_offsets, again, its_tiling, token_of_slot, weights, scale)
    assert torch.equal(again, output)
    assert torch.equal(low_again[:kept], grad_low[:kept])


@pytest.mark.gpu
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("gathered", "is_weighted"), [*product((False, True), repeat=2)])
def test_columns_rows_and_weights(columns, gathered, is_weighted):
    check(COUNTS, 16, columns, gathered=gathered, is_weighted=is_weighted)


@pytest.mark.gpu
@pytest.mark.parametrize("factor_transposed", [False, True])
@pytest.mark.parametrize("columns", [8, 200, 704, 1408, 2816])
def test_rank_32_and_layouts_of_the_factor(columns, factor_transposed):
    for ranks in (16, 20, 32):
        check(COUNTS, ranks, columns, is_weighted=True, factor_transposed=factor_transposed)


@pytest.mark.gpu
@pytest.mark.parametrize(("columns", "cluster"), [(1408, 1), (1408, 2), (2816, 2), (2816, 4), (2816, 8), (5632, 4)])
def test_every_cluster(columns, cluster):
    check(COUNTS, 16, columns, is_weighted=True, its_tiling=tiling_of(columns, 16, cluster))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["ranks", "columns", "experts innermost"])
@pytest.mark.parametrize("ranks", [1, 4, 8, 12, 16])
def test_padded_ranks_and_layouts(ranks, layout):
    check(COUNTS, ranks, 1416, layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_scales(dtype):
    for output_dtype, scale in product((torch.float32, dtype), (1.0, -0.375)):
        check(COUNTS, 16, 1408, dtype, output_dtype, is_weighted=True, scale=scale)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [[1], [0], [0, 0, 5000], torch.arange(1000).remainder(3).tolist()])
@pytest.mark.parametrize("columns", [72, 2816])
def test_few_and_many_experts(counts, columns):
    check(counts, 16, columns, is_weighted=True)


@pytest.mark.gpu
def test_nan_stays_in_its_row_and_its_expert():
    counts = [40, 1, 70]
    rows, _, expert_offsets, _ = random_slots(counts, 1408, torch.bfloat16, gathered=False)
    rows[40] = torch.nan
    factor = torch.randn(3, 16, 1408, device="cuda", dtype=torch.bfloat16)
    low = torch.randn(len(rows), 16, device="cuda", dtype=torch.bfloat16)
    output = output_of(3, 16, 1408, torch.float32, "columns")
    grad_low = lora_back(rows, factor, low, expert_offsets, output, tiling(1408, 16))
    assert grad_low[: sum(counts)].isnan().any(1).nonzero().flatten().tolist() == [40]
    assert output.flatten(1).isnan().any(1).tolist() == [False, True, False]


@pytest.mark.gpu
def test_an_expert_s_bits_are_its_own():
    rows, _, expert_offsets, _ = random_slots([0, 40, 90], 1408, torch.bfloat16, gathered=False)
    factor = torch.randn(3, 16, 1408, device="cuda", dtype=torch.bfloat16)
    low = torch.randn(len(rows), 16, device="cuda", dtype=torch.bfloat16)
    output, alone = (output_of(experts, 16, 1408, torch.float32, "ranks") for experts in (3, 1))
    its_tiling = tiling(1408, 16)
    grad_low = lora_back(rows, factor, low, expert_offsets, output, its_tiling)
    low_alone = lora_back(rows[40:130], factor[2:], low[40:130], offsets_of([90]), alone, its_tiling)
    assert torch.equal(output[2], alone[0])
    assert torch.equal(grad_low[40:130], low_alone)


def test_every_tiling_holds_its_columns_and_fits_a_multiprocessor():
    for rank, columns in product((16, 32), range(8, 6400, 8)):
        its_tiling = tiling(columns, rank)
        if its_tiling is None:
            continue
        of_block = 16 * 8 * its_tiling.squares
        assert of_block * (its_tiling.cluster - 1) < columns <= of_block * its_tiling.cluster
        assert its_tiling.stages >= 2
        assert shared_bytes(its_tiling, rank) <= HOPPER.shared_bytes_of_block


def test_which_columns_are_taken():
    """Gemma 4's, Qwen3's and GPT-OSS's; not those that fill no cluster, and no rank beyond."""
    assert all(tiling(columns, 16) for columns in (704, 1408, 1536, 2048, 2816, 2880, 4096, 5760, 6144))
    assert all(tiling(columns, MAX_RANK) for columns in (704, 1408, 1536, 2048, 2816))
    assert tiling(16384, 16) is None
    assert tiling(2816, 2 * MAX_RANK) is None
