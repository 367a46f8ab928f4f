"""The fused backend on quantised weights, as a user calls it, against float64 of the weights that they stand for."""

import pytest
import torch

from cupymoe import Gemma4MoEConfig, LowRank, MoEActivation, fused_experts, lora_experts, quantize
from cupymoe.backends.fused import FusedBackend, takes_tiles
from cupymoe.kernels.load import Load
from cupymoe.ops import experts_call
from tests.helpers import Experts, no_host_sync, oracle, poison_free_memory, random_biases, relative_error
from tests.weights.test_experts import BOUND, quantised_case

GEMMA = Gemma4MoEConfig.gemma4_26b_a4b()
FORMATS = ("int4_g32", "int4_g64", "int4_g32_zero", "int8", "fp8", "fp8_g128", "nvfp4", "mxfp4")
# Group scales multiply the sums of the stream, and the weights of the tiles, which are rounded then: by 0.0017 of
# themselves in gate, up and down, beside 0.0029 of the intermediate and the output.
STREAM_ERROR, TILES_ERROR = 0.0030, 0.0042
# Of random codes. Of 4 or 8 bits of float most are small, and a few large weights make a sum.
ERROR_OF_RANDOM_CODES = 0.0055
SIZES = {"num_experts": 6, "hidden": 256, "intermediate": 128, "top_k": 2}


def fused_call(case, formats, activation=MoEActivation.GELU_TANH):
    """What the backend is asked about."""
    up, down = (getattr(weight, "codes", weight) for weight in case[1:3])
    return experts_call(case[0], up, down, case[3], activation, weight_format=",".join(formats))


def check(output, exact, bound, **biases):
    truth = oracle(exact, **biases)
    assert relative_error(output, truth) < bound
    largest = (output.double() - truth).abs().max() / truth.abs().max()
    assert largest < 4 * bound


# --- what is served, without a GPU ------------------------------------------------------------------------------------


def call_on_cuda(formats, num_tokens=9, **kwargs):
    case, _ = quantised_case(formats, num_tokens, torch.bfloat16)
    return fused_call(case, formats)._replace(device=torch.device("cuda"), **kwargs)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.parametrize("name", FORMATS)
def test_who_serves_which_format(on_hopper, name):
    backend, formats = FusedBackend(), (name, name)
    few, many = call_on_cuda(formats), call_on_cuda(formats, num_tokens=900)
    assert backend.unsupported_reason(few) is None
    assert backend.way(few).startswith("weight stream")
    assert backend.way(many) == "tiles of up to 160 rows, decoded in registers in the gate_up projection"
    of_down_alone = call_on_cuda(("plain", name), num_tokens=900)
    assert backend.way(of_down_alone).startswith("tiles of up to 384 rows, clusters of 1")
    assert "no gradients beside quantised weights" in backend.unsupported_reason(few, "backward")


def test_what_neither_way_serves_is_named(on_hopper):
    for formats in (("nf4", "nf4"), ("int8", "nf4")):
        reason = FusedBackend().unsupported_reason(call_on_cuda(formats))
        assert reason == "its kernels read codes of int4, int8, e4m3, e2m1, not of nf4"
    adapted = call_on_cuda(("int4_g32", "int4_g32"), adapter_rank=16)
    assert (
        FusedBackend()
        .unsupported_reason(adapted)
        .endswith("adapters beside plain weights only, not beside int4_g32,int4_g32")
    )


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40, 90, 400, 1500])
@pytest.mark.parametrize("formats", [(name, name) for name in FORMATS] + [("fp8_g128", "plain"), ("plain", "int4_g32")])
def test_every_format_and_way(formats, num_tokens, dtype):
    case, exact = quantised_case(formats, num_tokens, dtype, "cuda", **SIZES)
    case.top_k_index[1::3, 0] = -1
    case.top_k_index[0, 1] = 6
    poison_free_memory()
    with no_host_sync():
        output = fused_experts(*case, activation="gelu_tanh", backend="fused")
    tiled = takes_tiles(Load.of(num_tokens, 2, 6), 256, weight_format=",".join(formats))
    check(output, exact, ERROR_OF_RANDOM_CODES if tiled else STREAM_ERROR)
    again = fused_experts(*case, activation="gelu_tanh", backend="fused")
    assert torch.equal(output, again)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40, 400])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2_no_mul", "swigluoai"])
