"""fused_experts and lora_experts with quantised weights, against float64 of the weights that they stand for."""

import contextlib
import copy
import itertools
import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import grouped_mm
from torch.utils.flop_counter import FlopCounterMode

from cupymoe import (
    Gemma4MoEConfig,
    LowRank,
    MoEActivation,
    QuantizedWeight,
    SlowWarning,
    fused_experts,
    lora_experts,
    quantize,
    reference,
)
from cupymoe.backends import row_products
from cupymoe.backends.row_products import GroupedRows
from cupymoe.weights import FORMATS
from cupymoe.weights.dequantize import WeightOnDemand
from tests.helpers import (
    Experts,
    no_host_sync,
    oracle,
    random_biases,
    random_experts,
    random_routing,
    relative_error,
    slow_on_cuda,
)
from tests.weights.helpers import random_weight

ACTIVATION = MoEActivation.GELU_TANH
GEMMA = Gemma4MoEConfig.gemma4_26b_a4b()


def quantised_case(formats=("int4_g32", "int4_g32"), num_tokens=9, dtype=torch.float32, device="cpu", **kwargs):
    """A case with quantised weights in place of some, and one with the float64 that they stand for."""
    sizes = {"num_experts": 6, "hidden": 256, "intermediate": 128, "top_k": 2, **kwargs}
    case = random_experts(num_tokens, dtype=dtype, device=device, **sizes)
    weights = [
        weight if name == "plain" else random_weight(name, *weight.shape).to(device)
        for name, weight in zip(formats, case[1:3], strict=True)
    ]
    dequantized = [weight.dequantize() if isinstance(weight, QuantizedWeight) else weight for weight in weights]
    dequantized = [weight.double() for weight in dequantized]
    return Experts(case[0], *weights, *case[3:]), Experts(case[0].double(), *dequantized, case[3], case[4].double())


PAIRS = [*((name, name) for name in FORMATS), ("fp8_g128", "plain"), ("plain", "nvfp4"), ("int4_g32", "int8")]


@slow_on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
def test_every_format(device, formats, dtype):
    case, exact = quantised_case(formats, dtype=dtype, device=device)
    case.top_k_index[::3, 0], case.top_k_index[1, 1] = -1, 6
    output = fused_experts(*case, activation="gelu_tanh", backend="reference")
    assert output.dtype == dtype
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert relative_error(output, oracle(exact)) < bound


@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul", "swigluoai"])
def test_activations_and_biases(activation):
    member = MoEActivation.from_str(activation)
    case, exact = quantised_case(activation=member)
    biases = random_biases(exact)
    given = {name: bias.float() for name, bias in biases.items()}
    output = fused_experts(*case, activation=member, **given)
    assert relative_error(output, oracle(exact, member, **{k: b.double() for k, b in given.items()})) < 1e-5


def test_sizes_that_are_padded():
    case, exact = quantised_case(("int8", "fp8"), hidden=41, intermediate=23)
    assert relative_error(fused_experts(*case, activation="gelu_tanh"), oracle(exact)) < 1e-5
    case, exact = quantised_case(("fp8_g128", "fp8_g128"), hidden=200, intermediate=136)
    assert relative_error(fused_experts(*case, activation="gelu_tanh"), oracle(exact)) < 1e-5


def test_no_tokens_and_out():
    case, exact = quantised_case()
    empty = Experts(case[0][:0], *case[1:3], case[3][:0], case[4][:0])
    assert fused_experts(*empty, activation="gelu_tanh").shape == (0, 256)
    out = torch.empty_like(case.hidden_states)
    assert fused_experts(*case, activation="gelu_tanh", out=out) is out
    assert relative_error(out, oracle(exact)) < 1e-5
    scales = case.gate_up_proj.scales.view(torch.float32).flatten()[: out.numel()]
    case.gate_up_proj.scales = case.gate_up_proj.scales.contiguous()
    with pytest.raises(ValueError, match="out must not overlap an input"):
        fused_experts(*case, activation="gelu_tanh", out=scales.view_as(out))


