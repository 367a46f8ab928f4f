"""lora_shrink_chunks.cu against the product of each slot's row with its expert's factor in float64."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.kernels.expert_stream import shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.lora_shrink_chunks import lora_shrink_chunks
from cupymoe.kernels.plan_experts import plan_experts
from cupymoe.kernels.stream_regimes import regime
from cupymoe.kernels.stream_workspace import new_workspace
from tests.helpers import poison_free_memory, random_routing, transposed
from tests.kernels.test_lora_shrink import RANKS, assert_close

pytestmark = pytest.mark.gpu

# (experts, hidden, intermediate, top_k) and numbers of tokens: of each regime; depths that end inside a step, that are
# less than one, and that are more than a block's warps take at once.
CASES = [
    ((6, 264, 200, 3), (1, 7, 20, 45, 100)),
    ((16, 72, 8, 4), (5, 45)),
    ((8, 2816, 1608, 2), (1, 9, 200)),
]
KINDS = ["gathered", "of slots"]


class Chunks:
    """A routing with masked pairs and an expert without tokens, its plan, rows, and where its slots begin."""

    def __init__(self, num_tokens, sizes, rank, dtype, *, gathered, is_transposed=False, index_dtype=torch.int64):
        num_experts, hidden, intermediate, top_k = sizes
        index = random_routing(num_tokens, num_experts, top_k, "cuda")[1]
        index[index == 1] = 2
        index[3::7, 0], index[4::9, 1], index[5::6] = -1, num_experts, num_experts + 1
        self.top_k_index = index.to(index_dtype)
        self.shape = shape_of(
            regime(Load.of(num_tokens, top_k, num_experts), intermediate),
            dtype,
            index_dtype,
            MoEActivation.GELU_TANH,
            num_experts,
            hidden,
            intermediate,
            top_k,
            is_transposed,
            is_transposed,
            gate_up_rank=rank,
            down_rank=rank,
        )
        flat = index.flatten()
        flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
        pair_of_slot = flat.argsort(stable=True)
        counts = flat.bincount(minlength=num_experts + 1)[:num_experts]
        self.offsets = [0, *counts.cumsum(0).tolist()]
        kept = self.offsets[-1]
        self.gathered, depth = gathered, hidden if gathered else intermediate
        row_of_slot = pair_of_slot[:kept] // top_k if gathered else torch.arange(kept, device="cuda")
        self.rows = torch.randn(num_tokens if gathered else num_tokens * top_k, depth, device="cuda", dtype=dtype)
        is_read = torch.zeros(len(self.rows), dtype=torch.bool, device="cuda").index_fill_(0, row_of_slot, True)
        self.rows[~is_read] = torch.nan
        self.of_slots = self.rows[row_of_slot]
        self.factor = torch.randn(num_experts, rank, depth, device="cuda", dtype=dtype)
        if is_transposed:
            self.factor = transposed(self.factor)

    def low(self):
        """``[T * K, R]``, NaN where nothing was written."""
        num_pairs = self.top_k_index.numel()
        workspace = new_workspace(self.rows, self.shape, num_pairs)
        memory, base = workspace.memory, workspace.memory.data_ptr()
        memory.fill_(255)
        if not self.shape.regime.inline_pairs:
            plan_experts(self.top_k_index, self.shape.num_experts, self.shape.regime.tokens, workspace)
        if not self.gathered:  # between the plan and what reads it as one that is two launches old
            memory[workspace.intermediate - base :][: self.rows.nbytes] = self.rows.flatten().view(torch.uint8)
        states = self.rows if self.gathered else None
        lora_shrink_chunks(self.factor, self.top_k_index, self.shape, workspace, states)
        start = (workspace.gate_up_low if self.gathered else workspace.down_low) - base
        size = num_pairs * self.factor.shape[1] * self.rows.itemsize
        return memory[start : start + size].view(self.rows.dtype).view(num_pairs, -1)

    def check(self):
        poison_free_memory()
        low = self.low()
        for expert, (first, past) in enumerate(pairwise(self.offsets)):
            left, right = self.of_slots[first:past].double(), self.factor[expert].double().T
            assert_close(low[first:past], left @ right, left.abs() @ right.abs())
        assert low[self.offsets[-1] :].isnan().all()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(("sizes", "tokens"), CASES)
def test_every_slot(sizes, tokens, rank, kind, is_transposed):
    for num_tokens in tokens:
        Chunks(
            num_tokens, sizes, rank, torch.bfloat16, gathered=kind == "gathered", is_transposed=is_transposed
        ).check()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_float16_and_int32(kind, is_transposed):
    for num_tokens in (3, 45):
        Chunks(
            num_tokens,
            (6, 264, 200, 3),
            16,
            torch.float16,
            gathered=kind == "gathered",
            is_transposed=is_transposed,
            index_dtype=torch.int32,
        ).check()


@pytest.mark.parametrize("num_tokens", [4, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_kept(kind, num_tokens):
    """No chunk at all: every block ends without a slot."""
    chunks = Chunks(num_tokens, (6, 264, 200, 3), 16, torch.bfloat16, gathered=kind == "gathered")
    chunks.top_k_index.fill_(-1)
    assert chunks.low().isnan().all()


@pytest.mark.parametrize("num_tokens", [5, 20, 60, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_those_of_the_transposed_factor_and_of_every_run(kind, num_tokens):
    chunks = Chunks(num_tokens, (6, 264, 200, 3), 48, torch.bfloat16, gathered=kind == "gathered")
    first = chunks.low()[: chunks.offsets[-1]]
    for _ in range(8):
        poison_free_memory()
        assert torch.equal(chunks.low()[: chunks.offsets[-1]], first)
    chunks.factor = transposed(chunks.factor)
    chunks.shape = replace(chunks.shape, gate_up_transposed=True, down_transposed=True)
    assert torch.equal(chunks.low()[: chunks.offsets[-1]], first)
