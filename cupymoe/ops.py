"""The torch ops behind the public functions: ``torch.ops.cupymoe.*``, with fake implementations and gradients.

They trust their arguments; :mod:`cupymoe.functional` checks them. Registered through ``torch.library.Library`` because
its dispatch costs 2 us a call, ``custom_op``'s 11.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cupymoe import gradients, reference
from cupymoe.activation import MoEActivation
from cupymoe.backends import ExpertsCall, select

_library = torch.library.Library("cupymoe", "DEF")  # type: ignore[no-untyped-call]

_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Define ``torch.ops.cupymoe.<name of schema>`` for every device."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cupymoe::{name}", fake, lib=_library)
    overload = getattr(torch.ops.cupymoe, name).default

    def without_autocast(*arguments: Any) -> Any:
        # The dtypes of the arguments are the contract; the torch code behind an op would be autocast step by step.
        with torch._C._ExcludeDispatchKeyGuard(_autocast):
            return overload(*arguments)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, without_autocast, key)  # type: ignore[no-untyped-call]
    if backward is not None:
        torch.library.register_autograd(f"cupymoe::{name}", backward, setup_context=setup_context, lib=_library)


def dispatch(overload: Any, *arguments: Any) -> Any:
    """Calls an op; under ``no_grad`` past autograd's kernel, which is Python, would do nothing, and costs 6 us."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return overload(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*arguments)


_as_is = nullcontext()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a CUDA tensor's device the current one, where it isn't."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _as_is


# --- activations ------------------------------------------------------------------------------------------------------

member_of = functools.cache(MoEActivation.from_str)
"""What an op's string means; a program that was exported elsewhere may bring parameters that are new here."""


def _activate_into(input: torch.Tensor, output: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    if input.device.type != "cuda":
        # In float64: float32's sigmoid is 0 where bfloat16 still has subnormals.
        return output.copy_(reference.activate(input.double(), activation))
    from cupymoe.kernels.gated_activation import gated_activation

    with on_device_of(input):
        if output.is_contiguous():
            return gated_activation(input.contiguous(), output, activation)
        contiguous = torch.empty_like(output, memory_format=torch.contiguous_format)
        return output.copy_(gated_activation(input.contiguous(), contiguous, activation))


def _new_output(input: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], activation.output_size(input.shape[-1])))


def _moe_activation(input: torch.Tensor, activation: str) -> torch.Tensor:
    member = member_of(activation)
    return _activate_into(input, _new_output(input, member), member)


def _moe_activation_fake(input: torch.Tensor, activation: str) -> torch.Tensor:
    return _new_output(input, member_of(activation))