@slow_on_cuda
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("formats", [("int4_g32", "int4_g32"), ("nvfp4", "plain"), ("plain", "fp8")])
def test_gradients(device, formats, biased, adapted):
    case, exact = quantised_case(formats, device=device)
    case.top_k_index[::3, 0] = -1
    biases = {name: bias.float() for name, bias in random_biases(exact).items()} if biased else {}
    sizes = (6, 8, 256), (6, 256, 8), (6, 8, 128), (6, 256, 8)
    factors = [torch.randn(size, device=device) / 8 for size in sizes] if adapted else []
    leaves = [case.hidden_states, case.top_k_weights, *biases.values(), *factors]
    leaves += [weight for weight in case[1:3] if isinstance(weight, torch.Tensor)]
    for leaf in leaves:
        leaf.requires_grad_()
    if adapted:
        adapters = LowRank(*factors[:2], 0.5), LowRank(*factors[2:], -1.5)
        output = lora_experts(*case, *adapters, activation="gelu_tanh", **biases)
    else:
        output = fused_experts(*case, activation="gelu_tanh", **biases)
    wide = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}
    weights = [wide.get(id(ours), theirs) for ours, theirs in zip(case[1:3], exact[1:3], strict=True)]
    if adapted:
        a, b, down_a, down_b = (wide[id(factor)] for factor in factors)
        weights = [weights[0] + 0.5 * b @ a, weights[1] - 1.5 * down_b @ down_a]
    expected = reference.experts(
        wide[id(case.hidden_states)],
        *weights,
        case.top_k_index,
        wide[id(case.top_k_weights)],
        ACTIVATION,
        **{name: wide[id(bias)] for name, bias in biases.items()},
    )
    assert relative_error(output, expected) < 1e-5
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, leaves, grad)
    theirs = torch.autograd.grad(expected, [*wide.values()], grad.double())
    for got, wanted in zip(ours, theirs, strict=True):
        assert wanted.any()
        assert relative_error(got, wanted) < 2e-5


@slow_on_cuda
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivatives(device):
    case, exact = quantised_case(dtype=torch.float64, device=device)

    def twice(function, weights):
        states = case.hidden_states.clone().requires_grad_()
        output = function(states, *weights, case.top_k_index, exact.top_k_weights)
        (gradient,) = torch.autograd.grad(output.square().sum(), states, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), states)[0]

    ours = twice(lambda *tensors: fused_experts(*tensors, activation="gelu_tanh"), case[1:3])
    expected = twice(lambda *tensors: reference.experts(*tensors, ACTIVATION), exact[1:3])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


class Model(nn.Module):
    """Quantised weights as submodules, where torch.compile and torch.export find them."""

    def __init__(self, case):
        super().__init__()
        self.up, self.down = case[1:3]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return fused_experts(hidden_states, self.up, self.down, top_k_index, top_k_weights, activation="gelu_tanh")


@slow_on_cuda
def test_compiled_and_exported(device):
    case, _ = quantised_case(device=device)
    model, arguments = Model(case), (case[0], *case[3:])
    expected = model(*arguments)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), expected)
    exported = torch.export.export(model, arguments)
    assert torch.equal(exported.module()(*arguments), expected)
    states = case.hidden_states.clone().requires_grad_()
    compiled(states, *case[3:]).sum().backward()
    theirs = case.hidden_states.clone().requires_grad_()
    model(theirs, *case[3:]).sum().backward()
    assert torch.equal(states.grad, theirs.grad)


def test_flops_are_those_of_plain_weights():
    case, exact = quantised_case(("int8", "nvfp4"))
    counts = []
    for each in (case, exact):
        states = each.hidden_states.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            fused_experts(states, *each[1:], activation="gelu_tanh").sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_who_computes(caplog):
    case, _ = quantised_case(("int4_g32", "plain"))
    with caplog.at_level(logging.INFO, "cupymoe"):
        fused_experts(*case, activation="silu")
    assert "in torch.float32 with int4_g32,plain weights on cpu: reference" in caplog.text
    with pytest.raises(ValueError, match="backend 'grouped' does not serve this call"):
        fused_experts(*case, activation="silu", backend="grouped")


def broken(case, name, **buffers):
    weight = copy.deepcopy(getattr(case, name))
    for buffer_name, buffer in buffers.items():
        setattr(weight, buffer_name, buffer)
    return case._replace(**{name: weight})


