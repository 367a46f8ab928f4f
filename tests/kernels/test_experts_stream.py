"""experts_up and experts_down on CUDA, through whole calls: kinds of experts, their layouts, and many experts."""

import os

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.backends import ExpertsTensors
from cupymoe.backends.fused import stream
from cupymoe.kernels.arch import BUILDS
from cupymoe.ops import experts_call
from tests.helpers import (
    Experts,
    laid_out,
    max_error,
    oracle,
    poison_free_memory,
    random_biases,
    random_experts,
    relative_error,
    rounded_experts,
)
from tests.kernels.test_expert_stream import EITHER

pytestmark = pytest.mark.gpu

# The switch: CUPYMOE_TEST_BUILD=sm_86, say, has these tests run that build's kernels instead of the device's own.
BUILD = BUILDS[os.environ["CUPYMOE_TEST_BUILD"]] if "CUPYMOE_TEST_BUILD" in os.environ else None

# Of gate and up: concatenated, interleaved, ungated.
ACTIVATIONS = [MoEActivation.SILU, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL]
# Of both projections: whether they are transposed, and whether they have a bias.
KINDS = [
    ((False, False), (True, True)),
    ((True, True), (True, True)),
    ((True, True), (False, False)),
    ((True, False), (False, True)),
    ((False, True), (True, False)),
]
# (experts, hidden, intermediate, top_k), dtype and numbers of tokens. Sizes that fit no tile and no stage, with a
# number of tokens for each regime; fewer units than blocks; and more choices of a token than combine loads together,
# where the experts' outputs are float32 and where they have the dtype.
CASES = [
    ((6, 264, 200, 3), torch.bfloat16, (2, 7, 20, 45, 100)),
    ((16, 72, 8, 4), torch.float16, (5, 45)),
    ((32, 72, 8, 9), torch.bfloat16, (5, 45)),
    ((32, 72, 8, 10), torch.float16, (5, 45)),
]


def streamed(case, activation, gate_up_bias=None, down_bias=None, build=BUILD, kept=None):
    """The call by the weight stream, whatever the backend would choose."""
    biased = gate_up_bias is not None or down_bias is not None
    call = experts_call(*case[:4], activation, has_bias=biased)
    tensors = ExpertsTensors(*case, gate_up_bias=gate_up_bias, down_bias=down_bias)
    return stream(call, tensors, kept=kept, arch=build)


def check(output, case, activation, **biases):
    """Not further from float64 than a path that rounds at every step: as a whole, and twice that in any element."""
    truth, steps = oracle(case, activation, **biases), rounded_experts(case, activation, **biases)
    assert output.isfinite().all()
    assert relative_error(output, truth) <= relative_error(steps, truth)
    assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6


def odd_case(num_tokens, sizes, activation, dtype):
    """Masked pairs, an expert without tokens, and one with more than others."""
    case = random_experts(num_tokens, *sizes, dtype=dtype, device="cuda", activation=activation)
    case.top_k_index[case.top_k_index == 1] = 2
    case.top_k_index[3::7, 0], case.top_k_index[4::9, 1] = -1, sizes[0]
    return case


@pytest.mark.parametrize(("sizes", "dtype", "tokens"), CASES)
@pytest.mark.parametrize(("layout", "biased"), KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_kind_of_experts(activation, layout, biased, sizes, dtype, tokens):
    """In every regime; what no kernel wrote is NaN."""
    for num_tokens in tokens:
        case = laid_out(odd_case(num_tokens, sizes, activation, dtype), layout)
        biases = random_biases(case, biased)
        poison_free_memory()
        check(streamed(case, activation, **biases), case, activation, **biases)


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 33, 128])
def test_gpt_oss(num_tokens):
    """Transposed, interleaved and biased, at the sizes of the 20b model."""
    case = random_experts(
        num_tokens, 32, 2880, 2880, 4, dtype=torch.bfloat16, device="cuda", activation=MoEActivation.SWIGLUOAI
    )
    case = laid_out(case, (True, True))
    biases = random_biases(case)
    output = streamed(case, MoEActivation.SWIGLUOAI, **biases)
    check(output, case, MoEActivation.SWIGLUOAI, **biases)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_transposed_weight_gives_the_bits_of_its_transpose(activation):
    """Where neither layout's tile splits a stage's depth among warps, sums have one order."""
    case = odd_case(180, (5, 328, 200, 2), activation, torch.bfloat16)
    biases = random_biases(case)
    expected = streamed(case, activation, **biases)
    for layout in EITHER:
        assert torch.equal(streamed(laid_out(case, layout), activation, **biases), expected)


@pytest.mark.parametrize(("few", "many"), [(2, 16), (17, 32), (33, 128)])
def test_a_token_does_not_depend_on_the_others_of_its_regime(few, many):
    activation = MoEActivation.SWIGLUOAI
    case = random_experts(many, 32, 264, 200, 4, dtype=torch.bfloat16, device="cuda", activation=activation)
    case = laid_out(case, (True, True))
    biases = random_biases(case)
    first = Experts(case.hidden_states[:few], *case[1:3], case.top_k_index[:few], case.top_k_weights[:few])
    expected = streamed(case, activation, **biases)[:few]
    assert torch.equal(streamed(first, activation, **biases), expected)


@pytest.mark.parametrize("num_tokens", [2, 40])
def test_a_bias_that_was_overwritten_is_read_anew(num_tokens):
    """The first-level cache may hold the call before's."""
    case = random_experts(num_tokens, 4, 64, 64, 2, dtype=torch.bfloat16, device="cuda", activation=MoEActivation.SILU)
    biases = random_biases(case)
    for _ in range(20):
        check(streamed(case, MoEActivation.SILU, **biases), case, MoEActivation.SILU, **biases)
        for bias in biases.values():
            bias.copy_(torch.randn_like(bias))


@pytest.mark.parametrize("num_tokens", [1, 12, 1365])
@pytest.mark.parametrize("num_experts", [512, 1024])
def test_many_experts(num_experts, num_tokens):
    """Up to 8190 pairs; the first and the last expert are among those that are chosen."""
    case = random_experts(
        num_tokens, num_experts, 136, 72, 6, dtype=torch.bfloat16, device="cuda", activation=MoEActivation.SILU
    )
    case.top_k_index[0, 0], case.top_k_index[0, 1] = 0, num_experts - 1
    check(streamed(case, MoEActivation.SILU), case, MoEActivation.SILU)
