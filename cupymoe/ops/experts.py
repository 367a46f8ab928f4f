"""The op of the experts, the one that writes into given memory, and their backward; LoRA's adapters are arguments.

A weight that is not contiguous is the ``transpose(1, 2)`` of a contiguous tensor, and so is its gradient.

All three take the same tensors and settings, what is not served yet among them, so that a later capability changes no
fake, no gradient and no saved graph. The public functions refuse by name what is not served, and the ops trust them:

- ``gate_up_scales``, ``gate_up_zeros``, ``down_scales``, ``down_zeros`` belong to weights of another ``weight_format``
  than ``"plain"``, and ``expert_map`` says which of all experts are here: None.
- ``weight_format`` is ``"plain"``, ``numerics`` is ``"fast"``.
- ``gate_up`` of the backward is what a forward that keeps it hands over: None, and the backward computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cupymoe import gradients
from cupymoe.activation import MoEActivation
from cupymoe.backends import DIFFERENTIABLE, ExpertsCall, ExpertsTensors, select, slow
from cupymoe.ops.activation import member_of
from cupymoe.ops.register import on_device_of, register

_TENSORS = (
    "Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor top_k_index, Tensor top_k_weights, "
    "Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? gate_up_scales, Tensor? gate_up_zeros, Tensor? down_scales, Tensor? down_zeros, Tensor? expert_map"
)
_NUM_TENSORS = _TENSORS.count("Tensor")
_SETTINGS = "str activation, str weight_format, str numerics, int? global_num_experts, str backend"
_NUM_SETTINGS = _SETTINGS.count(",") + 1
_NUM_COMPUTED_WITH = len(ExpertsTensors._fields)

# Where the tensors that have a gradient stand among the arguments.
_DIFFERENTIABLE = [index for index, name in enumerate(ExpertsTensors._fields) if name in DIFFERENTIABLE]
_WEIGHTS = (ExpertsTensors._fields.index("gate_up_proj"), ExpertsTensors._fields.index("down_proj"))


def experts_call(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    activation: MoEActivation,
    adapters: Sequence[torch.Tensor | None] = (),
    global_num_experts: int | None = None,
    out: torch.Tensor | None = None,
    has_bias: bool = False,
) -> ExpertsCall:
    """What the backends are asked about."""
    num_tokens, top_k = top_k_index.shape
    num_experts, hidden_size, intermediate_size = down_proj.shape
    states = hidden_states.data_ptr() if out is None else hidden_states.data_ptr() | out.data_ptr()
    has_adapters, factors = False, 0
    for factor in adapters:
        if factor is not None:
            has_adapters, factors = True, factors | factor.data_ptr()
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
        states % 16 == 0,
        (gate_up_proj.data_ptr() | down_proj.data_ptr()) % 16 == 0,
        has_adapters,
        factors % 16 == 0,
        global_num_experts,
        not gate_up_proj.is_contiguous(),
        not down_proj.is_contiguous(),
        has_bias,
    )


def _contiguous(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *adapters_and_biases: torch.Tensor | None,
) -> ExpertsTensors:
    return ExpertsTensors(
        hidden_states.contiguous(),
        gate_up_proj,
        down_proj,
        top_k_index.contiguous(),
        top_k_weights.contiguous(),
        *adapters_and_biases,
    )


def _compute(arguments: Sequence[Any], out: torch.Tensor | None = None) -> torch.Tensor:
    tensors = arguments[:_NUM_COMPUTED_WITH]
    hidden_states, gate_up_proj, down_proj, top_k_index, _, gate_up_a, _, down_a, _, gate_up_bias, down_bias = tensors
    activation, _, _, global_num_experts, backend = arguments[_NUM_TENSORS:]
    call = experts_call(
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        member_of(activation),
        tensors[5:9] if gate_up_a is not None or down_a is not None else (),
        global_num_experts,
        out,
        gate_up_bias is not None or down_bias is not None,
    )
    chosen = select(backend, call)
    if top_k_index.numel() == 0 or down_proj.numel() == 0:
        return hidden_states.new_zeros(hidden_states.shape) if out is None else out.zero_()
    with on_device_of(hidden_states):
        return chosen.forward(call, _contiguous(*tensors), out)


def _fused_experts(*arguments: Any) -> torch.Tensor:
    return _compute(arguments)


def _fused_experts_fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _fused_experts_out(*arguments: Any) -> None:
    out = arguments[-1]
    _compute(arguments[:-1], out)
    # A kernel writes behind autograd's back, which would use an overwritten tensor that it has saved.
    torch.autograd.graph.increment_version(out)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.settings = inputs[_NUM_TENSORS:]


def _grad(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[index] for index in _DIFFERENTIABLE]
    *settings, backend = ctx.settings
    if torch.is_grad_enabled():  # create_graph=True: only plain torch has gradients of gradients
        if grad.is_cuda and backend != "reference":  # what was asked for by name is not reported
            slow.report(
                "gradients with create_graph=True on CUDA by the slow backend 'reference'",
                "the kernels of the backward have no gradient of their own",
                "To have them fast, ask for them without create_graph=True.",
            )
        backend = "reference"
    grads = torch.ops.cupymoe.fused_experts_backward(grad, *ctx.saved_tensors, None, *settings, backend, needed)
    result: list[torch.Tensor | None] = [None] * (_NUM_TENSORS + _NUM_SETTINGS)
    for index, gradient, wanted in zip(_DIFFERENTIABLE, grads, needed, strict=True):
        result[index] = gradient if wanted else None
    return tuple(result)


# The backward returns a tensor for each that may have a gradient: its gradient, or an empty one in its place. A list of
# the needed ones alone would be simpler, but torch's vmap, and with it every batched gradient, has no fallback for ops
# that return a list.


def _zero_gradient(index: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros, laid out as the gradient with respect to the tensor at an index is."""
    tensor = tensors[index]
    return gradients.zeros_as(tensor) if index in _WEIGHTS else tensor.new_zeros(tensor.shape)


