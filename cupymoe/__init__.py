"""Gemma 4's mixture of experts as a torch module, on CUDA sources compiled at run time through CuPy."""

from cupymoe import flops
from cupymoe.activation import MoEActivation
from cupymoe.adapter_copies import refresh_adapters
from cupymoe.backends.slow import SlowWarning
from cupymoe.config import Gemma4MoEConfig
from cupymoe.experts import MoEExperts
from cupymoe.explain import Explanation, explain
from cupymoe.functional import (
    apply_moe_activation,
    batched_experts,
    fused_experts,
    gelu_tanh_and_mul,
    lora_experts,
    moe_activation,
    route,
)
from cupymoe.kernels.bridge import as_cupy, as_torch
from cupymoe.lora import LowRank
from cupymoe.modules import Gemma4Experts, Gemma4MoE, Gemma4Router
from cupymoe.training import accumulate_in_float32, selective_checkpoint_contexts, set_keep
from cupymoe.warmup import warmup
from cupymoe.weights import QuantizedExperts, QuantizedWeight, WeightFormat
from cupymoe.weights.quantize import quantize

__version__ = "0.2.0"

flops.register_when_imported()

__all__ = [
    "Explanation",
    "Gemma4Experts",
    "Gemma4MoE",
    "Gemma4MoEConfig",
    "Gemma4Router",
    "LowRank",
    "MoEActivation",
    "MoEExperts",
    "QuantizedExperts",
    "QuantizedWeight",
    "SlowWarning",
    "WeightFormat",
    "accumulate_in_float32",
    "apply_moe_activation",
    "as_cupy",
    "as_torch",
    "batched_experts",
    "explain",
    "fused_experts",
    "gelu_tanh_and_mul",
    "lora_experts",
    "moe_activation",
    "quantize",
    "refresh_adapters",
    "route",
    "selective_checkpoint_contexts",
    "set_keep",
    "warmup",
]
