"""Gradients in plain torch, on any device: of activations and routing, and of the experts on the reference backend.

The other backends compute the experts' gradients by :func:`cupymoe.backends.expert_rows.backward`. Each function here
takes what its forward saved and returns contiguous gradients (those of weights laid out as the weights), computed
unrounded and cast to the dtype of what they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cupymoe.activation import MoEActivation
from cupymoe.reference import activate, linear, split_gate_up, work_dtype


def zeros_as(weight: torch.Tensor) -> torch.Tensor:
    """Zeros laid out as a weight is: contiguous, or else the ``transpose(1, 2)`` of a contiguous tensor."""
    if weight.is_contiguous():
        return weight.new_zeros(weight.shape)
    return weight.new_zeros(weight.transpose(1, 2).shape).transpose(1, 2)


def activation_backward(grad: torch.Tensor, input: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    """Gradient of :func:`reference.activate` with respect to ``input``, in the dtype of ``input``.

    Args:
        grad: of the output, ``[..., N]``.
        input: ``[..., 2N]``, or ``[..., N]`` for an ungated member.
    """
    work = work_dtype(input.dtype)
    grad = grad.to(work)
    gate, up = split_gate_up(input.to(work), activation)
    value, slope = activation.definition.gate(gate, activation.parameters)
    if not activation.is_gated:
        return (grad * slope()).to(input.dtype).contiguous()
    factor, factor_slope = activation.definition.up(up, activation.parameters)
    halves = (grad * factor * slope(), grad * value * factor_slope())
    joined = torch.stack(halves, -1).flatten(-2) if activation.is_interleaved else torch.cat(halves, -1)
    return joined.to(input.dtype)


def router_logits_backward(
    grad: torch.Tensor, hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`reference.router_logits` with respect to its three tensors, without its roundings."""
    hidden_size = hidden_states.shape[-1]
    work = work_dtype(hidden_states.dtype)
    states, wide_scale, grad = hidden_states.to(work), scale.to(work) * hidden_size**-0.5, grad.to(work)
    norm = torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)
    normed = states * norm
    grad_input = grad @ projection.to(work)
    grad_normed = grad_input * wide_scale
    # d(x norm)/dx: norm is a function of the whole row.
    along = (grad_normed * normed).mean(-1, keepdim=True)
    return (
        ((grad_normed - normed * along) * norm).to(hidden_states.dtype),
        ((grad_input * normed).sum(0) * hidden_size**-0.5).to(scale.dtype),
        (grad.T @ (normed * wide_scale)).to(projection.dtype),
    )


def route_backward(
    grad_weights: torch.Tensor,
    router_logits: torch.Tensor,
    top_k_index: torch.Tensor,
    per_expert_scale: torch.Tensor | None,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the weights of :func:`reference.route`: of the logits, and of the scale (zeros without one)."""
    work = work_dtype(router_logits.dtype)
    logits, grad = router_logits.to(work), grad_weights.to(work)
    if renormalize:
        # The denominator of the softmax cancels: the weights are a softmax over the chosen logits alone.
        unscaled = torch.softmax(logits.gather(-1, top_k_index), dim=-1)
    else:
        unscaled = torch.softmax(logits, dim=-1).gather(-1, top_k_index)
    grad_scale = torch.zeros(logits.shape[-1], dtype=work, device=logits.device)
    if per_expert_scale is not None:
        grad_scale.index_add_(0, top_k_index.flatten(), (grad * unscaled).flatten())
        grad = grad * per_expert_scale.to(work)[top_k_index]
    weighted = grad * unscaled
    total = weighted.sum(-1, keepdim=True)
    if renormalize:
        grad_logits = logits.new_zeros(logits.shape).scatter(-1, top_k_index, weighted - unscaled * total)
    else:
        grad_logits = (torch.softmax(logits, dim=-1) * -total).scatter_add(-1, top_k_index, weighted)
    scale_dtype = per_expert_scale.dtype if per_expert_scale is not None else work
    return grad_logits.to(router_logits.dtype), grad_scale.to(scale_dtype)


def experts_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: MoEActivation,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of :func:`reference.experts` with respect to its tensors; None where not needed, and of the index.

    An expert without tokens has a gradient of zeros, and so has a masked pair's weight. A gradient of ``gate_up_proj``
    or ``down_proj`` is laid out as :func:`zeros_as`.

    Args:
        needed: which of the five tensors and the two biases.
    """
    work = work_dtype(hidden_states.dtype)
    need_hidden, need_gate_up, need_down, _, need_weights, need_gate_up_bias, need_down_bias = needed
    grad_hidden = hidden_states.new_zeros(hidden_states.shape, dtype=work) if need_hidden else None
    grad_gate_up = zeros_as(gate_up_proj) if need_gate_up else None
    grad_down = zeros_as(down_proj) if need_down else None
    grad_gate_up_bias = (
        gate_up_bias.new_zeros(gate_up_bias.shape) if need_gate_up_bias and gate_up_bias is not None else None
    )
    grad_down_bias = down_bias.new_zeros(down_bias.shape) if need_down_bias and down_bias is not None else None
    grad_weights = top_k_weights.new_zeros(top_k_weights.shape, dtype=work) if need_weights else None
    for expert in range(gate_up_proj.shape[0]):
        token, k = torch.where(top_k_index == expert)
        if not len(token):
            continue
        states, grad_output = hidden_states[token].to(work), grad[token].to(work)
        gate_up = linear(states, gate_up_proj, gate_up_bias, expert)
        intermediate = activate(gate_up, activation)
        if grad_weights is not None:
            grad_weights[token, k] = (grad_output * linear(intermediate, down_proj, down_bias, expert)).sum(-1)
        grad_expert_output = grad_output * top_k_weights[token, k, None].to(work)
        if grad_down is not None:
            grad_down[expert] = grad_expert_output.T @ intermediate
        if grad_down_bias is not None:
            grad_down_bias[expert] = grad_expert_output.sum(0)
        if grad_gate_up is None and grad_hidden is None and grad_gate_up_bias is None:
            continue
        grad_of_gate_up = activation_backward(grad_expert_output @ down_proj[expert].to(work), gate_up, activation)
        if grad_gate_up is not None:
            grad_gate_up[expert] = grad_of_gate_up.T @ states
        if grad_gate_up_bias is not None:
            grad_gate_up_bias[expert] = grad_of_gate_up.sum(0)
        if grad_hidden is not None:
            grad_hidden.index_add_(0, token, grad_of_gate_up @ gate_up_proj[expert].to(work))
    return (
        None if grad_hidden is None else grad_hidden.to(hidden_states.dtype),
        grad_gate_up,
        grad_down,
        None,
        None if grad_weights is None else grad_weights.to(top_k_weights.dtype),
        grad_gate_up_bias,
        grad_down_bias,
    )
