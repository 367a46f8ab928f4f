"""The truth against others' truths: torch's functions and transformers' modules, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from cupymoe import MoEActivation, reference
from tests.helpers import random_experts, randomize, transformers_config, transformers_gemma4

GRID = torch.linspace(-30, 30, 600_001, dtype=torch.float64)

FUNCTIONS = {
    MoEActivation.SILU_NO_MUL: F.silu,
    MoEActivation.GELU_NO_MUL: F.gelu,
    MoEActivation.GELU_TANH_NO_MUL: lambda x: F.gelu(x, approximate="tanh"),
    MoEActivation.RELU2_NO_MUL: lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("member", FUNCTIONS, ids=lambda member: member.name)
def test_functions_are_torch_s(member):
    # torch's 1 + erf and 1 + tanh cancel on the negative tail: an absolute 1e-15 is what they keep there.
    torch.testing.assert_close(reference.activate(GRID, member), FUNCTIONS[member](GRID), rtol=2e-15, atol=2e-15)


@pytest.mark.parametrize(
    ("member", "x", "value"),
    [
        # mpmath, 50 digits: the tail where torch's forms have cancelled to nothing.
        (MoEActivation.GELU_NO_MUL, -10.0, -7.619853024160526e-23),
        (MoEActivation.GELU_TANH_NO_MUL, -10.0, -1.204092348209806e-37),
        (MoEActivation.SILU_NO_MUL, -50.0, -9.643749239819588e-21),
    ],
)
def test_negative_tail_does_not_cancel(member, x, value):
    got = reference.activate(torch.tensor([x], dtype=torch.float64), member).item()
    assert math.isclose(got, value, rel_tol=1e-12)


def test_erf_and_tanh_differ_as_they_must():
    """A swapped formula is caught: the two GELUs are 4.73e-4 apart at |x| = 2.70."""
    difference = (
        reference.activate(GRID, MoEActivation.GELU_NO_MUL) - reference.activate(GRID, MoEActivation.GELU_TANH_NO_MUL)
    ).abs()
    assert difference.max().item() == pytest.approx(4.73e-4, abs=5e-7)
    assert abs(GRID[difference.argmax()].item()) == pytest.approx(2.70, abs=5e-3)


@pytest.mark.parametrize("member", FUNCTIONS, ids=lambda member: member.name)
def test_gated_is_the_function_of_the_first_half_times_the_second(member):
    gated = MoEActivation[member.function]
    gate, up = torch.randn(2, 50, 8, dtype=torch.float64)
    expected = FUNCTIONS[member](gate) * up
    torch.testing.assert_close(reference.activate(torch.cat((gate, up), -1), gated), expected, rtol=1e-13, atol=1e-15)


def test_swigluoai_is_interleaved_and_clamped():
    """gpt-oss: gate at most 7, up within 7, gate * sigmoid(1.702 gate) * (up + 1)."""
    gate, up = 6 * torch.randn(2, 500, 8, dtype=torch.float64)
    assert (gate > 7).any()
    assert (up.abs() > 7).any()
    clamped = torch.minimum(gate, torch.tensor(7.0))
    expected = clamped / (1 + torch.exp(-1.702 * clamped)) * (torch.clip(up, -7, 7) + 1)
    interleaved = torch.stack((gate, up), -1).flatten(-2)
    torch.testing.assert_close(reference.activate(interleaved, MoEActivation.SWIGLUOAI), expected)
    halves = torch.cat((gate, up), -1)
    torch.testing.assert_close(reference.activate(halves, MoEActivation.SWIGLUOAI_UNINTERLEAVE), expected)


def test_swiglustep_clamps_after_silu():
    """Step 3.5: silu(gate) at most 7, up within 7."""
    gate, up = 6 * torch.randn(2, 500, 8, dtype=torch.float64)
    assert (F.silu(gate) > 7).any()
    expected = torch.minimum(F.silu(gate), torch.tensor(7.0)) * torch.clip(up, -7, 7)
    torch.testing.assert_close(reference.activate(torch.cat((gate, up), -1), MoEActivation.SWIGLUSTEP), expected)


@pytest.mark.parametrize("limit", [0.25, 7.0, 10.0, math.inf])
@pytest.mark.parametrize("alpha", [0.125, 1.0, 1.702, 8.0])
def test_silu_with_parameters(limit, alpha):
    """DeepSeek V4's ``swiglu_limit``, and quick GELU: gate at most the limit, up within it."""
    gate, up = 6 * torch.randn(2, 500, 8, dtype=torch.float64)
    clamped = torch.minimum(gate, torch.tensor(limit))
    expected = clamped / (1 + torch.exp(-alpha * clamped)) * torch.clip(up, -limit, limit)
    got = reference.activate(torch.cat((gate, up), -1), MoEActivation.SILU.with_parameters(limit=limit, alpha=alpha))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def test_swigluoai_with_parameters():
    gate, up = 6 * torch.randn(2, 500, 8, dtype=torch.float64)
    clamped = torch.minimum(gate, torch.tensor(3.0))
    expected = clamped / (1 + torch.exp(-0.5 * clamped)) * (torch.clip(up, -3, 3) + 1)
    activation = MoEActivation.SWIGLUOAI.with_parameters(limit=3, alpha=0.5)
    torch.testing.assert_close(reference.activate(torch.stack((gate, up), -1).flatten(-2), activation), expected)