def _moe_activation_setup(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    input, ctx.activation = inputs
    ctx.save_for_backward(input)


def _moe_activation_grad(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.cupymoe.activation_backward(grad, ctx.saved_tensors[0], ctx.activation), None


register(
    "moe_activation(Tensor input, str activation) -> Tensor",
    _moe_activation,
    _moe_activation_fake,
    _moe_activation_grad,
    _moe_activation_setup,
)


def _register_activation(activation: MoEActivation) -> None:
    def forward(input: torch.Tensor) -> torch.Tensor:
        return _activate_into(input, _new_output(input, activation), activation)

    def fake(input: torch.Tensor) -> torch.Tensor:
        return _new_output(input, activation)

    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        gradient: torch.Tensor = torch.ops.cupymoe.activation_backward(grad, ctx.saved_tensors[0], activation.value)
        return gradient

    register(f"{activation.custom_op_name}(Tensor input) -> Tensor", forward, fake, backward, setup_context)


for _activation in MoEActivation:
    _register_activation(_activation)


def _activation_backward(grad: torch.Tensor, input: torch.Tensor, activation: str) -> torch.Tensor:
    return gradients.activation_backward(grad, input, member_of(activation))


def _activation_backward_fake(grad: torch.Tensor, input: torch.Tensor, activation: str) -> torch.Tensor:
    return input.new_empty(input.shape)


register(
    "activation_backward(Tensor grad, Tensor input, str activation) -> Tensor",
    _activation_backward,
    _activation_backward_fake,
)


def _apply_moe_activation(activation: str, output: torch.Tensor, input: torch.Tensor) -> None:
    _activate_into(input, output, member_of(activation))
    # A kernel writes behind autograd's back, which would use an overwritten tensor that it has saved.
    torch.autograd.graph.increment_version(output)


register(
    "apply_moe_activation(str activation, Tensor(a!) output, Tensor input) -> ()",
    _apply_moe_activation,
    lambda activation, output, input: None,
)


# --- routing ----------------------------------------------------------------------------------------------------------


def _router_logits(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> torch.Tensor:
    if hidden_states.device.type != "cuda":
        return reference.router_logits(hidden_states, scale, projection, eps)
    from cupymoe.kernels.router_logits import router_logits, serves

    with on_device_of(hidden_states):
        compute = router_logits if serves(hidden_states, scale, projection) else reference.router_logits
        return compute(hidden_states, scale, projection, eps)


def _router_logits_fake(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> torch.Tensor:
    return hidden_states.new_empty((hidden_states.shape[0], projection.shape[0]))


def _router_logits_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _router_logits_grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return *torch.ops.cupymoe.router_logits_backward(grad, *ctx.saved_tensors, ctx.eps), None


def _router_logits_backward_fake(
    grad: torch.Tensor, hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (hidden_states, scale, projection))


register(
    "router_logits(Tensor hidden_states, Tensor scale, Tensor projection, float eps) -> Tensor",
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
    router_logits: torch.Tensor, top_k: int, per_expert_scale: torch.Tensor | None, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if router_logits.device.type != "cuda":
        weights, index = reference.route(router_logits, top_k, per_expert_scale, renormalize)
        return weights.float(), index
    from cupymoe.kernels.route import route

    scale = per_expert_scale.contiguous() if per_expert_scale is not None else None
    with on_device_of(router_logits):
        return route(router_logits.contiguous(), top_k, scale, renormalize)


def _route_fake(
    router_logits: torch.Tensor, top_k: int, per_expert_scale: torch.Tensor | None, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (router_logits.shape[0], top_k)
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int64)


def _route_setup(ctx: Any, inputs: Any, output: Any) -> None:
    router_logits, _, per_expert_scale, ctx.renormalize = inputs
    ctx.save_for_backward(router_logits, output[1], per_expert_scale)
    ctx.mark_non_differentiable(output[1])


def _route_grad(ctx: Any, grad_weights: torch.Tensor, _: Any) -> tuple[Any, ...]:
    router_logits, index, per_expert_scale = ctx.saved_tensors
    grad_logits, grad_scale = torch.ops.cupymoe.route_backward(
        grad_weights, router_logits, index, per_expert_scale, ctx.renormalize
    )
    return grad_logits, None, None if per_expert_scale is None else grad_scale, None


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
    "route(Tensor router_logits, int top_k, Tensor? per_expert_scale, bool renormalize) -> (Tensor, Tensor)",
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


# --- experts ----------------------------------------------------------------------------------------------------------


def experts_call(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    activation: MoEActivation,
) -> ExpertsCall:
    """What the backends are asked about."""
    num_tokens, top_k = top_k_index.shape
    num_experts, hidden_size, intermediate_size = down_proj.shape
    # By position: names cost 1 us.
    return ExpertsCall(
        hidden_states.device,
        hidden_states.dtype,
        activation,
        num_tokens,
        top_k,
        num_experts,
        hidden_size,
        intermediate_size,
        hidden_states.data_ptr() % 16 == 0,
        (gate_up_proj.data_ptr() | down_proj.data_ptr()) % 16 == 0,
    )


def _fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: str,
    backend: str,
) -> torch.Tensor:
    member = member_of(activation)
    chosen = select(backend, experts_call(hidden_states, gate_up_proj, down_proj, top_k_index, member))
    if top_k_index.numel() == 0 or down_proj.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape)
    with on_device_of(hidden_states):
        return chosen(
            hidden_states.contiguous(),
            gate_up_proj,
            down_proj,
            top_k_index.contiguous(),
            top_k_weights.contiguous(),
            member,
        )


def _fused_experts_fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _fused_experts_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors)


def _fused_experts_grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:5])
    grads = iter(torch.ops.cupymoe.fused_experts_backward(grad, *ctx.saved_tensors, ctx.activation, needed))
    return *(next(grads) if wanted else None for wanted in needed), None, None


def _fused_experts_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    activation: str,
    needed: list[bool],
) -> list[torch.Tensor]:
    """Gradients of the tensors that need one, in the op's order."""
    grads = gradients.experts_backward(
        grad, hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, member_of(activation), needed
    )
    return [gradient for gradient in grads if gradient is not None]


def needed_gradients_fake(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    """Of a backward op whose arguments are the gradient, its tensors, the activation and which of them need one."""
    *tensors, _, needed = arguments
    return [tensor.new_empty(tensor.shape) for tensor, wanted in zip(tensors, needed, strict=True) if wanted]


register(
    "fused_experts(Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor top_k_index, "
    "Tensor top_k_weights, str activation, str backend) -> Tensor",
    _fused_experts,
    _fused_experts_fake,
    _fused_experts_grad,
    _fused_experts_setup,
)
register(
    "fused_experts_backward(Tensor grad, Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, "
    "Tensor top_k_index, Tensor top_k_weights, str activation, bool[] needed) -> Tensor[]",
    _fused_experts_backward,
    needed_gradients_fake,
)
