"""Inputs, float64 oracles and error measures of the tests. The oracle itself is cupymoe.reference."""

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.kernels.offline_cache import compile_offline

ROOT = Path(__file__).parents[1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GATED = [member for member in MoEActivation if member.is_gated]
WITH_PARAMETERS = [
    MoEActivation.SILU.with_parameters(limit=10.0),  # DeepSeek V4
    MoEActivation.SILU.with_parameters(limit=0.75, alpha=1.702),
    MoEActivation.SWIGLUOAI.with_parameters(limit=3.0, alpha=0.125),
    MoEActivation.SWIGLUSTEP.with_parameters(limit=0.5),
    MoEActivation.SWIGLUSTEP.with_parameters(limit=float("inf")),
    MoEActivation.SITU.with_parameters(beta=4.0, linear_beta=25.0),  # Kimi K3
    MoEActivation.SITU.with_parameters(beta=0.125, linear_beta=0.125),
]

slow_on_cuda = pytest.mark.filterwarnings("ignore::cupymoe.SlowWarning")
"""For what computes on CUDA, by whatever ``"auto"`` takes, in a dtype or at sizes that no fast backend serves."""

compiled = functools.cache(compile_offline)
"""Several tests look at one compilation."""


class Experts(NamedTuple):
    """Arguments of fused_experts, in its order."""

    hidden_states: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


def random_routing(num_tokens, num_experts, top_k, device="cpu"):
    """Distinct experts for each token, with weights that sum to one."""
    weights, index = reference.route(torch.randn(num_tokens, num_experts, device=device), top_k)
    return weights, index


def random_experts(
    num_tokens=16,
    num_experts=6,
    hidden=32,
    intermediate=24,
    top_k=2,
    *,
    dtype=torch.float32,
    device="cpu",
    activation=MoEActivation.GELU_TANH,
):
    """Unit-variance inputs and weights that keep it so through both projections."""
    kwargs = {"dtype": dtype, "device": device}
    width = activation.input_size(intermediate)
    weights, index = random_routing(num_tokens, num_experts, top_k, device)
    return Experts(
        torch.randn(num_tokens, hidden, **kwargs),
        torch.randn(num_experts, width, hidden, **kwargs) * hidden**-0.5,
        torch.randn(num_experts, hidden, intermediate, **kwargs) * intermediate**-0.5,
        index,
        weights,
    )


def random_biases(case, wanted=(True, True)):
    """Arguments of both biases, of which one that is not wanted is None; as large as the products they are added to."""
    shapes = [weight.shape[:2] if has_one else None for weight, has_one in zip(case[1:3], wanted, strict=True)]
    biases = [None if shape is None else torch.randn(shape).to(case.down_proj) for shape in shapes]
    return dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))


def transposed(weight):
    """A weight of the same values that is the transpose(1, 2) of a contiguous tensor."""
    return weight.transpose(1, 2).contiguous().transpose(1, 2)


def laid_out(case, which):
    """The case with each weight transposed or contiguous."""
    weights = [
        transposed(weight) if each else weight.contiguous() for weight, each in zip(case[1:3], which, strict=True)
    ]
    return case._replace(gate_up_proj=weights[0], down_proj=weights[1])


def skip_without_inductor():
    """What torch's inductor compiles on the CPU needs a compiler."""
    if not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").is_file()):
        pytest.skip("torch's inductor needs g++ and Python's headers")


def oracle(case, activation=MoEActivation.GELU_TANH, **biases):
    """The experts in float64 on the same bits; reference.experts upcasts one expert's weights at a time."""
    return reference.experts(case.hidden_states.double(), *case[1:], activation, **biases)


def rounded_experts(case, activation=MoEActivation.GELU_TANH, gate_up_bias=None, down_bias=None):
    """A plain torch path that rounds to the dtype of its tensors at every step: what a test may compare errors with."""
    output = torch.zeros_like(case.hidden_states)
    for expert in range(case.down_proj.shape[0]):
        token, k = torch.where(case.top_k_index == expert)
        gate_up = case.hidden_states[token] @ case.gate_up_proj[expert].T
        if gate_up_bias is not None:
            gate_up = gate_up + gate_up_bias[expert]
        intermediate = reference.activate(gate_up, activation).to(output.dtype)
        expert_output = intermediate @ case.down_proj[expert].T
        if down_bias is not None:
            expert_output = expert_output + down_bias[expert]
        weighted = expert_output * case.top_k_weights[token, k, None]
        output.index_add_(0, token, weighted.to(output.dtype))
    return output


def relative_error(output, truth):
    """|output - truth| / |truth| in Frobenius norms."""
    return ((output.double() - truth).norm() / truth.norm()).item()


def max_error(output, truth):
    return (output.double() - truth).abs().max().item()


