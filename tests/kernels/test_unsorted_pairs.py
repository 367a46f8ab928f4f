"""experts_up_wgmma.cu and experts_down_wgmma.cu on pairs that they put in order themselves, against sorted ones."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from cupymoe import MoEActivation, fused_experts
from cupymoe.backends.fused import sorts_in_tiles
from cupymoe.kernels.expert_map import map_kind
from cupymoe.kernels.expert_tiles import CUTS, cut, few_pairs, tile_shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.sort_by_expert import sort_by_expert
from cupymoe.kernels.unsorted_pairs import MAX_PAIRS, PairsKind, UnsortedPairs
from cupymoe.ops import experts_call
from tests.helpers import no_host_sync, poison_free_memory, random_biases, random_experts, transposed
from tests.kernels.tiles import multiply

INVARIANT = {"activation": MoEActivation.GELU_TANH, "numerics": "invariant"}
GEMMA_4 = 128, 2816, 704


def test_which_calls_need_no_sort_before():
    case = random_experts(16, 128, 32, 24, 8)
    call = experts_call(*case[:4], **INVARIANT)
    assert call.load.num_pairs == MAX_PAIRS
    assert sorts_in_tiles(call)
    assert not sorts_in_tiles(call._replace(num_tokens=17))
    assert not sorts_in_tiles(call._replace(adapter_rank=16))
    assert not sorts_in_tiles(call._replace(weight_format="int8"))


@pytest.mark.parametrize("num_experts", [1, 2, 8, 128, 1024])
def test_no_expert_of_so_few_pairs_has_more_slots_than_a_tile(num_experts):
    """The kernels have blocks without clusters then, and each expert that is hit has one tile of slots."""
    for num_pairs in range(1, MAX_PAIRS + 1):
        assert cut(Load.of(num_pairs, 1, num_experts), 704) == CUTS[-1] == (1, 2)
    shape = tile_shape_of(*CUTS[-1], torch.bfloat16, MoEActivation.SILU, num_experts, 2816, 704)
    for tiling in (shape.up, shape.down):
        assert tiling.blocks == 1
        assert tiling.products * 128 >= MAX_PAIRS


def test_a_ring_loses_no_stage_to_the_plan():
    """At Gemma 4's sizes, the widest tiles among them."""
    widths = set()
    for few, is_transposed in product((0, 8, 64), (False, True)):
        layout = {"gate_up_transposed": is_transposed, "down_transposed": is_transposed, "few_pairs": few}
        shape = tile_shape_of(1, 2, torch.bfloat16, MoEActivation.GELU_TANH, *GEMMA_4, **layout)
        unsorted = replace(shape, unsorted=PairsKind(torch.int64, 8))
        assert (unsorted.up.stages, unsorted.down.stages) == (shape.up.stages, shape.down.stages)
        widths |= {shape.up.block_n, shape.down.block_n}
    assert max(widths) == 192


def run(case, expert_map=None, *, is_sorted, **more):
    """Each pair's slot, and the experts' outputs in the order of the slots, on poisoned memory."""
    poison_free_memory()
    num_experts, _, intermediate_size = case.down_proj.shape
    index = case.top_k_index
    load = Load.of(*index.shape, num_experts)
    if is_sorted:
        pairs, kind = sort_by_expert(index, num_experts, expert_map=expert_map), None
    else:
        pairs = UnsortedPairs.of(index, expert_map)
        kind = PairsKind(index.dtype, index.shape[1], map_kind(expert_map))
    few = few_pairs(load)
    intermediate, output = multiply(case, pairs, cut(load, intermediate_size), **more, few_pairs=few, unsorted=kind)
    kept = int((pairs.slot_of_pair >= 0).sum())
    return pairs.slot_of_pair, intermediate[:kept], output[:kept]


def check(case, expert_map=None, **more):
    """Slots and bits are those behind a sort, and nothing that lay in memory is among them."""
    found, expected = (run(case, expert_map, is_sorted=is_sorted, **more) for is_sorted in (False, True))
    assert found[2].isfinite().all()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


