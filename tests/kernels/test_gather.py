"""gather.cu against indexing."""

import pytest
import torch

from cupymoe.kernels.gather import gather
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import DTYPES, every_value, poison_free_memory

pytestmark = pytest.mark.gpu

# Odd, below a warp's packs, whole packs, Gemma 4's, and more than one block a row.
COLUMNS = [1, 13, 88, 352, 2816, 5000]


def random_slots(num_tokens, num_experts=12, top_k=3, masked=True):
    index = torch.randint(num_experts, (num_tokens, top_k), device="cuda")
    if masked:
        index[::3, 1], index[1::4, 0] = -1, num_experts
    return sort_by_expert(index, num_experts).slot_of_pair


def check(hidden_states, slot_of_pair):
    gathered = gather(hidden_states, slot_of_pair)
    assert gathered.shape == (slot_of_pair.numel(), hidden_states.shape[1])
    token, k = torch.where(slot_of_pair >= 0)
    rows = gathered[slot_of_pair[token, k].long()]
    bits = torch.int32 if hidden_states.dtype == torch.float32 else torch.int16
    assert torch.equal(rows.view(bits), hidden_states[token].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_is_indexing(columns, dtype):
    for num_tokens in (1, 2, 100):
        check(torch.randn(num_tokens, columns, device="cuda", dtype=dtype), random_slots(num_tokens))


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage(dtype):
    hidden_states = torch.randn(10 * 352 + 1, device="cuda", dtype=dtype)[1:].view(10, 352)
    check(hidden_states, random_slots(10))


def test_moves_bits():
    """NaN payloads, subnormals and the sign of zero among them."""
    check(every_value(torch.bfloat16, "cuda").view(64, 1024), random_slots(64, masked=False))


def test_masked_pairs_write_nothing():
    poison_free_memory()
    slots = random_slots(100)
    kept = int((slots >= 0).sum())
    gathered = gather(torch.ones(100, 352, device="cuda", dtype=torch.bfloat16), slots)
    assert (gathered[:kept] == 1).all()
    assert 0 < kept < len(gathered)
