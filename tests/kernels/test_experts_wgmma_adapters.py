"""The tiles with an adapter's steps after those over k, slot by slot, against float64."""

from itertools import pairwise, product

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.kernels.expert_tiles import CUTS, AdapterStep, tile_shape_of
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.lora_shrink import lora_shrink
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import Experts, poison_free_memory, random_experts, relative_error, transposed
from tests.kernels.test_experts_wgmma import FEW, GELU_TANH, ULP

pytestmark = pytest.mark.gpu

# Slots of each expert: none, and at the bounds of products, of tiles, and of groups of experts.
COUNTS = [0, 1, 63, 64, 65, 129, 0, 300, 700]
MASKED = 30
SIZES = (272, 72)  # hidden and intermediate, both end inside a step of k


def random_case(dtype=torch.bfloat16, activation=GELU_TANH, hidden=SIZES[0], intermediate=SIZES[1]):
    """Tokens in random order, one expert or none for each."""
    index = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    index = torch.cat((index, torch.full((MASKED,), -1)))
    index = index[torch.randperm(len(index))][:, None].cuda()
    case = random_experts(
        len(index), len(COUNTS), hidden, intermediate, 1, dtype=dtype, device="cuda", activation=activation
    )
    return case._replace(top_k_index=index)


def random_adapter(weight, slots, rank):
    """Laid out as the weight; what it adds is as large as the products with the weight."""
    num_experts, rows, _ = weight.shape
    low = torch.randn(slots, rank, device="cuda", dtype=weight.dtype)
    low[sum(COUNTS) :] = torch.nan
    factor = torch.randn(num_experts, rows, rank, device="cuda", dtype=weight.dtype) * rank**-0.5
    return AdapterStep(low, factor if weight.is_contiguous() else transposed(factor))


def multiply(case, cut, up, down, activation=GELU_TANH):
    """Each slot's intermediate and output; the adapters are made by the callables up and down, of the slots' rows."""
    num_experts, hidden, intermediate_size = case.down_proj.shape
    pairs = sort_by_expert(case.top_k_index, num_experts)
    up_step = up(case.hidden_states, pairs)
    transposed_weights = [not weight.is_contiguous() for weight in case[1:3]]
    sizes = (num_experts, hidden, intermediate_size, *transposed_weights, False, False, False)

    def shape(up_rank, down_rank):
        return tile_shape_of(*cut, case.hidden_states.dtype, activation, *sizes, up_rank, down_rank)

    up_rank = 0 if up_step is None else up_step.low.shape[1]
    intermediate = experts_up_wgmma(case.hidden_states, case.gate_up_proj, pairs, shape(up_rank, 0), adapter=up_step)
    down_step = down(intermediate, pairs)
    down_rank = 0 if down_step is None else down_step.low.shape[1]
    output = experts_down_wgmma(intermediate, case.down_proj, pairs, shape(up_rank, down_rank), adapter=down_step)
    return pairs, intermediate, output


def check(case, cut, rank, activation=GELU_TANH):
    slots = len(case.top_k_index)
    up, down = (random_adapter(weight, slots, rank) for weight in case[1:3])
    poison_free_memory()
    pairs, intermediate, output = multiply(case, cut, lambda *_: up, lambda *_: down, activation)
    ulp = ULP[intermediate.dtype]
    for expert, (first, past) in enumerate(pairwise(pairs.expert_offsets.tolist())):
        assert past - first == COUNTS[expert]
        rows = case.hidden_states[pairs.token_of_slot[first:past].long()]
        gate_up = rows.double() @ case.gate_up_proj[expert].double().T
        gate_up += up.low[first:past].double() @ up.factor[expert].double().T
        truth = reference.activate(gate_up, activation)
        assert ((intermediate[first:past].double() - truth).abs() <= ulp * truth.abs() + FEW * 8).all(), expert
        truth = intermediate[first:past].double() @ case.down_proj[expert].double().T
        truth += down.low[first:past].double() @ down.factor[expert].double().T
        assert ((output[first:past].double() - truth).abs() <= ulp * truth.abs() + FEW * 8).all(), expert


def laid_out(case, is_transposed):
    return (
        case._replace(gate_up_proj=transposed(case.gate_up_proj), down_proj=transposed(case.down_proj))
        if is_transposed
        else case
    )


@pytest.mark.parametrize(("cut", "rank", "is_transposed"), [*product(CUTS, (16, 64, 112), (False, True))])
def test_every_slot(cut, rank, is_transposed):
    check(laid_out(random_case(), is_transposed), cut, rank)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("activation", [MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
def test_kinds_of_experts_and_float16(activation, is_transposed):
    check(laid_out(random_case(torch.float16, activation), is_transposed), (1, 3), 48, activation)


@pytest.mark.parametrize("cut", CUTS)
def test_an_adapter_of_zeros_changes_no_bit(cut):
    case = random_case()
    steps = [random_adapter(weight, len(case.top_k_index), 16) for weight in case[1:3]]
    for step in steps:
        step.low.nan_to_num_()
        step.factor.zero_()
    _, *plain = multiply(case, cut, lambda *_: None, lambda *_: None)
    _, *adapted = multiply(case, cut, lambda *_: steps[0], lambda *_: steps[1])
    assert all(torch.equal(a[: sum(COUNTS)], b[: sum(COUNTS)]) for a, b in zip(plain, adapted, strict=True))


@pytest.mark.parametrize("cut", CUTS)
def test_with_shrink_it_is_the_merged_experts(cut):
    """Every launch begins under the one before; 16 times, so that one that does not wait for it would show."""
    sizes = (2000, 16, 2816, 704, 4)
    case = random_experts(*sizes, dtype=torch.bfloat16, device="cuda")
    factors = [
        (
            torch.randn(16, 16, weight.shape[2], device="cuda", dtype=torch.bfloat16) * weight.shape[2] ** -0.5,
            torch.randn(16, weight.shape[1], 16, device="cuda", dtype=torch.bfloat16) * 0.25,
        )
        for weight in case[1:3]
    ]

    def up(rows, pairs):
        return AdapterStep(lora_shrink(rows, factors[0][0], pairs.expert_offsets, pairs.token_of_slot), factors[0][1])

    def down(rows, pairs):
        return AdapterStep(lora_shrink(rows, factors[1][0], pairs.expert_offsets), factors[1][1])

    weights = [weight.double() + b.double() @ a.double() for weight, (a, b) in zip(case[1:3], factors, strict=True)]
    merged = Experts(case.hidden_states.double(), *weights, *case[3:])
    pairs, _, first = multiply(case, cut, up, down)
    for expert, (begin, past) in enumerate(pairwise(pairs.expert_offsets.tolist())):
        rows = merged.hidden_states[pairs.token_of_slot[begin:past].long()]
        intermediate = reference.activate(rows @ weights[0][expert].T, GELU_TANH)
        assert relative_error(first[begin:past], intermediate @ weights[1][expert].T) < 0.006
    for _ in range(16):
        poison_free_memory()
        assert torch.equal(multiply(case, cut, up, down)[2], first)