def refused(case):
    """Calls that are not right, by what is said of them."""
    up, down = case[1:3]
    yield (
        r"gate_up_proj must have shape \[6, 256, 256\]",
        case._replace(gate_up_proj=random_weight("int8", 5, 256, 256)),
    )
    yield (
        r"gate_up_proj must have shape \[6, 256, 256\]",
        case._replace(gate_up_proj=random_weight("int8", 6, 256, 128)),
    )
    yield r"down_proj must have shape \[\*, 256, \*\]", case._replace(down_proj=random_weight("int8", 6, 128, 128))
    yield (
        "gate_up_proj must be on hidden_states's device cpu, got meta",
        case._replace(gate_up_proj=QuantizedWeight("int8", up.shape, device="meta")),
    )
    yield "down_proj must have hidden_states's dtype", case._replace(down_proj=torch.zeros(6, 256, 128).half())
    yield "down_proj must be a .* or a cupymoe.QuantizedWeight, got Linear", case._replace(down_proj=nn.Linear(2, 2))
    yield (
        "down_proj must be contiguous, or the transpose",
        case._replace(down_proj=torch.zeros(256, 6, 128).transpose(0, 1)),
    )
    yield "gate_up_proj.scales must be given in int4_g32", broken(case, "gate_up_proj", scales=None)
    yield "gate_up_proj.zeros must be None in int4_g32", broken(case, "gate_up_proj", zeros=up.codes)
    yield (
        "down_proj.scales must be torch.bfloat16, got torch.float16",
        broken(case, "down_proj", scales=down.scales.half()),
    )
    yield (
        r"down_proj.codes must have shape \[6, 256, 64\], got \[6, 256, 32\]",
        broken(case, "down_proj", codes=down.codes[..., :32]),
    )
    yield "down_proj.codes must be contiguous", broken(case, "down_proj", codes=down.codes.mT.contiguous().mT)
    yield "down_proj.scales must be on codes's device", broken(case, "down_proj", scales=down.scales.to("meta"))


def test_what_is_refused():
    for message, case in refused(quantised_case()[0]):
        with pytest.raises((TypeError, ValueError), match=message):
            fused_experts(*case, activation="gelu_tanh")


