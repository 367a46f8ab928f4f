"""cupymoe as an experts implementation of transformers: importing this module registers it as ``"cupymoe"``.

``from_pretrained(..., experts_implementation="cupymoe")`` and ``model.set_experts_implementation("cupymoe")`` then work
for every model whose experts are gated, concatenated (gate rows, then up rows), bias-free and not transposed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from cupymoe.activation import MoEActivation
from cupymoe.functional import fused_experts
from cupymoe.integrations import EXPERTS_IMPLEMENTATION

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

# What transformers says of a class of experts: the value that is served, and what another means.
_PROPERTIES = {
    "has_gate": (True, "its experts are not gated"),
    "has_bias": (False, "its experts have a bias"),
    "has_post_expert_norm": (False, "its experts' outputs are normalised"),
    "is_transposed": (False, "its weights are transposed"),
    "is_concatenated": (True, "gate and up rows are interleaved"),
}


def _properties(decorator: Callable[..., Any]) -> dict[str, tuple[bool, str]]:
    """Those, and the ones that a newer transformers has: served at the default, at which older models are."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(decorator).parameters.items()}
    newer = {
        name: (default, f"its {name} is {not default}, of which cupymoe knows nothing")
        for name, default in defaults.items()
        if isinstance(default, bool) and name not in _PROPERTIES
    }
    return {**_PROPERTIES, **newer}


_ALL_PROPERTIES = _properties(use_experts_implementation)

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
    for name, (served, reason) in _ALL_PROPERTIES.items():
        if getattr(experts, name, served) != served:
            return reason
    if experts.gate_up_proj.dtype not in _DTYPES:
        return f"its weights are {experts.gate_up_proj.dtype}, not one of {_DTYPES}"
    gating, default = type(experts)._apply_gate, ("transformers.integrations.moe", "_default_apply_gate")
    if (gating.__module__, gating.__name__) != default or "_apply_gate" in vars(experts):
        return "it gates in its own way (_apply_gate)"
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
    """Let every ``Gemma4TextRouter`` of a model compute as :class:`cupymoe.Gemma4Router`.

    The modules stay, with their parameters, adapters and hooks; ``output_router_logits`` goes on to work. The experts
    chosen are transformers' but for exact ties, which go to the lower index (docs/numerics.md), and, up to 32 tokens on
    CUDA, for logits that differ by the last bit (docs/routing.md).

    Returns:
        How many routers there are.

    Raises:
        ValueError: the model has none, or one whose ``forward`` was replaced; nothing was changed then.
    """
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    from cupymoe.integrations import gemma4_router

    found = [module for module in model.modules() if isinstance(module, Gemma4TextRouter)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no Gemma4TextRouter to replace")
    for router in found:
        gemma4_router.check(router)
    for router in found:
        gemma4_router.take_over(router)
    return len(found)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
except ImportError:
    pass
else:
    # They have a registry of their own, which would call our name unknown: experts_forward says what is in the way.
    ALL_FP8_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
