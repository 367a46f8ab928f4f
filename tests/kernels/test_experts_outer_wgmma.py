"""experts_outer_wgmma.cu against the product over each expert's slots in float64."""

from itertools import pairwise

import pytest
import torch

from cupymoe.kernels.experts_outer_wgmma import BLOCK_K, BLOCK_M, BLOCK_N, STAGES, experts_outer_wgmma, variant
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import compiled, poison_free_memory

DTYPES = (torch.bfloat16, torch.float16)
SHARED_BYTES_OF_HOPPER = 227 * 1024


def test_the_ring_fits_a_multiprocessor():
    ring = STAGES * (BLOCK_M + BLOCK_N) * BLOCK_K * 2
    assert ring + 16 * STAGES <= SHARED_BYTES_OF_HOPPER
    assert STAGES * BLOCK_K >= 256


def test_compiles_without_spills():
    report = compiled(variant(torch.bfloat16, left_gathered=True), "sm_90a")
    assert report.spill_bytes == 0, report.log
    assert "C75" not in report.log, report.log  # products that are serialised


# Slots of each expert: at the bounds of a product, of a stage, of two and of the ring; none, first and last too.
COUNTS = [0, 1, 63, 64, 65, 0, 0, 127, 128, 129, 15, 16, 17, 48, 49, 300, 0]
# (M, N): Gemma 4's two weights, either way round, and what ends in a product, a group and a pack of columns.
SIZES = [(2816, 704), (1408, 2816), (704, 2816), (2816, 1408), (72, 136), (8, 8), (64, 192), (328, 200), (256, 184)]
MASKED = 5


def index_of(counts):
    """[T, 1] indices in random order of which each expert has so many, and some that are masked."""
    index = torch.arange(len(counts), device="cuda").repeat_interleave(torch.tensor(counts, device="cuda"))
    index = torch.cat((index, index.new_tensor([-1, len(counts), 10**9, -5, -1])))
    return index[torch.randperm(len(index), device="cuda")][:, None]


def random_case(index, num_experts, lines, columns, left_gathered, dtype=torch.bfloat16):
    """Operands and the sorted pairs. Rows past the last slot are NaN, and tokens there are none that exist."""
    pairs = sort_by_expert(index, num_experts)
    kept = int(pairs.expert_offsets[-1])
    pairs.token_of_slot[kept:] = 2**30
    rows = (index.shape[0], index.numel())
    num_left, num_right = rows if left_gathered else reversed(rows)
    left = torch.randn(num_left, lines, device="cuda", dtype=dtype)
    right = torch.randn(num_right, columns, device="cuda", dtype=dtype)
    (right if left_gathered else left)[kept:] = torch.nan
    return left, right, pairs


def slot_rows(left, right, pairs, first, past, left_gathered):
    """Both operands' rows of these slots, in float64."""
    tokens = pairs.token_of_slot[first:past].long()
    both = (left[tokens], right[first:past]) if left_gathered else (left[first:past], right[tokens])
    return [rows.double() for rows in both]


def check(left, right, pairs, num_experts, left_gathered):
    """Every element within one rounding and fp32 sums of its terms; the error in norm is that of the rounding."""
    poison_free_memory()
    output = experts_outer_wgmma(left, right, pairs, num_experts, left_gathered=left_gathered)
    assert output.dtype == left.dtype
    assert output.shape == (num_experts, left.shape[1], right.shape[1])
    info = torch.finfo(output.dtype)
    truth = torch.zeros(output.shape, dtype=torch.float64, device="cuda")
    for expert, (first, past) in enumerate(pairwise(pairs.expert_offsets.tolist())):
        if past == first:
            assert not output[expert].any(), expert
            continue
        its_left, its_right = slot_rows(left, right, pairs, first, past, left_gathered)
        torch.mm(its_left.T, its_right, out=truth[expert])
        # The tensor cores add up with 24 bits, but cut off where float32 would round.
        allowed = (
            truth[expert].abs() * (info.eps / 2) + its_left.abs().T @ its_right.abs() * (past - first + 8) * 2.0**-23
        )
        errors = (output[expert].double() - truth[expert]).abs()
        assert (errors <= 1.01 * allowed + info.smallest_normal * info.eps).all(), expert
    bound = 0.003 * info.eps / torch.finfo(torch.bfloat16).eps
    assert (output.double() - truth).norm() <= bound * truth.norm()
    return output


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("left_gathered", [True, False])
def test_sizes_and_counts(left_gathered, sizes):
    check(*random_case(index_of(COUNTS), len(COUNTS), *sizes, left_gathered), len(COUNTS), left_gathered)


@pytest.mark.gpu
@pytest.mark.parametrize("left_gathered", [True, False])
def test_float16(left_gathered):
    case = random_case(index_of(COUNTS), len(COUNTS), 328, 200, left_gathered, torch.float16)
    check(*case, len(COUNTS), left_gathered)


@pytest.mark.gpu
@pytest.mark.parametrize("left_gathered", [True, False])
def test_several_choices_of_a_token(left_gathered):
    """A token's row is that of several slots; a third of the pairs are masked, and experts beyond 40 are empty."""
    index = torch.rand(700, 128, device="cuda")[:, :40].topk(6).indices
    index[index % 3 == 0] = -1
    check(*random_case(index, 128, 400, 264, left_gathered), 128, left_gathered)


@pytest.mark.gpu
@pytest.mark.parametrize("left_gathered", [True, False])
def test_all_tokens_on_one_expert_and_none_at_all(left_gathered):
    for expert in (0, 5, 7, -1):
        index = torch.full((3000, 1), expert, device="cuda")
        check(*random_case(index, 8, 264, 400, left_gathered), 8, left_gathered)


@pytest.mark.gpu
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("left_gathered", [True, False])
def test_nan_of_an_expert_stays_there(left_gathered, side):
    """In the rows of one expert's slots, whose neighbours are in the same stage of the ring."""
    counts = [70, 33, 5, 100]
    left, right, pairs = random_case(index_of(counts), 4, 136, 200, left_gathered)
    clean = check(left, right, pairs, 4, left_gathered)
    first, past = pairs.expert_offsets[1:3].tolist()
    is_gathered = left_gathered == (side == 0)
    rows = pairs.token_of_slot[first:past].long() if is_gathered else torch.arange(first, past, device="cuda")
    (left, right)[side][rows] = torch.nan
    output = experts_outer_wgmma(left, right, pairs, 4, left_gathered=left_gathered)
    assert output[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(output[others], clean[others])


@pytest.mark.gpu
@pytest.mark.parametrize("left_gathered", [True, False])
def test_same_bits_every_time_on_a_side_stream_and_in_a_graph(left_gathered):
    index = torch.rand(2000, 64, device="cuda").topk(8).indices
    left, right, pairs = random_case(index, 64, 2816, 704, left_gathered)

    def run():
        return experts_outer_wgmma(left, right, pairs, 64, left_gathered=left_gathered)

    first = run()
    assert all(torch.equal(run(), first) for _ in range(20))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        on_side = run()
    side.synchronize()
    assert torch.equal(on_side, first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        captured.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, first)


@pytest.mark.gpu
def test_the_other_way_round_is_the_transpose():
    """Sums are over ascending slots either way, so the bits are the same."""
    left, right, pairs = random_case(index_of(COUNTS), len(COUNTS), 328, 200, True)
    output = experts_outer_wgmma(left, right, pairs, len(COUNTS), left_gathered=True)
    turned = experts_outer_wgmma(right, left, pairs, len(COUNTS), left_gathered=False)
    assert torch.equal(turned, output.transpose(1, 2))
