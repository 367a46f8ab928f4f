"""The ops of routing: router logits of hidden states, the choice of experts, and their backwards."""

from __future__ import annotations

from typing import Any

import torch

from cupymoe import gradients, reference
from cupymoe.backends import INVARIANT
from cupymoe.ops.register import aligned, on_device_of, register


def _router_logits(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float, numerics: str
) -> torch.Tensor:
    if hidden_states.device.type != "cuda":
        if numerics == INVARIANT and len(hidden_states) > 1:
            return torch.cat([reference.router_logits(row, scale, projection, eps) for row in _alone(hidden_states)])
        return reference.router_logits(hidden_states, scale, projection, eps)
    from cupymoe.kernels.router_logits import router_logits, serves
    from cupymoe.kernels.router_logits_many import router_logits_many, unsupported_reason

    with on_device_of(hidden_states):
        if numerics == INVARIANT:
            if (reason := unsupported_reason(hidden_states)) is not None:
                raise ValueError(f"numerics='invariant' does not serve this router on CUDA: {reason}")
            hidden_states, scale, projection = map(aligned, (hidden_states, scale, projection))
            few = serves(hidden_states, scale, projection)  # the kernels make the same bits
            return (router_logits if few else router_logits_many)(hidden_states, scale, projection, eps)
        compute = router_logits if serves(hidden_states, scale, projection) else reference.router_logits
        return compute(hidden_states, scale, projection, eps)


def _alone(rows: torch.Tensor) -> list[torch.Tensor]:
    """Each row by itself, ``[1, columns]``, in memory of its own: torch may sum in another order for another number of
    rows, or at another alignment."""
    return [rows[token : token + 1].clone() for token in range(len(rows))]


def _router_logits_fake(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float, numerics: str
) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.shape[0], projection.shape[0]))


def _router_logits_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _router_logits_grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return *torch.ops.cupymoe.router_logits_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


def _router_logits_backward_fake(
    grad: torch.Tensor, hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (hidden_states, scale, projection))


register(
    "router_logits(Tensor hidden_states, Tensor scale, Tensor projection, float eps, str numerics) -> Tensor",
    _router_logits,
    _router_logits_fake,
    _router_logits_grad,
    _router_logits_setup,
)
register(
    "router_logits_backward(Tensor grad, Tensor hidden_states, Tensor scale, Tensor projection, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    gradients.router_logits_backward,
    _router_logits_backward_fake,
)


def _route(
    router_logits: torch.Tensor, top_k: int, per_expert_scale: torch.Tensor | None, renormalize: bool, numerics: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if router_logits.device.type != "cuda":
        rows = _alone(router_logits) if numerics == INVARIANT and len(router_logits) > 1 else [router_logits]
        of_rows = [reference.route(row, top_k, per_expert_scale, renormalize) for row in rows]
        weights, index = map(torch.cat, zip(*of_rows, strict=True))
        return weights.float(), index
    from cupymoe.kernels.route import route

    scale = per_expert_scale.contiguous() if per_expert_scale is not None else None
    with on_device_of(router_logits):
        return route(router_logits.contiguous(), top_k, scale, renormalize)


def _route_fake(
    router_logits: torch.Tensor, top_k: int, per_expert_scale: torch.Tensor | None, renormalize: bool, numerics: str
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int64)


def _route_setup(ctx: Any, inputs: Any, output: Any) -> None:
    router_logits, _, per_expert_scale, ctx.renormalize, _ = inputs
    ctx.save_for_backward(router_logits, output[1], per_expert_scale)
    ctx.mark_non_differentiable(output[1])


def _route_grad(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[Any, ...]:
    router_logits, index, per_expert_scale = ctx.saved_tensors
    grad_logits, grad_scale = torch.ops.cupymoe.route_backward(
        grad_weights, router_logits, index, per_expert_scale, ctx.renormalize
    )
    return grad_logits, None, None if per_expert_scale is None else grad_scale, None, None


def _route_backward_fake(
    grad_weights: torch.Tensor,
    router_logits: torch.Tensor,
    top_k_index: torch.Tensor,
    per_expert_scale: torch.Tensor | None,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale_dtype = reference.work_dtype(router_logits.dtype) if per_expert_scale is None else per_expert_scale.dtype
    return (
        router_logits.new_empty(router_logits.shape),
        router_logits.new_empty(router_logits.shape[1], dtype=scale_dtype),
    )


register(
    "route(Tensor router_logits, int top_k, Tensor? per_expert_scale, bool renormalize, str numerics) "
    "-> (Tensor, Tensor)",
    _route,
    _route_fake,
    _route_grad,
    _route_setup,
)
register(
    "route_backward(Tensor grad_weights, Tensor router_logits, Tensor top_k_index, Tensor? per_expert_scale, "
    "bool renormalize) -> (Tensor, Tensor)",
    gradients.route_backward,
    _route_backward_fake,
)