SIZES = [(8, 256, 176), (33, 192, 88), (128, 256, 176)]
"""Experts, hidden and intermediate size."""


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_every_slot(index_dtype, sizes, top_k):
    for num_tokens in (1, 2, 3, 5, 8, 15, 16):
        case = random_experts(num_tokens, *sizes, top_k, dtype=torch.bfloat16, device="cuda")
        check(case._replace(top_k_index=case.top_k_index.to(index_dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [1, 3, 8, 128, 1000])
def test_all_pairs_on_one_expert(num_experts):
    """Which then has up to 128 slots; a token may name it more than once."""
    for num_tokens, top_k in ((1, 1), (1, 8), (9, 8), (16, 8), (65, 1), (128, 1)):
        case = random_experts(num_tokens, num_experts, 192, 88, 1, dtype=torch.bfloat16, device="cuda")
        for expert in {0, num_experts // 2, num_experts - 1}:
            index = torch.full((num_tokens, top_k), expert, device="cuda")
            check(case._replace(top_k_index=index))


@pytest.mark.gpu
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_masked_pairs(index_dtype):
    """Of some tokens all; -1, E and what lies far outside, in int64 also a valid expert in the low 32 bits."""
    info = torch.iinfo(index_dtype)
    masks = [-1, 33, 34, info.max, info.min, *([2**32, 2**32 + 3] if index_dtype == torch.int64 else [])]
    masks = torch.tensor(masks, dtype=index_dtype, device="cuda")
    for num_tokens in (1, 2, 7, 16):
        case = random_experts(num_tokens, 33, 192, 88, 8, dtype=torch.bfloat16, device="cuda")
        index = case.top_k_index.to(index_dtype)
        drawn = masks[torch.randint(len(masks), index.shape, device="cuda")]
        for share in (0.2, 0.9, 2.0):
            some = torch.where(torch.rand(index.shape, device="cuda") < share, drawn, index)
            some[::3] = drawn[::3]
            check(case._replace(top_k_index=some))


@pytest.mark.gpu
@pytest.mark.parametrize("map_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_expert_maps(index_dtype, map_dtype):
    """Half of the experts are here, and two of the world's may be the same one."""
    expert_map = torch.randperm(66, device="cuda").sub(33).to(map_dtype)
    expert_map[3], expert_map[4] = 5, 33
    for num_tokens in (1, 2, 7, 16):
        case = random_experts(num_tokens, 33, 192, 88, 8, dtype=torch.bfloat16, device="cuda")
        index = torch.randint(-1, 67, case.top_k_index.shape, device="cuda").to(index_dtype)
        check(case._replace(top_k_index=index), expert_map)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL])
@pytest.mark.parametrize("transposed_weights", [(), ("gate_up_proj", "down_proj")], ids=["rows", "transposed"])
def test_every_kind_of_experts(transposed_weights, activation):
    for num_tokens, dtype in ((1, torch.bfloat16), (16, torch.bfloat16), (5, torch.float16)):
        case = random_experts(num_tokens, 40, 272, 72, 3, dtype=dtype, device="cuda", activation=activation)
        case = case._replace(**{name: transposed(getattr(case, name)) for name in transposed_weights})
        for wanted in ((False, False), (True, True)):
            check(case, activation=activation, **random_biases(case, wanted))


@pytest.mark.gpu
def test_gemma_4_s_sizes():
    for num_tokens in range(1, 17):
        check(random_experts(num_tokens, *GEMMA_4, 8, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.gpu
def test_calls_one_after_the_other_under_replay():
    """Each kernel begins while the one before still runs, also where a graph changes the choices between calls."""
    cases = [random_experts(count, 32, 256, 176, 8, dtype=torch.bfloat16, device="cuda") for count in (1, 4, 16)]
    weights = cases[0][1:3]

    def compute(case, index):
        return fused_experts(case.hidden_states, *weights, index, case.top_k_weights, **INVARIANT)

    for case in cases:
        indices = [torch.randint(-1, 32, case.top_k_index.shape, device="cuda") for _ in range(8)]
        repeats = 1 + 128 // len(case.hidden_states)
        many = [
            fused_experts(
                case.hidden_states.repeat(repeats, 1),
                *weights,
                index.repeat(repeats, 1),
                case.top_k_weights.repeat(repeats, 1),
                **INVARIANT,
            )[: len(index)]
            for index in indices
        ]
        compute(case, indices[0])
        with no_host_sync():
            outputs = [compute(case, index) for index in indices]
        assert all(torch.equal(one, other) for one, other in zip(outputs, many, strict=True))
        index = indices[0].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = compute(case, index)
            index.copy_(index.roll(1, 0))
            second = compute(case, index)
        for given in indices:
            index.copy_(given)
            graph.replay()
            assert torch.equal(first, compute(case, given))
            assert torch.equal(second, compute(case, given.roll(1, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 9, 16])
def test_what_is_kept_is_in_the_same_order(num_tokens):
    """A forward with gradients sorts before, and its outputs have the same bits."""
    case = random_experts(num_tokens, 32, 256, 176, 8, dtype=torch.bfloat16, device="cuda")
    expected = fused_experts(*case, **INVARIANT)
    states = case.hidden_states.clone().requires_grad_()
    output = fused_experts(states, *case[1:], **INVARIANT)
    assert torch.equal(output, expected)
    output.float().sum().backward()
    assert states.grad.isfinite().all()