def _fused_experts_backward(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    tensors = arguments[:_NUM_COMPUTED_WITH]
    hidden_states, gate_up_proj, down_proj, top_k_index, _, *adapters, gate_up_bias, down_bias = tensors
    _, activation, _, _, global_num_experts, backend, needed = arguments[_NUM_TENSORS:]
    call = experts_call(
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        member_of(activation),
        adapters,
        global_num_experts,
        has_bias=gate_up_bias is not None or down_bias is not None,
    )
    chosen = select(backend, call, "backward")
    given = [arguments[index] for index in _DIFFERENTIABLE]
    if top_k_index.numel() == 0 or down_proj.numel() == 0:
        return tuple(
            _zero_gradient(index, arguments) if wanted else grad.new_empty(0)
            for index, wanted in zip(_DIFFERENTIABLE, needed, strict=True)
        )
    with on_device_of(hidden_states):
        grads = chosen.backward(call, _contiguous(*tensors), grad.contiguous(), needed)
    return tuple(
        grad.new_empty(0) if gradient is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(grads, given, strict=True)
    )


def _fused_experts_backward_fake(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(
        _zero_gradient(index, arguments) if wanted else grad.new_empty(0)
        for index, wanted in zip(_DIFFERENTIABLE, arguments[-1], strict=True)
    )


register(f"fused_experts({_TENSORS}, {_SETTINGS}) -> Tensor", _fused_experts, _fused_experts_fake, _grad, _setup)
register(
    f"fused_experts_out({_TENSORS}, {_SETTINGS}, Tensor(a!) out) -> ()",
    _fused_experts_out,
    lambda *arguments: None,
)
register(
    f"fused_experts_backward(Tensor grad, {_TENSORS}, Tensor? gate_up, {_SETTINGS}, bool[] needed) "
    f"-> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
    _fused_experts_backward,
    _fused_experts_backward_fake,
)