def test_what_is_refused_of_adapters_and_settings():
    case, _ = quantised_case()
    a, b = torch.zeros(6, 8, 256), torch.zeros(6, 256, 8)
    with pytest.raises(ValueError, match=r"gate_up_adapter.a must have shape \[6, \*, 256\]"):
        lora_experts(*case, LowRank(a[..., :64], b), None, activation="gelu_tanh")
    with pytest.raises(ValueError, match=r"gate_up_adapter.b must have hidden_states's dtype torch.float32"):
        lora_experts(*case, LowRank(a, b.half()), None, activation="gelu_tanh")
    for settings in (
        {"numerics": "exact"},
        {"expert_map": torch.zeros(1, dtype=torch.int32)},
        {"global_num_experts": 5},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            fused_experts(*case, activation="gelu_tanh", **settings)


# --- a few experts at a time ------------------------------------------------------------------------------------------


def rows_of(counts):
    """GroupedRows of so many rows of each expert, on the CPU, without the kernels that sort."""
    rows = GroupedRows.__new__(GroupedRows)
    rows.offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    rows.slot_of_pair = torch.arange(sum(counts))
    return rows


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("counts", [(3, 0, 5, 0, 0, 1, 7), (0, 0, 0, 2, 0, 0, 0), (1, 1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_a_few_experts_at_a_time(monkeypatch, counts, at_once, transposed):
    weight = random_weight("int4_g32", 7, 64, 32)
    dequantized = weight.dequantize(torch.bfloat16)
    on_demand = WeightOnDemand(weight.format, weight.shape, weight.tensors(), torch.bfloat16)
    if transposed:
        dequantized, on_demand = dequantized.transpose(1, 2), on_demand.transpose(1, 2)
    monkeypatch.setattr(row_products, "_DEQUANTIZED_AT_ONCE", at_once * 64 * 32)
    whole = []
    experts = WeightOnDemand.experts
    monkeypatch.setattr(WeightOnDemand, "experts", lambda *args: whole.append(experts(*args)) or whole[-1])
    rows, masked = rows_of(counts), 4
    given = torch.randn(sum(counts) + masked, on_demand.shape[2], dtype=torch.bfloat16)
    bias = torch.randn(7, on_demand.shape[1], dtype=torch.bfloat16)
    rows.slot_of_pair = torch.arange(len(given))
    expected = grouped_mm(given, dequantized.transpose(1, 2), offs=rows.offsets[1:])
    expected[: sum(counts)] += bias.repeat_interleave(torch.tensor(counts), 0)
    output = rows.linear(given, on_demand, bias)
    torch.testing.assert_close(output[: sum(counts)], expected[: sum(counts)])
    assert max(map(len, whole)) <= min(at_once + 1, 7)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def check_on_gpu(case, exact, backend, bound):
    with contextlib.nullcontext() if backend != "grouped" else no_host_sync():
        output = fused_experts(*case, activation="gelu_tanh", backend=backend)
    assert relative_error(output, oracle(exact)) <= bound
    return output


# The grouped GEMM rounds gate_up and, here, the weights as well.
# Of random codes: of 4 or 8 bits of float most are small, and a few large weights make a sum.
BOUND = {"grouped": 0.0060, "simt": 0.0020}


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BOUND)
@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
def test_on_gpu(monkeypatch, formats, backend):
    case, exact = quantised_case(formats, 33, torch.bfloat16, "cuda", num_experts=8)
    case.top_k_index[::3, 0] = -1
    fused_experts(*case, activation="gelu_tanh", backend=backend)  # values of the codes come to the device once
    at_once = check_on_gpu(case, exact, backend, BOUND[backend])
    monkeypatch.setattr(row_products, "_DEQUANTIZED_AT_ONCE", 3 * 256 * 256)
    torch.testing.assert_close(check_on_gpu(case, exact, backend, BOUND[backend]), at_once)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 64, 1024])
@pytest.mark.parametrize("format", ["int4", "fp8", "nvfp4", "int8"])
def test_at_gemmas_sizes_on_gpu(format, num_tokens):
    plain = random_experts(1, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
    weights = [*quantize(*plain[1:3], format)]
    states = torch.randn(num_tokens, 2816, device="cuda", dtype=torch.bfloat16)
    routing = reversed(random_routing(num_tokens, 128, 8, "cuda"))
    case = Experts(states, *weights, *routing)
    fused_experts(*case, activation="gelu_tanh", backend="grouped")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_host_sync():
        output = fused_experts(*case, activation="gelu_tanh", backend="grouped")
    whole = plain.gate_up_proj.nbytes
    pairs = num_tokens * 8 * (2816 + 1408) * 2 * 4
    assert torch.cuda.max_memory_allocated() - before < 0.2 * whole + pairs
    exact = Experts(states, *(weight.dequantize() for weight in weights), *case[3:])
    assert relative_error(output, oracle(exact)) <= BOUND["grouped"]


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["gate_up", "input"])
def test_gradients_on_gpu(keep):
    """By the grouped GEMM, without waiting for the GPU; as far from float64 as with the same weights in bfloat16."""
    case, exact = quantised_case(num_tokens=65, dtype=torch.bfloat16, device="cuda", num_experts=8)
    rounded = case._replace(gate_up_proj=exact.gate_up_proj.bfloat16(), down_proj=exact.down_proj.bfloat16())
    sizes = (8, 16, 256), (8, 256, 16), (8, 16, 128), (8, 256, 16)
    factors = [torch.randn(size, device="cuda") / 8 for size in sizes]
    grad = torch.randn_like(case.hidden_states)

    def gradients(case):
        leaves = [each.detach().requires_grad_() for each in (case.hidden_states, case.top_k_weights, *factors)]
        adapters = LowRank(*leaves[2:4]), LowRank(*leaves[4:6])
        output = lora_experts(leaves[0], *case[1:4], leaves[1], *adapters, activation="gelu_tanh", keep=keep)
        return torch.autograd.grad(output, leaves, grad)

    gradients(case)
    with no_host_sync():
        ours = gradients(case)
    for got, wanted in zip(ours, gradients(rounded), strict=True):
        assert relative_error(got, wanted.double()) < 0.02


@pytest.mark.gpu
def test_captured_in_a_graph():
    case, _ = quantised_case(dtype=torch.bfloat16, device="cuda")
    expected = fused_experts(*case, activation="gelu_tanh", backend="grouped")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused_experts(*case, activation="gelu_tanh", backend="grouped")
    graph.replay()
    assert torch.equal(output, expected)


@pytest.mark.gpu
def test_float16_on_gpu_is_slow_and_said_to_be():
    case, exact = quantised_case(("nf4", "nf4"), dtype=torch.float16, device="cuda", hidden=320)
    with pytest.warns(SlowWarning, match=r"in torch\.float16 with nf4,nf4 weights on CUDA by the slow backend 'simt'"):
        output = fused_experts(*case, activation="gelu_tanh")
    assert relative_error(output, oracle(exact)) < 0.001