def test_activations_and_biases(activation, num_tokens):
    member = MoEActivation.from_str(activation)
    case, exact = quantised_case(("int4_g32",) * 2, num_tokens, torch.bfloat16, "cuda", **SIZES, activation=member)
    biases = {name: bias.bfloat16() for name, bias in random_biases(exact).items()}
    output = fused_experts(*case, activation=member, backend="fused", **biases)
    truth = oracle(exact, member, **{name: bias.double() for name, bias in biases.items()})
    assert relative_error(output, truth) < TILES_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40, 90])
def test_adapters_beside_quantised_weights(num_tokens):
    """By another backend."""
    case, exact = quantised_case(("int4_g32",) * 2, num_tokens, torch.bfloat16, "cuda", **SIZES)
    sizes = (6, 8, 256), (6, 256, 8), (6, 8, 128), (6, 256, 8)
    a, b, down_a, down_b = (torch.randn(size, device="cuda") / 8 for size in sizes)
    output = lora_experts(*case, LowRank(a, b, 0.5), LowRank(down_a, down_b, 0.25), activation="gelu_tanh")
    rounded = [factor.bfloat16().double() for factor in (a, 0.5 * b, down_a, 0.25 * down_b)]
    merged = exact[1] + rounded[1] @ rounded[0], exact[2] + rounded[3] @ rounded[2]
    check(output, Experts(exact[0], *merged, *exact[3:]), BOUND["grouped"])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [3, 40, 400])
def test_the_forward_that_keeps_has_the_bits_of_the_other(num_tokens):
    case, _ = quantised_case(("int4_g32",) * 2, num_tokens, torch.bfloat16, "cuda", **SIZES)
    plain = fused_experts(*case, activation="gelu_tanh", backend="fused")
    case.hidden_states.requires_grad_()
    output = fused_experts(*case, activation="gelu_tanh", backend="fused")
    assert torch.equal(plain, output)
    (grad,) = torch.autograd.grad(output, case.hidden_states, torch.randn_like(output))
    assert grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 16, 64, 128, 256, 512, 1024, 4096])
@pytest.mark.parametrize("format", ["int4", "int8", "fp8", "nvfp4"])
def test_gemmas_sizes(format, num_tokens):
    torch.manual_seed(num_tokens)
    up = torch.randn(128, 1408, 2816, dtype=torch.bfloat16, device="cuda").mul_(0.02)
    down = torch.randn(128, 2816, 704, dtype=torch.bfloat16, device="cuda").mul_(0.02)
    experts = quantize(up, down, format)
    del up, down
    states = torch.randn(num_tokens, 2816, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(num_tokens, 128, device="cuda").topk(8).indices
    weights = torch.rand(num_tokens, 8, device="cuda")
    poison_free_memory()
    output = fused_experts(states, *experts, index, weights, activation="gelu_tanh", backend="fused")
    some = torch.randperm(num_tokens, device="cuda")[:16]
    truth = torch.zeros(len(some), 2816, dtype=torch.float64, device="cuda")
    for expert in index[some].unique().tolist():
        one = slice(expert, expert + 1)
        local = torch.where(index[some] == expert, 0, -1)
        weights_of_one = (weight.dequantize(experts=one) for weight in experts)
        truth += oracle(Experts(states[some].double(), *weights_of_one, local, weights[some].double()))
    formats = ",".join(weight.format.name for weight in experts)
    tiled = takes_tiles(Load.of(num_tokens, 8, 128), 2816, weight_format=formats)
    assert relative_error(output[some], truth) < (TILES_ERROR if tiled else STREAM_ERROR)
