"""A module whose parameters change between two calls, and torch's modes around a call."""

import io
from contextlib import contextmanager

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cupymoe import (
    Gemma4MoE,
    Gemma4MoEConfig,
    LowRank,
    MoEActivation,
    fused_experts,
    lora_experts,
    moe_activation,
    reference,
    route,
)
from tests.helpers import max_error, oracle, random_experts, randomize, rounded_experts, slow_on_cuda

CONFIG = Gemma4MoEConfig(
    hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)


def new_moe(device, dtype=torch.bfloat16):
    return randomize(Gemma4MoE(CONFIG)).to(device, dtype)


def states(device, dtype=torch.bfloat16, num_tokens=7):
    return torch.randn(num_tokens, 32, device=device, dtype=dtype)


# --- parameters that change between calls -----------------------------------------------------------------------------


def replace(moe, new):
    for name, parameter in new.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(moe.get_submodule(owner), attribute, torch.nn.Parameter(parameter.detach().clone()))


def replace_data(moe, new):
    for parameter, its_new in zip(moe.parameters(), new.parameters(), strict=True):
        parameter.data = its_new.detach().clone()


def set_storage(moe, new):
    with torch.no_grad():
        for parameter, its_new in zip(moe.parameters(), new.parameters(), strict=True):
            parameter.set_(its_new.detach().clone())


def copy_into(moe, new):
    with torch.no_grad():
        for parameter, its_new in zip(moe.parameters(), new.parameters(), strict=True):
            parameter.copy_(its_new)


def load(moe, new):
    moe.load_state_dict(new.state_dict())


def load_by_assignment(moe, new):
    moe.load_state_dict(new.state_dict(), assign=True)


@pytest.mark.parametrize("num_tokens", [7, 300])
@pytest.mark.parametrize("change", [replace, replace_data, set_storage, copy_into, load, load_by_assignment])
def test_the_next_call_sees_new_parameters(device, change, num_tokens):
    moe, new, hidden_states = new_moe(device), new_moe(device), states(device, num_tokens=num_tokens)
    before, expected = moe(hidden_states), new(hidden_states)
    assert not torch.equal(before, expected)
    change(moe, new)
    assert torch.equal(moe(hidden_states), expected)


@slow_on_cuda
def test_cast_between_calls(device):
    moe = new_moe(device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        moe.to(dtype)
        hidden_states = states(device, dtype)
        fresh = Gemma4MoE(CONFIG).to(device, dtype)
        fresh.load_state_dict(moe.state_dict())
        assert moe(hidden_states).dtype == dtype
        assert torch.equal(moe(hidden_states), fresh(hidden_states))


@pytest.mark.gpu
def test_moved_between_calls():
    moe, hidden_states = new_moe("cpu"), states("cpu")
    on_cpu = moe(hidden_states)
    moe.cuda()
    on_cuda = moe(hidden_states.cuda())
    assert on_cuda.is_cuda
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=2**-6, atol=2**-6)
    assert torch.equal(moe.cpu()(hidden_states), on_cpu)
    assert torch.equal(moe.cuda()(hidden_states.cuda()), on_cuda)


def test_resized_between_calls(device):
    """Experts of another number and width are computed; parameters that do not fit each other are refused."""
    moe, experts = new_moe(device), random_experts(7, 5, 32, 16, 2, dtype=torch.bfloat16, device=device)
    hidden_states, parameters = states(device), dict(moe.experts.named_parameters())
    expected = moe(hidden_states)
    arguments = (experts.hidden_states, experts.top_k_index, experts.top_k_weights)
    moe.experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj)
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \[6, 48, 32\], got \[5, 32, 32\]"):
        moe.experts(*arguments)
    moe.experts.down_proj = torch.nn.Parameter(experts.down_proj)
    assert max_error(moe.experts(*arguments), oracle(experts)) <= (
        2 * max_error(rounded_experts(experts), oracle(experts)) + 1e-6
    )
    for name, parameter in parameters.items():
        setattr(moe.experts, name, parameter)
    assert torch.equal(moe(hidden_states), expected)


def test_state_dict_through_a_file(device):
    moe, hidden_states, file = new_moe(device), states(device), io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert list(loaded) == list(moe.state_dict())
    new = Gemma4MoE(CONFIG).to(device, torch.bfloat16)
    new.load_state_dict(loaded, strict=True)
    assert torch.equal(new(hidden_states), moe(hidden_states))


# --- modes ------------------------------------------------------------------------------------------------------------


@contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast(device):
    return torch.autocast(device.type, dtype=torch.bfloat16)


