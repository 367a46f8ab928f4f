"""torch.ops.cupymoe.*: opcheck for every op, and torch.compile(fullgraph=True) of what is built on them."""

import copy
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from cupymoe import (
    Gemma4MoE,
    Gemma4MoEConfig,
    LowRank,
    MoEActivation,
    apply_moe_activation,
    batched_experts,
    fused_experts,
    lora_experts,
    route,
)
from cupymoe import moe_activation as moe_activation_function
from cupymoe.backends import NUMERICS
from tests.helpers import (
    WITH_PARAMETERS,
    laid_out,
    random_biases,
    random_experts,
    randomize,
    skip_without_inductor,
    slow_on_cuda,
)
from tests.weights.helpers import random_weight

CONFIG = Gemma4MoEConfig(
    hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def transposed(tensor):
    """Last dimension outermost in memory, as all the others in reverse."""
    order = list(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS = {
    "transposed": transposed,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda tensor: tensor[:1].expand(tensor.shape),
    "offset": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
}
"""Tensors of the same shape that lie otherwise in memory."""

CONTIGUOUS = {"gate_up_proj", "down_proj", "gate_up_a", "gate_up_b", "down_a", "down_b", "gate_up_bias", "down_bias"}
"""Arguments of which no kernel would read another layout: the public functions see to it."""


def with_layout(op, arguments, layout):
    """The arguments of an op with every tensor in a layout that may have one."""
    names = [argument.name for argument in op.default._schema.arguments]
    return [
        layout(value.detach())
        if isinstance(value, torch.Tensor) and not (value.is_cuda and name in CONTIGUOUS)
        else value
        for name, value in zip(names, arguments, strict=True)
    ]


def opcheck(name, *arguments):
    """All of opcheck on the arguments, and on every layout of them that real outputs are what fake ones promise."""
    op = getattr(torch.ops.cupymoe, name)
    with warnings.catch_warnings():
        # opcheck of torch 2.14 reads .grad of its own intermediate results.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        results = torch.library.opcheck(op, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in arguments):
        return  # the layouts are tried where the same arguments require none
    for layout_name, layout in LAYOUTS.items():
        if layout_name == "expanded" and op.default._schema.is_mutable:
            continue  # an expanded tensor can't be written
        results = torch.library.opcheck(
            op, with_layout(op, arguments, layout), test_utils="test_faketensor", raise_exception=False
        )
        assert set(results.values()) == {"SUCCESS"}, (layout_name, results)


# --- opcheck ----------------------------------------------------------------------------------------------------------


def test_every_op_is_checked_here(monkeypatch):
    checked = set()
    monkeypatch.setattr(sys.modules[__name__], "opcheck", lambda name, *arguments: checked.add(name))
    cpu = torch.device("cpu")
    for member in MoEActivation:
        test_opcheck_activation(cpu, member, requires_grad=False)
    test_opcheck_activation_with_parameters(cpu)
    test_opcheck_activation_writes_and_backward(cpu, MoEActivation.SILU)
    test_opcheck_router_logits(cpu, torch.float32, requires_grad=False)
    test_opcheck_route(cpu, False, True, torch.float32, None)
    test_opcheck_experts(cpu, torch.float32, requires_grad=False, adapted=(True, True), as_gpt_oss=True)
    test_opcheck_batched_experts(cpu, "plain")
    registered = {
        name.removeprefix("cupymoe::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("cupymoe::")
    }
    assert registered == checked


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("activation", MoEActivation)
def test_opcheck_activation(device, activation, requires_grad):
    input = torch.randn(3, activation.input_size(8), device=device, requires_grad=requires_grad)
    opcheck(activation.custom_op_name, input)


@pytest.mark.parametrize("activation", MoEActivation)
def test_opcheck_activation_writes_and_backward(device, activation):
    input = torch.randn(3, activation.input_size(8), device=device)
    opcheck("apply_moe_activation", activation.value, torch.empty(3, 8, device=device), input)
    opcheck("activation_backward", torch.randn(3, 8, device=device), input, activation.value)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_router_logits(device, dtype, requires_grad):
    states, scale, projection = (
        torch.randn(shape, device=device, dtype=dtype, requires_grad=requires_grad)
        for shape in ((5, 16), (16,), (7, 16))
    )
    for numerics in NUMERICS:
        opcheck("router_logits", states, scale, projection, 1e-6, numerics)
    tensors = [tensor.detach() for tensor in (states, scale, projection)]
    opcheck("router_logits_backward", torch.randn(5, 7, device=device, dtype=dtype), *tensors, 1e-6)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [None, torch.float32, torch.bfloat16])
def test_opcheck_route(device, requires_grad, renormalize, dtype, scale_dtype):
    logits = torch.randn(5, 7, device=device, dtype=dtype, requires_grad=requires_grad)
    scale = None
    if scale_dtype is not None:
        scale = torch.randn(7, device=device, dtype=scale_dtype).requires_grad_(requires_grad)
    for numerics in NUMERICS:
        opcheck("route", logits, 3, scale, renormalize, numerics)
    index = torch.stack([torch.randperm(7, device=device)[:3] for _ in range(5)])
    detached = None if scale is None else scale.detach()
    opcheck("route_backward", torch.randn(5, 3, device=device), logits.detach(), index, detached, renormalize)


UNQUANTISED = (None,) * 6
NO_MAP = (None,)
NOTHING_KEPT = (None,) * 3
NO_BIASES = (None,) * 2
SETTINGS = ("gelu_tanh", 0.5, -1.5, "plain", "fast", None, "auto")


def random_adapters(weights, adapted, **kwargs):
    """The four factors, b as PEFT keeps it and in float32; None for a weight that is not adapted."""
    factors = []
    for weight, has_one in zip(weights, adapted, strict=True):
        num_experts, out_size, in_size = weight.shape
        a = torch.randn(num_experts, 8, in_size, **kwargs)
        b = torch.randn(out_size, 8, num_experts, **{**kwargs, "dtype": torch.float32}).permute(2, 0, 1)
        factors += (a, b) if has_one else (None, None)
    return factors


@slow_on_cuda
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapted", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("as_gpt_oss", [False, True], ids=["plain", "biased and transposed"])
def test_opcheck_experts(device, dtype, requires_grad, adapted, as_gpt_oss):
    case = random_experts(5, 4, 32, 24, 2, dtype=dtype, device=device)
    case = laid_out(case, (as_gpt_oss, as_gpt_oss))
    adapters = random_adapters(case[1:3], adapted, dtype=dtype, device=device)
    biases = [*random_biases(case, (as_gpt_oss, as_gpt_oss)).values()]
    tensors = (*case, *adapters, *biases, *UNQUANTISED, *NO_MAP)
    of_rest = [tensor is not None for tensor in (*adapters, *biases)]
    for needed in ([True, True, True, True, *of_rest], [True, False, False, False, *of_rest]):
        grad = torch.randn_like(case.hidden_states)
        opcheck("fused_experts_backward", grad, *tensors, *NOTHING_KEPT, *SETTINGS, needed)
    if not requires_grad:
        opcheck("fused_experts_out", *tensors, *SETTINGS, torch.empty_like(case.hidden_states))
    for tensor in (*case[:3], case.top_k_weights, *adapters, *biases):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    opcheck("fused_experts", *tensors, *SETTINGS)
    opcheck("fused_experts_keeping", *tensors, *SETTINGS)
    opcheck("fused_experts", *tensors, *SETTINGS[:4], "invariant", *SETTINGS[5:])
    if not requires_grad:
        _, *kept = torch.ops.cupymoe.fused_experts_keeping(*tensors, *SETTINGS)
        opcheck("fused_experts_backward", grad, *tensors, *kept, *SETTINGS, needed)


@slow_on_cuda
def test_opcheck_experts_with_a_map(device):
    case = random_experts(5, 4, 32, 24, 2, device=device)
    expert_map = torch.tensor([1, -1, 0, 3, 2, 9], device=device)
    tensors = (*case, *[None] * 4, *NO_BIASES, *UNQUANTISED, expert_map)
    grad, needed = torch.randn_like(case.hidden_states), [True] * 4 + [False] * 6
    opcheck("fused_experts_backward", grad, *tensors, *NOTHING_KEPT, *SETTINGS, needed)
    opcheck("fused_experts_out", *tensors, *SETTINGS, torch.empty_like(case.hidden_states))
    opcheck("fused_experts", *tensors, *SETTINGS)
    for tensor in (*case[:3], case.top_k_weights):
        tensor.requires_grad_()
    opcheck("fused_experts", *tensors, *SETTINGS)
    opcheck("fused_experts_keeping", *tensors, *SETTINGS)


@slow_on_cuda
@pytest.mark.parametrize("format", ["plain", "int4_g32"])
def test_opcheck_batched_experts(device, format):
    case = random_experts(5, 4, 64, 32, 2, device=device)
    states = torch.randn(4, 3, 64, device=device)
    counts = torch.tensor([3, 3, 3, 3], dtype=torch.int32, device=device)  # opcheck compares all that is returned
    (gate_up, *of_gate_up), (down, *of_down) = (
        random_weight(format, *weight.shape).to(device).tensors() if format != "plain" else (weight, None, None, None)
        for weight in case[1:3]
    )
    weight_format = "plain" if format == "plain" else f"{format},{format}"
    arguments = (states, counts, gate_up, down, *of_gate_up, *of_down, "gelu_tanh", weight_format)
    opcheck("batched_experts", *arguments)
    opcheck("batched_experts_out", *arguments, torch.zeros_like(states))


@slow_on_cuda
def test_opcheck_backward_of_experts_without_tokens(device):
    case = random_experts(0, 4, 32, 24, 2, device=device)
    grad = torch.randn_like(case.hidden_states)
    adapters = random_adapters(case[1:3], (True, True), device=device)
    opcheck(
        "fused_experts_backward",
        grad,
        *case,
        *adapters,
        *NO_BIASES,
        *UNQUANTISED,
        *NO_MAP,
        *NOTHING_KEPT,
        *SETTINGS,
        [True] * 8 + [False] * 2,
    )


@slow_on_cuda
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("formats", [("int4_g32", "int4_g32"), ("nf4", "int8"), ("int4_g32_zero", "plain")])
def test_opcheck_quantised_experts(device, requires_grad, formats):
    case = random_experts(5, 4, 64, 32, 2, device=device)
    weights = [
        random_weight(name, *weight.shape).to(device).tensors() if name != "plain" else (weight, None, None, None)
        for name, weight in zip(formats, case[1:3], strict=True)
    ]
    adapters = random_adapters(case[1:3], (True, False), device=device)
    (gate_up, *of_gate_up), (down, *of_down) = weights
    tensors = case.hidden_states, gate_up, down, *case[3:], *adapters, *NO_BIASES, *of_gate_up, *of_down, *NO_MAP
    settings = (*SETTINGS[:3], ",".join(formats), *SETTINGS[4:])
    grad = torch.randn_like(case.hidden_states)
    needed = [True, False, formats[1] == "plain", True, True, True, False, False, False, False]
    opcheck("fused_experts_backward", grad, *tensors, *NOTHING_KEPT, *settings, needed)
    if not requires_grad:
        opcheck("fused_experts_out", *tensors, *settings, torch.empty_like(case.hidden_states))
    for tensor in (case.hidden_states, case.top_k_weights, *adapters[:2]):
        tensor.requires_grad_(requires_grad)
    opcheck("fused_experts", *tensors, *settings)
    opcheck("fused_experts_keeping", *tensors, *settings)


# --- torch.vmap and batched gradients ---------------------------------------------------------------------------------


def assert_batched_gradients_are_each(function, *leaves):
    """jacobian(vectorize=True) and is_grads_batched are one backward under vmap; without them, one after the other."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    expected = torch.autograd.functional.jacobian(function, tuple(leaves))
    for got, want in zip(
        torch.autograd.functional.jacobian(function, tuple(leaves), vectorize=True), expected, strict=True
    ):
        assert want.any()
        torch.testing.assert_close(got, want)
    output = function(*leaves)
    grads = torch.randn(3, *output.shape, dtype=output.dtype, device=output.device)
    batched = torch.autograd.grad(output, leaves, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, leaves, grad, retain_graph=True) for grad in grads]
    for got, *wants in zip(batched, *each, strict=True):
        torch.testing.assert_close(got, torch.stack(wants))


@pytest.mark.parametrize("activation", [MoEActivation.GELU_TANH, MoEActivation.SILU_NO_MUL])
def test_batched_gradients_of_activation(device, activation):
    input = torch.randn(2, activation.input_size(3), device=device)
    assert_batched_gradients_are_each(lambda input: moe_activation_function(activation, input), input)


def test_batched_gradients_of_router(device):
    states, scale, projection = (torch.randn(shape, device=device) for shape in ((2, 16), (16,), (7, 16)))
    assert_batched_gradients_are_each(
        lambda *tensors: torch.ops.cupymoe.router_logits(*tensors, 1e-6, "fast"), states, scale, projection
    )
    assert_batched_gradients_are_each(
        lambda logits, scale: route(logits, 3, per_expert_scale=scale)[0],
        torch.randn(2, 7, device=device),
        torch.randn(7, device=device),
    )


@slow_on_cuda
def test_batched_gradients_of_experts(device):
    """Of some tensors only, so that the backward returns empty tensors for the others."""
    case = random_experts(2, 4, 16, 8, 2, device=device)

    def of_states_and_weights(hidden_states, top_k_weights):
        return fused_experts(hidden_states, *case[1:4], top_k_weights, activation="gelu_tanh")

    assert_batched_gradients_are_each(of_states_and_weights, case.hidden_states, case.top_k_weights)
    adapter = LowRank(torch.randn(4, 8, 8, device=device), torch.randn(4, 16, 8, device=device))

    def of_the_adapter(a, b):
        return lora_experts(*case, None, LowRank(a, b), activation="gelu_tanh")

    assert_batched_gradients_are_each(of_the_adapter, *adapter[:2])


@slow_on_cuda
def test_vmap_of_experts(device):
    case = random_experts(5, device=device)
    batch = torch.randn(3, *case.hidden_states.shape, device=device)

    def experts(hidden_states):
        return fused_experts(hidden_states, *case[1:], activation="gelu_tanh")

    assert torch.equal(torch.vmap(experts)(batch), torch.stack([experts(entry) for entry in batch]))


@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_is_refused(device, enabled):
    """Tangents would be dropped, and the derivative be zeros."""
    case = random_experts(5, device=device)
    batch, counts = torch.randn(6, 3, 32, device=device), torch.full((6,), 2, dtype=torch.int32, device=device)
    functions = {
        "fused_experts": lambda states: fused_experts(states, *case[1:], activation="gelu_tanh"),
        "batched_experts": lambda states: batched_experts(
            batch + states[0, 0], counts, *case[1:3], activation="gelu_tanh"
        ),
        "route": lambda states: route(states, 3)[0],
        "gelu_tanh": lambda states: moe_activation_function("gelu_tanh", states),
    }
    for name, function in functions.items():
        states = case.hidden_states
        with torch.set_grad_enabled(enabled):
            with pytest.raises(NotImplementedError, match=rf"{name}.* has no forward-mode derivative"):
                torch.func.jvp(function, (states,), (states,))
            with forward_ad.dual_level():
                function(states)  # nothing to differentiate
                dual = forward_ad.make_dual(states, states)
                with pytest.raises(NotImplementedError, match=rf"{name}.* has no forward-mode derivative"):
                    function(dual)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def test_opcheck_activation_with_parameters(device):
    opcheck("moe_activation", torch.randn(3, 16, device=device, requires_grad=True), "silu(limit=0.5)")


@pytest.mark.parametrize("activation", [*MoEActivation, WITH_PARAMETERS[0]])
def test_compiled_activation(device, activation):
    compiled = torch.compile(moe_activation_function, fullgraph=True, backend="aot_eager")
    input = torch.randn(5, activation.input_size(16), device=device)
    ours, theirs = input.clone().requires_grad_(), input.clone().requires_grad_()
    output, expected = compiled(activation, ours), moe_activation_function(activation, theirs)
    assert torch.equal(output, expected)
    output.sum().backward()
    expected.sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("spelling", ["swigluoai(alpha=1.625)", "swigluoai(limit=7.0)"])  # 7.0 is its own
def test_compiled_activation_whose_parameters_are_first_spelled_in_the_traced_code(device, spelling):
    def function(input):
        return moe_activation_function(spelling, input)

    input = torch.randn(5, 32, device=device)
    output = torch.compile(function, fullgraph=True, backend="aot_eager")(input)
    assert torch.equal(output, function(input))


@pytest.mark.parametrize("activation", [MoEActivation.GELU_TANH, MoEActivation.GELU_TANH_NO_MUL, WITH_PARAMETERS[0]])
def test_compiled_apply(device, activation):
    compiled = torch.compile(apply_moe_activation, fullgraph=True, backend="aot_eager")
    input = torch.randn(5, activation.input_size(16), device=device)
    output = torch.full((5, 16), torch.nan, device=device)
    compiled(activation, output, input)
    assert torch.equal(output, moe_activation_function(activation, input))


def test_route_of_a_traced_size():
    """A traced top_k is no int."""

    def function(logits):
        return route(logits, logits.shape[1] // 2)

    logits = torch.randn(5, 8)
    traced = make_fx(function, tracing_mode="symbolic")(logits)
    for ours, expected in zip(traced(logits), function(logits), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("renormalize", [False, True])
def test_compiled_route(device, renormalize):
    def function(logits, scale):
        return route(logits, 3, per_expert_scale=scale, renormalize=renormalize)

    logits, scale = torch.randn(9, 7, device=device), torch.randn(7, device=device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(logits, scale), function(logits, scale), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "swigluoai", "relu2_no_mul", "silu(limit=0.5)"])
def test_compiled_experts(device, activation):
    def function(*arguments):
        return fused_experts(*arguments, activation=activation)

    member = MoEActivation.from_str(activation)
    case = random_experts(9, dtype=torch.bfloat16, device=device, activation=member)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*case), function(*case))


def test_compiled_module_for_many_numbers_of_tokens(device):
    """One graph for the first T, one for every other: no graph break, no compile for each length."""
    counter = CompileCounterWithBackend("aot_eager")
    module = randomize(Gemma4MoE(CONFIG)).to(device, torch.bfloat16)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    with torch.no_grad():
        for num_tokens in (5, 9, 33, 64, 17):
            hidden_states = torch.randn(num_tokens, 32, device=device, dtype=torch.bfloat16)
            assert torch.equal(compiled(hidden_states), module(hidden_states))
    assert counter.frame_count == 2


def gradients_of(function, module, hidden_states):
    module.zero_grad()
    hidden_states = hidden_states.clone().requires_grad_()
    output = function(hidden_states)
    output.square().sum().backward()
    return [output.detach(), hidden_states.grad, *(parameter.grad for parameter in module.parameters())]


@slow_on_cuda
def test_compiled_module_backward(device):
    module = randomize(Gemma4MoE(CONFIG)).to(device)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for num_tokens in (5, 9):
        hidden_states = torch.randn(num_tokens, 32, device=device)
        ours, expected = gradients_of(compiled, module, hidden_states), gradients_of(twin, twin, hidden_states)
        assert len(ours) == 7
        for got, want in zip(ours, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, such as its advice on TF32
def test_compiled_by_inductor(device):
    skip_without_inductor()
    module = randomize(Gemma4MoE(CONFIG)).to(device)
    twin = copy.deepcopy(module)
    hidden_states = torch.randn(9, 32, device=device)
    # A graph in torch's cache may have been compiled for other schemas of our ops.
    with torch._inductor.config.patch(force_disable_caches=True):
        ours = gradients_of(torch.compile(module, fullgraph=True), module, hidden_states)
    for got, want in zip(ours, gradients_of(twin, twin, hidden_states), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
