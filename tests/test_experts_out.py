"""fused_experts' out=, and the settings that are refused by name until they are served."""

import pytest
import torch

from cupymoe import LowRank, fused_experts, lora_experts
from cupymoe.backends import registry
from cupymoe.ops import experts_call
from cupymoe.ops.activation import member_of
from tests.helpers import oracle, random_biases, random_experts, relative_error, slow_on_cuda, transposed


def poisoned_like(states):
    return torch.full_like(states, torch.nan)


@slow_on_cuda
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 64, 700])
def test_out_is_written_and_returned(device, num_tokens):
    case = random_experts(num_tokens, 8, 64, 32, 2, dtype=torch.bfloat16, device=device)
    call = experts_call(*case[:4], member_of("gelu_tanh"))
    for name, backend in registry().items():
        if backend.unsupported_reason(call) is not None:
            continue
        out = poisoned_like(case.hidden_states)
        version = out._version
        assert fused_experts(*case, activation="gelu_tanh", backend=name, out=out) is out
        assert torch.equal(out, fused_experts(*case, activation="gelu_tanh", backend=name))
        assert out._version > version or not num_tokens
        if num_tokens:
            assert relative_error(out, oracle(case)) < 0.01


@slow_on_cuda
def test_out_of_biased_experts_with_transposed_weights(device):
    case = random_experts(9, 8, 64, 32, 2, dtype=torch.bfloat16, device=device)
    case = case._replace(gate_up_proj=transposed(case.gate_up_proj), down_proj=transposed(case.down_proj))
    biases, out = random_biases(case), poisoned_like(case.hidden_states)
    assert fused_experts(*case, activation="gelu_tanh", **biases, out=out) is out
    assert relative_error(out, oracle(case, **biases)) < 0.01


@slow_on_cuda
def test_out_may_start_anywhere(device):
    case = random_experts(9, 8, 64, 32, 2, dtype=torch.bfloat16, device=device)
    memory = torch.full((9 * 64 + 2,), torch.nan, dtype=torch.bfloat16, device=device)
    out = memory[1:-1].view(9, 64)
    fused_experts(*case, activation="gelu_tanh", out=out)
    assert relative_error(out, oracle(case)) < 0.01
    assert memory[0].isnan()
    assert memory[-1].isnan()


def test_out_of_masked_pairs_is_zero(device):
    case = random_experts(4, 8, 64, 32, 2, dtype=torch.bfloat16, device=device)
    out = poisoned_like(case.hidden_states)
    fused_experts(*case[:3], torch.full_like(case.top_k_index, 8), case.top_k_weights, activation="gelu_tanh", out=out)
    assert not out.any()


def test_out_in_a_compiled_function():
    case = random_experts(5)

    def function(out, *tensors):
        return fused_experts(*tensors, activation="gelu_tanh", out=out) + 1

    out = poisoned_like(case.hidden_states)
    with torch.no_grad():
        output = torch.compile(function, fullgraph=True, backend="aot_eager")(out, *case)
    assert torch.equal(out, fused_experts(*case, activation="gelu_tanh"))
    assert torch.equal(output, out + 1)


CASE = random_experts(5)
BIAS = torch.zeros(6, 32)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (CASE.hidden_states.tolist(), TypeError, r"out must be a torch.Tensor, got list"),
        (torch.empty(5, 31), ValueError, r"out must have shape \[5, 32\], got \[5, 31\]"),
        (
            torch.empty(5, 32).double(),
            TypeError,
            r"out must have hidden_states's dtype torch.float32, got",
        ),
        (torch.empty(5, 32, device="meta"), ValueError, r"out must be on hidden_states's device cpu, got meta"),
        (torch.empty(32, 5).T, ValueError, r"out must be contiguous, got strides \(1, 5\)"),
        (CASE.hidden_states, ValueError, r"out must not overlap an input"),
        (BIAS.view(-1)[:160].view(5, 32), ValueError, r"out must not overlap an input"),
        (CASE.down_proj.view(-1)[:160].view(5, 32), ValueError, r"out must not overlap an input"),
        (torch.empty(5, 32).requires_grad_(), ValueError, r"out must be None where a gradient is asked for"),
    ],
)
def test_out_is_refused(out, error, message):
    with pytest.raises(error, match=message):
        fused_experts(*CASE, activation="gelu_tanh", down_bias=BIAS, out=out)


def test_out_is_refused_where_a_gradient_is_asked_for():
    states = CASE.hidden_states.clone().requires_grad_()
    out = poisoned_like(CASE.hidden_states)
    with pytest.raises(ValueError, match="out must be None where a gradient is asked for"):
        fused_experts(states, *CASE[1:], activation="gelu_tanh", out=out)
    with torch.no_grad():
        fused_experts(states, *CASE[1:], activation="gelu_tanh", out=out)
    assert not out.isnan().any()


@pytest.mark.parametrize("function", ["fused_experts", "lora_experts"])
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"numerics": "exact"}, ValueError, "numerics must be 'fast' or 'invariant', got 'exact'"),
        ({"keep": "output"}, ValueError, "keep must be 'gate_up' or 'input', got 'output'"),
        ({"keep": None}, ValueError, "keep must be 'gate_up' or 'input', got None"),
        (
            {"global_num_experts": 5},
            ValueError,
            "global_num_experts must be at least 6, as many as weights are given",
        ),
        ({"global_num_experts": 6.0}, TypeError, "global_num_experts must be an integer or None, got 6.0"),
        ({"global_num_experts": True}, TypeError, "global_num_experts must be an integer or None, got True"),
    ],
)
def test_settings_are_refused_by_name(function, settings, error, message):
    adapters = (None, None) if function == "lora_experts" else ()
    call = lora_experts if function == "lora_experts" else fused_experts
    with pytest.raises(error, match=message):
        call(*CASE, *adapters, activation="gelu_tanh", **settings)


def test_how_many_experts_there_are_elsewhere_changes_no_result(device):
    """It is what the kernels are chosen by; of 700 tokens each, an eighth is expected to be kept, and all are."""
    case = random_experts(700, 8, 64, 32, 2, dtype=torch.bfloat16, device=device)
    output = fused_experts(*case, activation="gelu_tanh", global_num_experts=64)
    assert relative_error(output, oracle(case)) < 0.01
    zero = LowRank(case.down_proj.new_zeros(8, 8, 32), case.down_proj.new_zeros(8, 64, 8))
    adapted = lora_experts(*case, None, zero, activation="gelu_tanh", global_num_experts=64)
    assert relative_error(adapted, oracle(case)) < 0.01
