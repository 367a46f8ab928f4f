"""What a call of the experts passes through between the public function and the backend that computes it.

It is checked, before anything is launched. Its weights and adapters are taken apart into tensors and settings, all
that an op has. Then one of the ops is called: the one that writes into given memory, the one that keeps gate_up for
the gradients, or the one that does neither. The op chooses the backend, by :func:`cupymoe.backends.select`.
"""

from __future__ import annotations

import torch

from cupymoe import ops
from cupymoe.activation import MoEActivation
from cupymoe.checks.adapters import check_adapter
from cupymoe.checks.experts import check_expert_map, check_experts, check_out
from cupymoe.checks.settings import check_settings
from cupymoe.lora import LowRank
from cupymoe.reference import work_dtype
from cupymoe.weights.dequantize import Buffers
from cupymoe.weights.format import PLAIN, WeightFormat, join_formats
from cupymoe.weights.quantized import QuantizedWeight, Weight

# Of the op's arguments: the factors of both adapters, and what these are multiplied with; scales, zeros and row_scales
# of both weights.
_NO_ADAPTERS: tuple[torch.Tensor | None, ...] = (None,) * 4
_UNSCALED: tuple[float, ...] = (1.0, 1.0)
_UNQUANTISED: tuple[torch.Tensor | None, ...] = (None,) * 6
_KEPT_DTYPES = (torch.bfloat16, torch.float16)


def member_of(activation: MoEActivation | str) -> MoEActivation:
    """The member of the contract that an argument names."""
    return activation if isinstance(activation, MoEActivation) else MoEActivation.from_str(activation)


def call_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: tuple[LowRank | None, LowRank | None] | None,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    out: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    global_num_experts: int | None,
    activation: MoEActivation | str,
    backend: str,
    numerics: str,
    keep: str,
) -> torch.Tensor:
    """:func:`cupymoe.fused_experts`, and with adapters :func:`cupymoe.lora_experts`."""
    member = member_of(activation)
    check_settings(numerics, keep)
    check_experts(
        hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, gate_up_bias, down_bias, member, backend
    )
    if expert_map is not None or global_num_experts is not None:
        global_num_experts = check_expert_map(expert_map, global_num_experts, down_proj.shape[0], hidden_states)

    factors, scalings = _NO_ADAPTERS, _UNSCALED
    if adapters is not None:
        factors, scalings = _of_adapters(*adapters, gate_up_proj, down_proj, hidden_states)
    if isinstance(gate_up_proj, QuantizedWeight) or isinstance(down_proj, QuantizedWeight):
        up, down, of_quantised, weight_format = taken_apart(gate_up_proj, down_proj)
    else:
        up, down, of_quantised, weight_format = gate_up_proj, down_proj, _UNQUANTISED, PLAIN
    if top_k_weights.dtype != (work := work_dtype(hidden_states.dtype)):
        top_k_weights = top_k_weights.to(work)
    arguments = (
        hidden_states, up, down, top_k_index, top_k_weights,
        *factors, gate_up_bias, down_bias, *of_quantised, expert_map,
        member.value, *scalings, weight_format, numerics, global_num_experts, backend,
    )  # fmt: skip

    if out is not None:
        check_out(out, *(each for each in arguments if isinstance(each, torch.Tensor)))
        torch.ops.cupymoe.fused_experts_out(*arguments, out)
        return out
    output: torch.Tensor
    if (
        torch.is_grad_enabled()
        and _may_keep_gate_up(keep, backend, hidden_states, up, down, top_k_weights, *factors, gate_up_bias, down_bias)
        # A compiled graph does not know, and keeps it.
        and (torch.compiler.is_compiling() or ops.keeps_gate_up(*arguments))
    ):
        output = ops.dispatch(torch.ops.cupymoe.fused_experts_keeping.default, *arguments)[0]
    else:
        output = ops.dispatch(torch.ops.cupymoe.fused_experts.default, *arguments)
    return output


def taken_apart(
    gate_up_proj: Weight, down_proj: Weight
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...], str]:
    """Both weights as an op has them: the codes, what belongs to these, and the names of the formats.

    A plain weight is where its codes would be.
    """
    gate_up, *of_gate_up = _buffers(gate_up_proj)
    down, *of_down = _buffers(down_proj)
    return gate_up, down, (*of_gate_up, *of_down), join_formats(_format(gate_up_proj), _format(down_proj))


def _buffers(weight: Weight) -> Buffers:
    return weight.tensors() if isinstance(weight, QuantizedWeight) else (weight, None, None, None)


def _format(weight: Weight) -> WeightFormat | None:
    return weight.format if isinstance(weight, QuantizedWeight) else None


def _of_adapters(
    gate_up_adapter: LowRank | None,
    down_adapter: LowRank | None,
    gate_up_proj: Weight,
    down_proj: Weight,
    hidden_states: torch.Tensor,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[float, ...]]:
    """The op's factors of both adapters, which are checked, and what these are multiplied with."""
    factors: list[torch.Tensor | None] = []
    scalings: list[float] = []
    for name, adapter, weight in (
        ("gate_up_adapter", gate_up_adapter, gate_up_proj),
        ("down_adapter", down_adapter, down_proj),
    ):
        if adapter is not None:
            check_adapter(name, adapter, weight, hidden_states)
        factors += (None, None) if adapter is None else (adapter.a, adapter.b)
        scalings.append(1.0 if adapter is None else adapter.scaling)
    return tuple(factors), tuple(scalings)


def _may_keep_gate_up(keep: str, backend: str, hidden_states: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a gradient will be asked for that a backend may compute from gate_up."""
    return (
        keep == "gate_up"
        # Whoever runs an exported graph asks for no gradient. Not torch.compiler.is_exporting(), which is true in every
        # compiled function up to torch 2.11.
        and not torch.compiler._is_exporting_flag
        and backend != "reference"
        and hidden_states.is_cuda
        and hidden_states.dtype in _KEPT_DTYPES
        and (hidden_states.requires_grad or any(other is not None and other.requires_grad for other in others))
    )
