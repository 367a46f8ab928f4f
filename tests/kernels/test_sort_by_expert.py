"""sort_by_expert.cu against torch.sort(stable=True)."""

import pytest
import torch

from cupymoe.kernels.sort_by_expert import FEW_PAIRS, PAIRS_PER_BLOCK, TICKETS, sort_by_expert
from tests.helpers import poison_free_memory

pytestmark = pytest.mark.gpu

# One compilation for each; above 256 experts a block has fewer warps.
SIZES = [(1, 1), (8, 2), (60, 1), (64, 6), (128, 8), (192, 1), (257, 1), (1024, 8)]
BOUNDS = [bound + more for bound in (PAIRS_PER_BLOCK, FEW_PAIRS) for more in (-1, 0, 1)]
PAIRS = [1, 2, 31, 33, 1000, *BOUNDS, 2 * PAIRS_PER_BLOCK, 20000]
INDEX_DTYPES = [torch.int32, torch.int64]


def check(index, num_experts):
    weights = torch.rand(index.shape, device=index.device)
    pairs = sort_by_expert(index, num_experts, weights)
    flat = index.flatten().long()
    valid = (flat >= 0) & (flat < num_experts)
    key = torch.where(valid, flat, num_experts)
    order = torch.sort(key, stable=True).indices
    kept = int(valid.sum())

    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    assert pairs.expert_offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    slot_of_pair = torch.full_like(flat, -1)
    slot_of_pair[order[:kept]] = torch.arange(kept, device=index.device)
    assert torch.equal(pairs.slot_of_pair.long(), slot_of_pair.view(index.shape))
    assert torch.equal(pairs.token_of_slot[:kept].long(), order[:kept] // index.shape[1])
    assert torch.equal(pairs.weight_of_slot[:kept], weights.flatten()[order[:kept]])
    assert pairs.tickets.tolist() == [0] * TICKETS
    without_weights = sort_by_expert(index, num_experts)
    assert without_weights.weight_of_slot is None
    assert torch.equal(without_weights.slot_of_pair, pairs.slot_of_pair)


def random_index(num_pairs, num_experts, top_k, dtype):
    return torch.randint(num_experts, (-(-num_pairs // top_k), top_k), device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_is_a_stable_sort(num_experts, top_k, dtype):
    """Every expert hit, and with few pairs hardly any; a token may name an expert twice."""
    for num_pairs in PAIRS:
        check(random_index(num_pairs, num_experts, top_k, dtype), num_experts)


@pytest.mark.parametrize("dtype", INDEX_DTYPES)
@pytest.mark.parametrize("num_pairs", [5, 900, 3000, 20000])
def test_masked_pairs_take_no_slot(num_pairs, dtype):
    """-1, E and what lies far outside; in int64 also what is a valid expert in its low 32 bits."""
    info = torch.iinfo(dtype)
    outside = [-1, 60, 61, 1000, info.max, info.min, *([2**32, 2**32 + 3, -(2**32)] if dtype == torch.int64 else [])]
    index = random_index(num_pairs, 60, 1, dtype)
    masks = torch.tensor(outside, device="cuda", dtype=dtype)[torch.randint(len(outside), index.shape, device="cuda")]
    check(torch.where(torch.rand(index.shape, device="cuda") < 0.5, masks, index), 60)
    check(masks, 60)


@pytest.mark.parametrize("num_tokens", [1, 17, 300, 600, 2500])
@pytest.mark.parametrize("expert", [0, 77, 127])
def test_all_tokens_to_one_expert(expert, num_tokens):
    check(torch.full((num_tokens, 8), expert, device="cuda"), 128)


@pytest.mark.parametrize("num_tokens", [3, 2500])
def test_empty_experts(num_tokens):
    check(torch.randint(3, (num_tokens, 8), device="cuda") * 50, 128)


@pytest.mark.parametrize("num_pairs", [4096, 20000])
def test_same_bits_every_time(num_pairs):
    """Whatever lay in the memory that the results are written to."""
    index = random_index(num_pairs, 128, 8, torch.int64)
    weights = torch.rand(index.shape, device="cuda")
    first = sort_by_expert(index, 128, weights)
    for byte in (0x00, 0x7F, 0xFF):
        poison_free_memory(byte)
        again = sort_by_expert(index, 128, weights)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    check(index, 128)
