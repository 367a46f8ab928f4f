"""experts_up_wgmma.cu and experts_down_wgmma.cu, slot by slot, against float64."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.kernels.expert_tiles import CUTS, tile_shape_of
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import poison_free_memory, random_experts, run_python

pytestmark = pytest.mark.gpu

GELU_TANH = MoEActivation.GELU_TANH
ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
FEW = torch.finfo(torch.float32).eps * 64

# (tokens, experts, hidden, intermediate, top_k): one expert with every number of 64 slots, in one tile and in more;
# sizes that end inside a box; Gemma 4's slices; many experts, some empty.
CASES = [
    (1, 1, 128, 64, 1),
    (64, 1, 128, 64, 1),
    (65, 1, 128, 64, 1),
    (129, 1, 192, 88, 1),
    (193, 1, 192, 88, 1),
    (257, 1, 192, 88, 1),
    (385, 1, 192, 88, 1),
    (530, 1, 192, 200, 1),
    (5001, 2, 64, 32, 1),
    (1001, 5, 272, 72, 3),
    (777, 3, 16, 8, 2),
    (1000, 16, 2816, 352, 4),
    (700, 16, 2816, 176, 4),
    (333, 128, 2816, 704, 8),
    (400, 700, 96, 40, 5),
]


def multiply(case, cut, activation=GELU_TANH):
    """Pairs in expert order, what experts_up gives, what experts_down makes of it; past the last slot, anything."""
    num_experts, hidden, intermediate_size = case.down_proj.shape
    shape = tile_shape_of(*cut, case.hidden_states.dtype, activation, num_experts, hidden, intermediate_size)
    pairs = sort_by_expert(case.top_k_index, num_experts)
    intermediate = experts_up_wgmma(case.hidden_states, case.gate_up_proj, pairs, shape)
    return pairs, intermediate, experts_down_wgmma(intermediate, case.down_proj, pairs, shape)


def run(case, cut, activation=GELU_TANH):
    """The same on poisoned memory, without the unused rows."""
    poison_free_memory()
    pairs, intermediate, output = multiply(case, cut, activation)
    kept = int(pairs.expert_offsets[-1])
    return pairs, intermediate[:kept], output[:kept]


def check(case, cut, activation=GELU_TANH):
    pairs, intermediate, output = run(case, cut, activation)
    ulp = ULP[intermediate.dtype]
    offsets = pairs.expert_offsets.tolist()
    for expert, (first, last) in enumerate(pairwise(offsets)):
        tokens = pairs.token_of_slot[first:last].long()
        gate_up = case.hidden_states[tokens].double() @ case.gate_up_proj[expert].double().T
        truth = reference.activate(gate_up, activation)
        assert ((intermediate[first:last].double() - truth).abs() <= ulp * truth.abs() + FEW * 8).all(), expert
        truth = intermediate[first:last].double() @ case.down_proj[expert].double().T
        assert ((output[first:last].double() - truth).abs() <= ulp * truth.abs() + FEW * 8).all(), expert


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("cut", CUTS)
def test_every_slot(cut, sizes):
    check(random_experts(*sizes, dtype=torch.bfloat16, device="cuda"), cut)


@pytest.mark.parametrize("cut", CUTS)
def test_float16(cut):
    check(random_experts(1001, 5, 272, 72, 3, dtype=torch.float16, device="cuda"), cut)


@pytest.mark.parametrize("activation", [each for each in MoEActivation if each.is_gated and not each.is_interleaved])
@pytest.mark.parametrize("cut", CUTS)
def test_activations(cut, activation):
    case = random_experts(300, 4, 256, 96, 2, dtype=torch.bfloat16, device="cuda", activation=activation)
    check(case, cut, activation)


@pytest.mark.parametrize("cut", CUTS)
def test_more_tiles_of_slots_than_a_group(cut):
    """One expert has 20 tiles of slots, the others what is left."""
    case = random_experts(6000, 7, 128, 88, 1, dtype=torch.bfloat16, device="cuda")
    index = case.top_k_index.clone()
    index[:5000] = 3
    check(case._replace(top_k_index=index), cut)


@pytest.mark.parametrize("cut", CUTS)
def test_masked_pairs_and_empty_experts(cut):
    case = random_experts(900, 40, 256, 88, 6, dtype=torch.bfloat16, device="cuda")
    index = case.top_k_index.clone()
    index[index % 3 == 0] = -1
    check(case._replace(top_k_index=index), cut)
    run(case._replace(top_k_index=torch.full_like(index, 40)), cut)
    torch.cuda.synchronize()


@pytest.mark.parametrize("num_tokens", [1000, 4999])
def test_same_bits_from_either_cluster_and_every_time(num_tokens):
    case = random_experts(num_tokens, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
    _, *first = run(case, CUTS[0])
    for cut in (*CUTS, CUTS[-1]):
        _, *again = run(case, cut)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


SIDE_BY_SIDE = """
import torch
from tests.helpers import random_experts
from tests.kernels.test_experts_wgmma import multiply

torch.manual_seed(0)
case = random_experts(500, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
_, _, first = multiply(case, (2, 2))
for _ in range(30):
    for _ in range(100):
        _, _, again = multiply(case, (2, 2))
    assert torch.equal(again, first)
print("as the first")
"""


def test_processes_side_by_side():
    """Experts with few slots leave the second block of a cluster without any, and processes delay each other's blocks:
    one came too late to a stage that was filled and emptied without it, and waited for ever."""
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: run_python(SIDE_BY_SIDE), range(3))) == ["as the first\n"] * 3