def test_swiglustep_with_parameters():
    gate, up = 6 * torch.randn(2, 500, 8, dtype=torch.float64)
    expected = torch.minimum(F.silu(gate), torch.tensor(0.5)) * torch.clip(up, -0.5, 0.5)
    activation = MoEActivation.SWIGLUSTEP.with_parameters(limit=0.5)
    torch.testing.assert_close(reference.activate(torch.cat((gate, up), -1), activation), expected)


@pytest.mark.parametrize("beta", [0.125, 1.0, 4.0, 1e4])
@pytest.mark.parametrize("linear_beta", [0.125, 25.0, math.inf])
def test_situ(beta, linear_beta):
    """Kimi K3: gate and up approach bounds, by 1 - 2 / (1 + e^2x) instead of tanh."""
    gate, up = 6 * torch.randn(2, 500, 8, dtype=torch.float64)

    def squashed(x, bound):
        return bound * (1 - 2 / (1 + torch.exp(2 * x / bound))) if bound < math.inf else x

    expected = squashed(gate, beta) / (1 + torch.exp(-gate)) * squashed(up, linear_beta)
    activation = MoEActivation.SITU.with_parameters(beta=beta, linear_beta=linear_beta)
    got = reference.activate(torch.cat((gate, up), -1), activation)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype):
    input = torch.randn(4, 16).to(dtype)
    output = reference.activate(input, MoEActivation.GELU_TANH)
    assert output.dtype == torch.float32
    assert torch.equal(output, reference.activate(input.float(), MoEActivation.GELU_TANH))


def test_route_breaks_ties_to_the_lower_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0], [0.0, -0.0, 0.0, -1.0, -0.0]])
    _, index = reference.route(logits, 4)
    assert index.tolist() == [[1, 2, 4, 0], [0, 1, 2, 4]]


def test_route_is_transformers():
    config = transformers_config(num_experts=16, top_k_experts=4)
    router = randomize(transformers_gemma4().Gemma4TextRouter(config)).double()
    hidden_states = torch.randn(200, config.hidden_size, dtype=torch.float64)
    probabilities, expected_weights, expected_index = router(hidden_states)
    logits = router.proj(router.norm(hidden_states) * router.scale * config.hidden_size**-0.5)
    weights, index = reference.route(logits, 4, router.per_expert_scale)
    assert torch.equal(index, expected_index)
    # Its softmax is in float32 whatever the model's dtype.
    torch.testing.assert_close(weights, expected_weights.double(), rtol=1e-6, atol=0)
    unscaled, _ = reference.route(logits, 4, renormalize=False)
    torch.testing.assert_close(unscaled, probabilities.double().gather(-1, index), rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu", "silu"])
def test_experts_are_transformers(activation):
    config = transformers_config(hidden_activation=activation)
    module = randomize(transformers_gemma4().Gemma4TextExperts(config)).double()
    case = random_experts(40, dtype=torch.float64)
    expected = module(case.hidden_states, case.top_k_index, case.top_k_weights.double())
    member = MoEActivation.from_str(activation)
    parameters = (module.gate_up_proj, module.down_proj)
    output = reference.experts(case.hidden_states, *parameters, case.top_k_index, case.top_k_weights.double(), member)
    # transformers' tanh form cancels on the negative tail: absolute, at the size of the sums.
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)


def test_experts_skip_masked_pairs():
    case = random_experts(20, num_experts=4, dtype=torch.float64)
    masked = case.top_k_index.clone()
    masked[::2, 0], masked[1::2, 1] = -1, 4
    weights = case.top_k_weights.where((masked >= 0) & (masked < 4), 0.0)
    expected = reference.experts(*case[:4], weights, MoEActivation.SILU)
    output = reference.experts(*case[:3], masked, case.top_k_weights, MoEActivation.SILU)
    torch.testing.assert_close(output, expected, rtol=1e-14, atol=1e-14)
