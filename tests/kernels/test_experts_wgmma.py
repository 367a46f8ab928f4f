"""experts_up_wgmma.cu and experts_down_wgmma.cu, slot by slot, against float64."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from cupymoe import MoEActivation, fused_experts, reference
from cupymoe.kernels.expert_tiles import CUTS
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import (
    max_error,
    oracle,
    poison_free_memory,
    random_biases,
    random_experts,
    relative_error,
    rounded_experts,
    run_python,
    transposed,
)
from tests.kernels.tiles import multiply

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


def multiply_sorted(case, cut, activation=GELU_TANH, **biases):
    """Pairs in expert order, what experts_up gives, what experts_down makes of it; past the last slot, anything."""
    pairs = sort_by_expert(case.top_k_index, case.down_proj.shape[0])
    return pairs, *multiply(case, pairs, cut, activation, **biases)


def run(case, cut, activation=GELU_TANH, **biases):
    """The same on poisoned memory, without the unused rows."""
    poison_free_memory()
    pairs, intermediate, output = multiply_sorted(case, cut, activation, **biases)
    kept = int(pairs.expert_offsets[-1])
    return pairs, intermediate[:kept], output[:kept]


def check(case, cut, activation=GELU_TANH, gate_up_bias=None, down_bias=None):
    pairs, intermediate, output = run(case, cut, activation, gate_up_bias=gate_up_bias, down_bias=down_bias)
    ulp = ULP[intermediate.dtype]
    offsets = pairs.expert_offsets.tolist()
    for expert, (first, last) in enumerate(pairwise(offsets)):
        tokens = pairs.token_of_slot[first:last].long()
        gate_up = case.hidden_states[tokens].double() @ case.gate_up_proj[expert].double().T
        if gate_up_bias is not None:
            gate_up += gate_up_bias[expert].double()
        truth = reference.activate(gate_up, activation)
        assert ((intermediate[first:last].double() - truth).abs() <= ulp * truth.abs() + FEW * 8).all(), expert
        truth = intermediate[first:last].double() @ case.down_proj[expert].double().T
        if down_bias is not None:
            truth += down_bias[expert].double()
        assert ((output[first:last].double() - truth).abs() <= ulp * truth.abs() + FEW * 8).all(), expert


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("cut", CUTS)
def test_every_slot(cut, sizes):
    check(random_experts(*sizes, dtype=torch.bfloat16, device="cuda"), cut)


@pytest.mark.parametrize("cut", CUTS)
def test_float16(cut):
    check(random_experts(1001, 5, 272, 72, 3, dtype=torch.float16, device="cuda"), cut)


@pytest.mark.parametrize("activation", MoEActivation)
@pytest.mark.parametrize("cut", CUTS)
def test_activations(cut, activation):
    case = random_experts(300, 4, 256, 96, 2, dtype=torch.bfloat16, device="cuda", activation=activation)
    check(case, cut, activation)


# Sizes whose tiles end inside a box, with a box less in the last tile and with none; k that ends inside a stage.
KIND_CASES = [
    (193, 1, 192, 88, 1),
    (530, 2, 64, 200, 1),
    (1001, 5, 272, 72, 3),
    (777, 3, 16, 8, 2),
    (1000, 8, 2880, 360, 4),
    (700, 16, 400, 520, 4),
]


@pytest.mark.parametrize("sizes", KIND_CASES)
@pytest.mark.parametrize("transposed_weights", [(), ("gate_up_proj", "down_proj")], ids=["rows", "transposed"])
@pytest.mark.parametrize("wanted", [(False, False), (True, True)], ids=["no bias", "biases"])
@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_every_kind_of_experts(cut, activation, wanted, transposed_weights, sizes):
    case = random_experts(*sizes, dtype=torch.bfloat16, device="cuda", activation=activation)
    case = case._replace(**{name: transposed(getattr(case, name)) for name in transposed_weights})
    check(case, cut, activation, **random_biases(case, wanted))


@pytest.mark.parametrize("transposed_weight", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_one_transposed_weight_one_bias_and_float16(cut, activation, transposed_weight):
    """Masked pairs and empty experts among them; the bias is the other projection's, and starts on no pack."""
    case = random_experts(1001, 40, 272, 72, 3, dtype=torch.float16, device="cuda", activation=activation)
    index = case.top_k_index.clone()
    index[index % 3 == 0] = -1
    case = case._replace(**{transposed_weight: transposed(getattr(case, transposed_weight)), "top_k_index": index})
    biases = random_biases(case, (transposed_weight == "down_proj", transposed_weight == "gate_up_proj"))
    for name, bias in biases.items():
        if bias is not None:
            biases[name] = torch.cat((bias.new_zeros(1), bias.flatten()))[1:].view(bias.shape)
            assert biases[name].data_ptr() % 4
    check(case, cut, activation, **biases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
def test_a_call_with_one_transposed_weight_and_one_bias(activation, dtype):
    """Each tensor reaches its own kernel: not further from float64 than a path that rounds at every step."""
    case = random_experts(600, 8, 272, 360, 4, dtype=dtype, device="cuda", activation=activation)
    for name, wanted in (("gate_up_proj", (False, True)), ("down_proj", (True, False))):
        turned = case._replace(**{name: transposed(getattr(case, name))})
        biases = random_biases(turned, wanted)
        poison_free_memory()
        output = fused_experts(*turned, activation=activation, backend="fused", **biases)
        truth, steps = (compute(turned, activation, **biases) for compute in (oracle, rounded_experts))
        assert relative_error(output, truth) <= relative_error(steps, truth)
        assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6


@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
def test_a_transposed_weight_gives_the_same_bits(activation):
    """Sums are over ascending k either way."""
    case = random_experts(1000, 8, 512, 256, 4, dtype=torch.bfloat16, device="cuda", activation=activation)
    turned = case._replace(gate_up_proj=transposed(case.gate_up_proj), down_proj=transposed(case.down_proj))
    biases = random_biases(case)
    _, *first = run(case, CUTS[0], activation, **biases)
    for cut in CUTS:
        _, *again = run(turned, cut, activation, **biases)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


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
from tests.kernels.test_experts_wgmma import multiply_sorted

torch.manual_seed(0)
case = random_experts(500, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
_, _, first = multiply_sorted(case, (2, 2))
for _ in range(30):
    for _ in range(100):
        _, _, again = multiply_sorted(case, (2, 2))
    assert torch.equal(again, first)
print("as the first")
"""


def test_processes_side_by_side():
    """Experts with few slots leave the second block of a cluster without any, and processes delay each other's blocks:
    one came too late to a stage that was filled and emptied without it, and waited for ever."""
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: run_python(SIDE_BY_SIDE), range(3))) == ["as the first\n"] * 3
