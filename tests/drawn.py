"""Calls of fused_experts drawn by hypothesis, and their tensors; tests/test_properties.py says what holds of them."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st

from cupymoe import MoEActivation
from tests.helpers import Experts, laid_out, random_biases, random_experts

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SEEDS = st.integers(0, 2**31)


class Model(NamedTuple):
    """What kernels are compiled for."""

    num_experts: int
    hidden: int
    intermediate: int
    top_k: int
    dtype: torch.dtype
    activation: MoEActivation
    index_dtype: torch.dtype


# On a GPU a few, because each costs compilations: four that fused serves, in all its regimes; one that of the fast ones
# grouped alone does; and one that is left to simt.
GPU_MODELS = [
    Model(8, 128, 88, 2, torch.bfloat16, MoEActivation.GELU_TANH, torch.int64),
    Model(12, 256, 176, 6, torch.bfloat16, MoEActivation.SILU, torch.int32),
    Model(16, 136, 72, 3, torch.float16, MoEActivation.GELU, torch.int64),
    Model(4, 64, 32, 1, torch.bfloat16, MoEActivation.SWIGLUSTEP, torch.int32),
    Model(9, 64, 48, 2, torch.bfloat16, MoEActivation.RELU2_NO_MUL, torch.int64),
    Model(5, 40, 24, 2, torch.float32, MoEActivation.SWIGLUOAI, torch.int32),
]


@st.composite
def cpu_models(draw):
    num_experts = draw(st.integers(1, 8))
    return Model(
        num_experts,
        draw(st.integers(1, 17)),
        draw(st.integers(1, 13)),
        draw(st.integers(1, min(num_experts, 4))),
        draw(st.sampled_from(FLOATING)),
        draw(st.sampled_from(list(MoEActivation))),
        draw(st.sampled_from([torch.int32, torch.int64])),
    )


def token_counts(device_type):
    """On a GPU of every regime, at the bounds more often."""
    if device_type == "cpu":
        return st.integers(0, 24)
    bounds = st.sampled_from([1, 16, 17, 21, 22, 64, 65, 191, 192, 256, 257, 512, 513, 768, 1024, 1025])
    return st.one_of(st.integers(0, 70), bounds, st.integers(71, 1500))


class Call(NamedTuple):
    """A drawn call of fused_experts, without its numbers."""

    model: Model
    num_tokens: int
    routing: str
    masked: float
    weights: str
    magnitude: str
    layout: str
    transposed: tuple[bool, bool]
    """Which weights are."""
    biased: tuple[bool, bool]
    """Which projections are."""
    backend: str
    seed: int


class Arguments(NamedTuple):
    """The tensors of a call: those of Experts, in its order, and the biases."""

    hidden_states: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    @property
    def experts(self):
        return Experts(*self[:5])

    @property
    def biases(self):
        return {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}


NEITHER = (False, False)
LAYOUTS = ("transposed", "every second", "one element on", "16 elements on")


def calls(device_type):
    return st.builds(
        Call,
        model=cpu_models() if device_type == "cpu" else st.sampled_from(GPU_MODELS),
        num_tokens=token_counts(device_type),
        routing=st.sampled_from(["router", "hot", "same", "repeated"]),
        masked=st.sampled_from([0.0, 0.3, 1.0]),
        weights=st.sampled_from(["router", "signed", "large"]),
        magnitude=st.sampled_from(["one", "subnormal", "large"]),
        layout=st.sampled_from(LAYOUTS),
        transposed=st.just(NEITHER) | st.tuples(st.booleans(), st.booleans()),
        biased=st.just(NEITHER) | st.tuples(st.booleans(), st.booleans()),
        backend=st.sampled_from(["auto"] if device_type == "cpu" else ["fused", "grouped", "simt"]),
        seed=SEEDS,
    )


def outside(num_experts, dtype):
    """Indices that mask a pair; in int64 also some that are an expert in their low 32 bits."""
    info = torch.iinfo(dtype)
    return [-1, num_experts, num_experts + 1000, info.min, info.max, *([2**32, -(2**32)] if info.bits == 64 else [])]


def masked_at(index, where, num_experts):
    values = torch.tensor(outside(num_experts, index.dtype), device=index.device, dtype=index.dtype)
    return torch.where(where, values[torch.randint(len(values), index.shape, device=index.device)], index)


def magnitudes(magnitude, dtype):
    """Factors of the hidden states and of gate_up_proj: powers of two whose product is one."""
    exponent = {"one": 0, "subnormal": 1, "large": -1}[magnitude] * (round_log2(torch.finfo(dtype).tiny) + 4)
    return 2.0**exponent, 2.0**-exponent


def round_log2(value):
    return round(torch.tensor(value, dtype=torch.float64).log2().item())


def build(call, device):
    """The tensors of a call."""
    model = call.model
    case = random_experts(call.num_tokens, *model[:4], dtype=model.dtype, device=device, activation=model.activation)
    index, weights = case.top_k_index.to(model.index_dtype), case.top_k_weights
    if call.routing == "hot":
        index[:, 0] = model.num_experts // 2
    elif call.routing == "same" and call.num_tokens:
        index[:] = index[0].clone()
    elif call.routing == "repeated":
        index = torch.randint(model.num_experts, index.shape, device=device, dtype=model.index_dtype)
    index = masked_at(index, torch.rand(index.shape, device=device) < call.masked, model.num_experts)
    if call.weights != "router":
        weights = torch.randn_like(weights) * (64 if call.weights == "large" else 1)
    of_states, of_gate_up = magnitudes(call.magnitude, model.dtype)
    case = Experts(case.hidden_states * of_states, case.gate_up_proj * of_gate_up, case.down_proj, index, weights)
    return Arguments(*laid_out(case, call.transposed), **random_biases(case, call.biased))


def relaid(tensor, layout):
    """The same values, strided otherwise or elsewhere in a larger storage."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "every second":
        return torch.stack((tensor, torch.zeros_like(tensor)), -1).flatten(-2)[..., ::2]
    start = 1 if layout == "one element on" else 16
    storage = tensor.new_zeros(tensor.numel() + start + 3)
    return storage[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