def ulp_errors(output, truth):
    """|output - truth| in units of the last place that output's dtype has at truth; infinity is one place past max."""
    info = torch.finfo(output.dtype)
    max_exponent = round(torch.tensor(info.max, dtype=torch.float64).log2().item()) - 1
    min_exponent = round(torch.tensor(info.tiny, dtype=torch.float64).log2().item())
    past_max = 2.0 ** (max_exponent + 1)
    output, truth = (tensor.double().clamp(-past_max, past_max) for tensor in (output, truth))
    exponent = (torch.frexp(truth).exponent - 1).clamp(min_exponent, max_exponent)
    return (output - truth).abs() / (torch.exp2(exponent.double()) * info.eps)


def assert_ulps(output, truth, bound):
    """NaN exactly where the float64 truth is NaN, and every other element within bound ulps of it."""
    nan = truth.isnan()
    assert torch.equal(output.isnan(), nan), f"NaN differs at {(output.isnan() != nan).nonzero()[:5].tolist()}"
    errors = torch.where(nan, 0.0, ulp_errors(output, truth))
    worst = errors.argmax()
    assert errors.max() <= bound, (
        f"{errors.max().item():.4f} ulp at flat index {worst.item()}: got {output.flatten()[worst].item()!r}, "
        f"float64 gives {truth.flatten()[worst].item()!r}; {(errors > bound).sum().item()} are above {bound}"
    )


def every_value(dtype, device="cpu"):
    """All 65536 bit patterns of a 16-bit dtype, subnormals, infinities and NaN among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16).view(dtype)


def poison_free_memory(byte=0xFF):
    """Fill the memory that torch's allocator hands out next; 0xFF is NaN in bf16, fp16 and fp32."""
    torch.cuda.empty_cache()
    sizes = [512] * 1024 + [2**16] * 128 + [2**20] * 32 + [2**22] * 16 + [2**28] * 4
    blocks = [torch.full((size,), byte, dtype=torch.uint8, device="cuda") for size in sizes]
    torch.cuda.synchronize()
    del blocks


def shapes_saved(call):
    """Shapes of the tensors that autograd saves in a call."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return shapes


@contextmanager
def no_host_sync():
    """An error for every operation that waits for the GPU and that torch can see."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Synchronization debug mode is a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def transformers_gemma4():
    """transformers' modules of Gemma 4, or a skip."""
    reason = "compares with transformers, which is not installed or has no Gemma 4"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports warn of is not ours
        return pytest.importorskip("transformers.models.gemma4.modeling_gemma4", reason=reason)


def transformers_config(implementation="eager", **sizes):
    """A Gemma4TextConfig with experts, tiny unless told otherwise."""
    tiny = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 16,
        "vocab_size": 64,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 6,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    }
    config = transformers_gemma4().Gemma4TextConfig(**{**tiny, **sizes})
    config._experts_implementation = implementation
    return config


def randomize(module):
    """Random parameters of a size that keeps activations near one; transformers leaves the experts uninitialised."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
    return module


class Scaled(torch.Tensor):
    """A quantised tensor as torchao has them: int8 elements and a scale, with the looks of a floating-point tensor."""

    @staticmethod
    def __new__(cls, elements, scale):
        return torch.Tensor._make_wrapper_subclass(cls, elements.shape, dtype=scale.dtype, device=elements.device)

    def __init__(self, elements, scale):
        self.elements, self.scale = elements, scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].elements, args[0].scale)
        raise NotImplementedError(f"{function} of a {cls.__name__}")


UNFIT = {
    "meta": (lambda tensor: tensor.to("meta"), ValueError, "not be on the meta device"),
    "a subclass": (
        lambda tensor: Scaled((tensor * 10).to(torch.int8), torch.ones((), dtype=tensor.dtype)),
        TypeError,
        "be a plain tensor, .* got a Scaled",
    ),
    "sparse": (lambda tensor: tensor.to_sparse(), TypeError, r"be a plain tensor, .* got a torch.sparse_coo one"),
    "float8": (lambda tensor: tensor.to(torch.float8_e4m3fn), TypeError, "have a dtype of .* got torch.float8_e4m3fn"),
    "uint8": (lambda tensor: tensor.to(torch.uint8), TypeError, "have a dtype of .* got torch.uint8"),
    "int32": (lambda tensor: tensor.to(torch.int32), TypeError, "have a dtype of .* got torch.int32"),
    "complex": (lambda tensor: tensor.to(torch.complex64), TypeError, "have a dtype of .* got torch.complex64"),
}
"""What makes of a weight one that a plain copy does not read or fill; the error that says so, and part of its text."""


def run_python(code, **environment):
    """Output of a fresh interpreter that sees this checkout; it fails the test if the interpreter fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
