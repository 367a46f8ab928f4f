"""The truth, in plain torch: any device, any floating dtype, no kernels. In float64 it is the oracle of every test.

16-bit inputs are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import math

import torch

from cupymoe.activation import MoEActivation


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a computation on ``dtype`` runs in: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32  # promote_types takes 0.4 us of every call


def split_gate_up(input: torch.Tensor, activation: MoEActivation) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up of ``[..., 2N]``; an ungated input is its own gate, with an up of one."""
    if not activation.is_gated:
        return input, torch.ones((), dtype=input.dtype, device=input.device)
    if activation.is_interleaved:
        return input[..., 0::2], input[..., 1::2]
    gate, up = input.chunk(2, dim=-1)
    return gate, up


def activate(input: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    """``act(gate) * up`` of ``[..., 2N]`` (or ``act(x)`` of ``[..., N]``), unrounded in the work dtype."""
    gate, up = split_gate_up(input.to(work_dtype(input.dtype)), activation)
    value = activation.definition.gate(gate, activation.parameters)[0]
    return value * activation.definition.up(up, activation.parameters)[0] if activation.is_gated else value


def router_input(hidden_states: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """What Gemma 4's router projects: RMSNorm without a weight, times ``scale * H^-0.5``.

    Rounded to the dtype of ``hidden_states`` where transformers rounds, so that the logits are the same bits.
    """
    states = hidden_states.to(work_dtype(hidden_states.dtype))
    mean_square = states.pow(2).mean(-1, keepdim=True) + eps
    normed = (states * torch.pow(mean_square, -0.5)).type_as(hidden_states)
    return normed * scale * math.pow(hidden_states.shape[-1], -0.5)


def router_logits(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> torch.Tensor:
    """Gemma 4's router logits, ``[..., E]`` of ``[..., H]``."""
    logits: torch.Tensor = router_input(hidden_states, scale, eps) @ projection.T
    return logits


def route(
    router_logits: torch.Tensor, top_k: int, per_expert_scale: torch.Tensor | None = None, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts of each token: softmax over all experts, top k of the logits, ties to the lower index."""
    logits = router_logits.to(work_dtype(router_logits.dtype))
    index = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = torch.softmax(logits, dim=-1).gather(-1, index)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.to(weights.dtype)[index]
    return weights, index


def linear(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
    """One expert's projection of rows, ``rows @ weight[expert].T + bias[expert]``, in their dtype."""
    output = rows @ weight[expert].to(rows.dtype).T
    return output if bias is None else output + bias[expert].to(rows.dtype)


def experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: MoEActivation,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token's weighted sum over its experts, ``[T, H]`` in the work dtype; masked pairs contribute nothing."""
    work = work_dtype(hidden_states.dtype)
    output = torch.zeros(hidden_states.shape, dtype=work, device=hidden_states.device)
    for expert in range(gate_up_proj.shape[0]):
        token, k = torch.where(top_k_index == expert)
        if len(token):
            gate_up = linear(hidden_states[token].to(work), gate_up_proj, gate_up_bias, expert)
            expert_output = linear(activate(gate_up, activation), down_proj, down_bias, expert)
            output.index_add_(0, token, expert_output * top_k_weights[token, k, None].to(work))
    return output
