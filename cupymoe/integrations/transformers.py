"""cupymoe as an experts implementation of transformers: importing this module registers it as ``"cupymoe"``.

``from_pretrained(..., experts_implementation="cupymoe")`` and ``model.set_experts_implementation("cupymoe")`` then work
for every model whose experts are gated, concatenated (gate rows, then up rows), bias-free and not transposed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cupymoe.activation import MoEActivation
from cupymoe.functional import fused_experts
from cupymoe.integrations import EXPERTS_IMPLEMENTATION
from cupymoe.modules import Gemma4Router

# transformers' activation modules by class name; several spell the same function.
_ACTIVATIONS = {
    "GELUTanh": MoEActivation.GELU_TANH,
    "NewGELUActivation": MoEActivation.GELU_TANH,
    "FastGELUActivation": MoEActivation.GELU_TANH,
    "AccurateGELUActivation": MoEActivation.GELU_TANH,
    "GELUActivation": MoEActivation.GELU,
    "SiLUActivation": MoEActivation.SILU,
    "SiLU": MoEActivation.SILU,
    "ReLUSquaredActivation": MoEActivation.RELU2,
}

# Some models have a function for one.
_FUNCTIONS = {nn.functional.silu: MoEActivation.SILU, nn.functional.gelu: MoEActivation.GELU}

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def activation_of(experts: Any) -> MoEActivation:
    """The member that an experts module's own ``act_fn`` is; the config's name for it is not read.

    Raises:
        ValueError: no member computes that function.
    """
    given = experts.act_fn
    if not isinstance(given, nn.Module):
        member, name = _FUNCTIONS.get(given), getattr(given, "__name__", repr(given))
    else:
        name = type(given).__name__
        member = _ACTIVATIONS.get(name)
    if member is None:
        known = [*_ACTIVATIONS, *(function.__name__ for function in _FUNCTIONS)]
        raise ValueError(f"cupymoe has no activation like {name} of {type(experts).__name__}; it has {known}")
    return member


def unsupported_reason(experts: Any) -> str | None:
    """Which property of an experts module cupymoe can't serve; None if it serves all of them."""
    if not experts.has_gate:
        return "its experts are not gated"
    if experts.has_bias:
        return "its experts have a bias"
    if experts.is_transposed:
        return "its weights are transposed"
    if not experts.is_concatenated:
        return "gate and up rows are interleaved"
    gating, default = type(experts)._apply_gate, ("transformers.integrations.moe", "_default_apply_gate")
    if (gating.__module__, gating.__name__) != default or "_apply_gate" in vars(experts):
        return "it gates in its own way (_apply_gate)"
    if experts.gate_up_proj.dtype not in _DTYPES:
        return f"its weights are {experts.gate_up_proj.dtype}, not one of {_DTYPES}"
    return None


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts call: ``[T, H]``, ``[T, K]``, ``[T, K]`` -> ``[T, H]``, in the dtype of ``hidden_states``.

    An index of ``num_experts`` is transformers' mark for a pair of another rank; it contributes nothing.
    Computed in the dtype of the weights, as ``grouped_mm`` does where autocast left other hidden states.

    Raises:
        ValueError: the module has a property that cupymoe can't serve; the message says which.
    """
    if reason := unsupported_reason(self):
        name = type(self).__name__
        raise ValueError(f"experts_implementation={EXPERTS_IMPLEMENTATION!r} does not serve {name}: {reason}")
    gate_up_proj, down_proj, dtype = self.gate_up_proj, self.down_proj, hidden_states.dtype
    if dtype != gate_up_proj.dtype:  # to() costs 1 us where it has nothing to do
        hidden_states = hidden_states.to(gate_up_proj.dtype)
    activation = activation_of(self)
    output = fused_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, activation=activation)
    return output if output.dtype == dtype else output.to(dtype)


def replace_routers(model: nn.Module) -> int:
    """Give every ``Gemma4TextRouter`` of a model our routing kernel; parameters and adapters are shared, not copied.

    The experts chosen are transformers' but for exact ties, which go to the lower index (docs/numerics.md), and, up to
    32 tokens on CUDA, for logits that differ by the last bit (docs/routing.md).

    Returns:
        How many routers were replaced.

    Raises:
        ValueError: the model has none, or one has hooks; none was replaced then.
    """
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    found = [
        (parent, name, Gemma4Router.from_transformers(child))
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Gemma4TextRouter)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Gemma4TextRouter to replace")
    for parent, name, ours in found:
        setattr(parent, name, ours)
    return len(found)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