MODES = {
    "no_grad": lambda device: torch.no_grad(),
    "inference_mode": lambda device: torch.inference_mode(),
    "autocast": autocast,
    "deterministic_algorithms": lambda device: deterministic_algorithms(),
}


@slow_on_cuda
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_mode_changes_a_bit(device, dtype, mode):
    """The dtypes of the arguments say what is computed in, and every result is deterministic anyway."""
    if (mode, dtype, device.type) == ("deterministic_algorithms", torch.float32, "cuda"):
        pytest.skip("adapters on float32 experts are cuBLAS's on CUDA, which wants CUBLAS_WORKSPACE_CONFIG for it")
    case = random_experts(9, dtype=dtype, device=device)
    adapter = LowRank(*(torch.randn(6, *shape, device=device, dtype=dtype) for shape in ((8, 32), (48, 8))))
    logits, projection = torch.randn(9, 6, device=device, dtype=dtype), torch.randn(6, 32, device=device, dtype=dtype)

    def call():
        return (
            fused_experts(*case, activation="gelu_tanh"),
            lora_experts(*case, adapter, None, activation="gelu_tanh"),
            *route(logits, 2),
            moe_activation("silu", case.hidden_states),
            torch.ops.cupymoe.router_logits(case.hidden_states, projection[0], projection, 1e-6, "fast"),
        )

    expected = call()
    with MODES[mode](device):
        outputs = call()
    for output, its_expected in zip(outputs, expected, strict=True):
        assert output.dtype == its_expected.dtype
        assert torch.equal(output, its_expected)


def gradients(case):
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in case]
    fused_experts(*leaves, activation="gelu_tanh").square().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.requires_grad]


@slow_on_cuda
def test_autocast_changes_no_gradient(device):
    """Also where the backward pass runs inside of it, which torch advises against."""
    case = random_experts(9, dtype=torch.float32, device=device)
    expected = gradients(case)
    with autocast(device):
        ours = gradients(case)
    assert len(ours) == 4
    for gradient, its_expected in zip(ours, expected, strict=True):
        # The sum of squares above is autocast's to round; float32 here as there.
        torch.testing.assert_close(gradient, its_expected, rtol=1e-5, atol=1e-5)


@slow_on_cuda
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivatives(device):
    """The backward pass is plain torch, so that it has one."""
    case = random_experts(5, dtype=torch.float64, device=device)

    def twice(function):
        states = case.hidden_states.clone().requires_grad_()
        output = function(states)
        (gradient,) = torch.autograd.grad(output.square().sum(), states, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), states)[0]

    ours = twice(lambda states: fused_experts(states, *case[1:], activation="gelu_tanh"))
    expected = twice(lambda states: reference.experts(states, *case[1:], MoEActivation.GELU_TANH))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_autocast_does_not_hide_a_mix_of_dtypes(device):
    """Casting 1.5 GB of weights in every call is not what a caller asked for."""
    case = random_experts(4, device=device)
    with autocast(device), pytest.raises(TypeError, match="gate_up_proj must have hidden_states's dtype"):
        fused_experts(case.hidden_states.bfloat16(), *case[1:], activation="gelu_tanh")


def test_meta_device():
    """Gemma 4's layer without its 1.5 GB: shapes and dtypes of every function and of the module."""
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    with torch.device("meta"):
        moe = Gemma4MoE(config).to(torch.bfloat16)
        hidden_states = torch.empty(2, 5, config.hidden_size, dtype=torch.bfloat16)
        gate_up = torch.empty(3, 2 * 7)
    output = moe(hidden_states)
    assert (output.shape, output.dtype, output.device.type) == (hidden_states.shape, torch.bfloat16, "meta")
    probabilities, weights, index = moe.router(hidden_states[0])
    assert [tuple(tensor.shape) for tensor in (probabilities, weights, index)] == [(5, 128), (5, 8), (5, 8)]
    assert moe_activation("gelu_tanh", gate_up).shape == (3, 7)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(device, tracing_mode):
    """Traced without torch.compile, with sizes that are symbols too."""
    case = random_experts(9, dtype=torch.bfloat16, device=device)
    graph = make_fx(lambda *arguments: fused_experts(*arguments, activation="gelu_tanh"), tracing_mode=tracing_mode)
    assert torch.equal(graph(*case)(*case), fused_experts(*case, activation="gelu_tanh"))


def test_float8_is_refused_by_name():
    float8 = torch.ones(4, 8).to(torch.float8_e4m3fn)
    for call in (lambda: route(float8, 2), lambda: moe_activation("silu", float8)):
        with pytest.raises(TypeError, match=r"must be a floating-point tensor of at least 16 bits.*float8"):
            call()
