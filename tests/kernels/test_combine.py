"""combine.cu against the weighted sum in float64."""

import pytest
import torch

from cupymoe.kernels.combine import combine
from tests.helpers import DTYPES, assert_ulps
from tests.kernels.test_gather import COLUMNS, random_slots

pytestmark = pytest.mark.gpu


def weighted_sum(expert_output, slot_of_pair, top_k_weights):
    """The float64 truth and the sum of its terms' magnitudes, by which float32 sums may err."""
    rows = expert_output.double()[slot_of_pair.clamp(min=0).long()]
    terms = torch.where(slot_of_pair[..., None] >= 0, rows * top_k_weights.double()[..., None], 0.0)
    return terms.sum(1), terms.abs().sum(1)


def check(expert_output, slot_of_pair, top_k_weights):
    output = combine(expert_output, slot_of_pair, top_k_weights)
    assert output.dtype == expert_output.dtype
    assert torch.equal(combine(expert_output, slot_of_pair, top_k_weights, few=True), output)
    truth, magnitude = weighted_sum(expert_output, slot_of_pair, top_k_weights)
    # One rounding to the dtype, and one float32 rounding of at most the magnitude for each term.
    rounding = torch.finfo(output.dtype).eps / 2 if output.dtype != torch.float32 else 0.0
    allowed = truth.abs() * rounding + magnitude * slot_of_pair.shape[1] * 2**-24
    smallest = torch.finfo(output.dtype).tiny * torch.finfo(output.dtype).eps
    assert ((output.double() - truth).abs() <= allowed + smallest).all()


def random_case(num_tokens, columns, dtype, top_k=3):
    slots = random_slots(num_tokens, top_k=top_k)
    expert_output = torch.randn(slots.numel(), columns, device="cuda", dtype=dtype)
    expert_output[int((slots >= 0).sum()) :] = torch.nan  # rows without a pair must not leak
    weights = torch.randn(slots.shape, device="cuda")
    return expert_output, slots, torch.where(slots >= 0, weights, torch.nan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_is_the_weighted_sum(columns, dtype):
    for num_tokens in (1, 2, 100):
        check(*random_case(num_tokens, columns, dtype))


@pytest.mark.parametrize("top_k", [2, 7, 8, 9, 17])
def test_any_number_of_choices(top_k):
    """Odd ones and more than one group of loads."""
    check(*random_case(50, 352, torch.bfloat16, top_k))


def test_one_choice():
    slots = random_slots(50, top_k=2)[:, :1].contiguous()
    expert_output = torch.randn(100, 352, device="cuda", dtype=torch.float16)
    check(expert_output, slots, torch.randn(50, 1, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage(dtype):
    expert_output, slots, weights = random_case(20, 352, dtype)
    padded = torch.cat((expert_output.new_zeros(1), expert_output.flatten()))
    check(padded[1:].view(expert_output.shape), slots, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_a_pair_are_zero(dtype):
    slots = torch.full((9, 3), -1, device="cuda", dtype=torch.int32)
    expert_output = torch.full((27, 352), torch.nan, device="cuda", dtype=dtype)
    output = combine(expert_output, slots, torch.full((9, 3), torch.nan, device="cuda"))
    assert torch.equal(output, torch.zeros_like(output))


def test_order_of_the_sum_is_fixed():
    """k = 0, 1, ...: 2^24 + 1 - 2^24 is 0 in float32, and 2^24 - 2^24 + 1 is 1."""
    expert_output = torch.ones(3, 8, device="cuda")
    slots = torch.arange(3, device="cuda", dtype=torch.int32)[None]
    for weights, expected in (([2.0**24, 1.0, -(2.0**24)], 0.0), ([2.0**24, -(2.0**24), 1.0], 1.0)):
        output = combine(expert_output, slots, torch.tensor([weights], device="cuda"))
        assert torch.equal(output, torch.full((1, 8), expected, device="cuda"))


def test_one_rounding():
    """A weight of one gives back every value; NaN and infinities of a kept row stay."""
    expert_output = torch.randn(64, 1024, device="cuda").to(torch.bfloat16)
    expert_output[3, 5], expert_output[4, 6] = torch.nan, torch.inf
    slots = torch.arange(64, device="cuda", dtype=torch.int32)[:, None]
    output = combine(expert_output, slots, torch.ones(64, 1, device="cuda"))
    assert_ulps(output, expert_output.double(), 0)
