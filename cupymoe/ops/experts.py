"""The op of the experts, the one that keeps :class:`Kept` for its backward, the one that writes into given memory, and
the backward; LoRA's adapters are arguments.

A weight that is not contiguous is the ``transpose(1, 2)`` of a contiguous tensor, and so is its gradient. The factors
of its adapter, of the weight's dtype or of float32, may have any strides, and their gradients have them too.

All of them take the same tensors and settings, what is not served yet among them, so that a later capability changes no
fake, no gradient and no saved graph. The public functions refuse by name what is not served, and the ops trust them:

Where ``numerics`` is ``"invariant"``, who computes may not depend on where hidden states or the output begin in memory:
those that do not start on 16 bytes are copied.

Where ``weight_format`` is another than ``"plain"``, a weight that is quantised is its codes, and scales, zeros and
row_scales belong to them: the buffers of :class:`cupymoe.QuantizedWeight`. They have no gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from cupymoe import gradients
from cupymoe.activation import MoEActivation
from cupymoe.backends import (
    DIFFERENTIABLE,
    INVARIANT,
    ExpertsCall,
    ExpertsTensors,
    Kept,
    gradients_use_gate_up,
    select,
    slow,
)
from cupymoe.lora import padded_rank
from cupymoe.ops.activation import member_of
from cupymoe.ops.register import aligned, on_device_of, register
from cupymoe.weights.format import PLAIN

_TENSORS = (
    "Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor top_k_index, Tensor top_k_weights, "
    "Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b, Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? gate_up_scales, Tensor? gate_up_zeros, Tensor? gate_up_row_scales, "
    "Tensor? down_scales, Tensor? down_zeros, Tensor? down_row_scales, Tensor? expert_map"
)
_NUM_TENSORS = _TENSORS.count("Tensor")
_SETTINGS = (
    "str activation, float gate_up_scaling, float down_scaling, str weight_format, str numerics, "
    "int? global_num_experts, str backend"
)
_NUM_SETTINGS = _SETTINGS.count(",") + 1
_NUM_OF_PLAIN = ExpertsTensors._fields.index("gate_up_scales")
"""How many tensors a call with plain weights has; those of quantised ones come after them, and then the map."""

# Where the tensors that have a gradient stand among the arguments.
_DIFFERENTIABLE = [index for index, name in enumerate(ExpertsTensors._fields) if name in DIFFERENTIABLE]
_KEPT = ", ".join(f"Tensor? {name}" for name in Kept._fields)
_NOTHING_KEPT = (None,) * len(Kept._fields)
_WEIGHTS = [ExpertsTensors._fields.index(name) for name in ("gate_up_proj", "down_proj")]
_FACTORS = [ExpertsTensors._fields.index(name) for name in ("gate_up_a", "gate_up_b", "down_a", "down_b")]


def experts_call(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    activation: MoEActivation,
    adapters: Sequence[torch.Tensor | None] = (),
    scalings: tuple[float, float] = (1.0, 1.0),
    global_num_experts: int | None = None,
    out: torch.Tensor | None = None,
    has_bias: bool = False,
    weight_format: str = PLAIN,
    of_quantised: Sequence[torch.Tensor | None] = (),
    numerics: str = "fast",
) -> ExpertsCall:
    """What the backends are asked about."""
    num_tokens, top_k = top_k_index.shape
    num_experts, hidden_size, intermediate_size = down_proj.shape
    weights = gate_up_proj.data_ptr() | down_proj.data_ptr()
    if weight_format != PLAIN:  # codes have other shapes
        intermediate_size = activation.output_size(gate_up_proj.shape[1])
        for each in of_quantised:
            weights |= 0 if each is None else each.data_ptr()
    states = hidden_states.data_ptr() if out is None else hidden_states.data_ptr() | out.data_ptr()
    rank = max(padded_rank(a.shape[1]) for a in adapters[::2] if a is not None) if adapters else 0
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
        states % 16 == 0 or numerics == INVARIANT,
        weights % 16 == 0,
        rank,
        *scalings,
        global_num_experts,
        not gate_up_proj.is_contiguous(),
        not down_proj.is_contiguous(),
        has_bias,
        weight_format,
        numerics,
    )


def _contiguous(
    call: ExpertsCall,
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *others: torch.Tensor | None,
) -> ExpertsTensors:
    *of_weights, expert_map = others
    return ExpertsTensors._make(
        (
            aligned(hidden_states) if call.numerics == INVARIANT else hidden_states.contiguous(),
            gate_up_proj,
            down_proj,
            top_k_index.contiguous(),
            top_k_weights.contiguous(),
            *of_weights,
            None if expert_map is None else expert_map.contiguous(),
        )
    )


def _call(arguments: Sequence[Any], out: torch.Tensor | None = None) -> ExpertsCall:
    tensors = arguments[:_NUM_OF_PLAIN]
    hidden_states, gate_up_proj, down_proj, top_k_index, _, gate_up_a, _, down_a, _, gate_up_bias, down_bias = tensors
    activation, gate_up_scaling, down_scaling, weight_format, numerics, global_num_experts, _ = arguments[_NUM_TENSORS:]
    return experts_call(
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        member_of(activation),
        tensors[5:9] if gate_up_a is not None or down_a is not None else (),
        (gate_up_scaling, down_scaling),
        global_num_experts,
        out,
        gate_up_bias is not None or down_bias is not None,
        weight_format,
        arguments[_NUM_OF_PLAIN : _NUM_TENSORS - 1],
        numerics,
    )


def keeps_gate_up(*arguments: Any) -> bool:
    """Whether the gradients of a call, of the op's arguments, are computed from what its forward keeps."""
    return gradients_use_gate_up(arguments[-1], _call(arguments))


def _is_empty(arguments: Sequence[Any]) -> bool:
    """Whether there is nothing to compute."""
    _, _, down_proj, top_k_index = arguments[:4]
    return bool(top_k_index.numel() == 0 or down_proj.numel() == 0)


def _compute(arguments: Sequence[Any], out: torch.Tensor | None = None) -> torch.Tensor:
    hidden_states, tensors = arguments[0], arguments[:_NUM_TENSORS]
    call = _call(arguments, out)
    chosen = select(arguments[-1], call)
    if _is_empty(arguments):
        return hidden_states.new_zeros(hidden_states.shape) if out is None else out.zero_()
    with on_device_of(hidden_states):
        if out is not None and call.numerics == INVARIANT and out.data_ptr() % 16:
            return out.copy_(chosen.forward(call, _contiguous(call, *tensors)))
        return chosen.forward(call, _contiguous(call, *tensors), out)


def _fused_experts(*arguments: Any) -> torch.Tensor:
    return _compute(arguments)


def _fused_experts_fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _fused_experts_keeping(*arguments: Any) -> tuple[torch.Tensor, ...]:
    hidden_states, tensors = arguments[0], arguments[:_NUM_TENSORS]
    call = _call(arguments)
    chosen = select(arguments[-1], call)
    if _is_empty(arguments):
        output, *empty = _fused_experts_keeping_fake(*arguments)
        return output.zero_(), *empty
    with on_device_of(hidden_states):
        output, kept = chosen.forward_keeping(call, _contiguous(call, *tensors))
    return output, *(hidden_states.new_empty(0) if rows is None else rows for rows in kept)


def _fused_experts_keeping_fake(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    _: torch.Tensor,
    top_k_index: torch.Tensor,
    __: torch.Tensor,
    gate_up_a: torch.Tensor | None,
    ___: torch.Tensor | None,
    down_a: torch.Tensor | None,
    *____: Any,
) -> tuple[torch.Tensor, ...]:
    new_empty, pairs = hidden_states.new_empty, top_k_index.numel()
    lows = (new_empty(0 if a is None else (pairs, padded_rank(a.shape[1]))) for a in (gate_up_a, down_a))
    return new_empty(hidden_states.shape), new_empty((pairs, gate_up_proj.shape[1])), *lows


def _fused_experts_out(*arguments: Any) -> None:
    out = arguments[-1]
    _compute(arguments[:-1], out)
    # A kernel writes behind autograd's back, which would use an overwritten tensor that it has saved.
    torch.autograd.graph.increment_version(out)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *_NOTHING_KEPT)
    ctx.settings = inputs[_NUM_TENSORS:]


def _setup_keeping(ctx: Any, inputs: Any, outputs: Any) -> None:
    _, *kept = outputs
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(*inputs[:_NUM_TENSORS], *kept)
    ctx.settings = inputs[_NUM_TENSORS:]
    ctx.set_materialize_grads(False)  # those of what is kept would be zeros of its size


def _grad(ctx: Any, grad: torch.Tensor | None, *_of_kept: None) -> tuple[Any, ...]:
    result: list[torch.Tensor | None] = [None] * (_NUM_TENSORS + _NUM_SETTINGS)
    if grad is None:
        return tuple(result)
    needed = [ctx.needs_input_grad[index] for index in _DIFFERENTIABLE]
    saved = ctx.saved_tensors  # once: a checkpoint unpacks them only once
    tensors, kept = saved[:_NUM_TENSORS], saved[_NUM_TENSORS:]
    *settings, backend = ctx.settings
    if torch.is_grad_enabled():  # create_graph=True: only plain torch has gradients of gradients
        if grad.is_cuda and backend != "reference":  # what was asked for by name is not reported
            slow.report(
                "gradients with create_graph=True on CUDA by the slow backend 'reference'",
                "the kernels of the backward have no gradient of their own",
                "To have them fast, ask for them without create_graph=True.",
            )
        backend, kept = "reference", _NOTHING_KEPT
    grads = torch.ops.cupymoe.fused_experts_backward.default(grad, *tensors, *kept, *settings, backend, needed)
    for index, gradient, wanted in zip(_DIFFERENTIABLE, grads, needed, strict=True):
        result[index] = gradient if wanted else None
    return tuple(result)


# The backward returns a tensor for each that may have a gradient: its gradient, or an empty one in its place. A list of
# the needed ones alone would be simpler, but torch's vmap, and with it every batched gradient, has no fallback for ops
# that return a list.


def _zero_gradient(index: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Zeros, laid out as the gradient with respect to the tensor at an index is."""
    tensor = tensors[index]
    if index in _FACTORS:
        return torch.zeros_like(tensor)
    return gradients.zeros_as(tensor) if index in _WEIGHTS else tensor.new_zeros(tensor.shape)


@functools.lru_cache(maxsize=4096)
def _strides_like(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Those that ``torch.empty_like`` gives."""
    return torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()


def _laid_out(gradient: torch.Tensor, index: int, tensor: torch.Tensor) -> torch.Tensor:
    """A backend's gradient, as :func:`_zero_gradient` lays it out, which the fake implementation promises."""
    if index not in _FACTORS:
        return gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype)
    if gradient.dtype == tensor.dtype and gradient.stride() == _strides_like(tensor.shape, tensor.stride()):
        return gradient
    return torch.empty_like(tensor).copy_(gradient)


def _fused_experts_backward(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    gate_up, gate_up_low, down_low, *settings, needed = arguments[_NUM_TENSORS:]
    call = _call((*arguments[:_NUM_TENSORS], *settings))
    chosen = select(settings[-1], call, "backward")
    if _is_empty(arguments):
        return tuple(
            _zero_gradient(index, arguments) if wanted else grad.new_empty(0)
            for index, wanted in zip(_DIFFERENTIABLE, needed, strict=True)
        )
    with on_device_of(grad):
        tensors = _contiguous(call, *arguments[:_NUM_TENSORS])
        lows = (None if low is None or low.numel() == 0 else aligned(low) for low in (gate_up_low, down_low))
        kept = None if gate_up is None else Kept(aligned(gate_up), *lows)
        grads = chosen.backward(call, tensors, kept, aligned(grad), needed)
    return tuple(
        grad.new_empty(0) if gradient is None else _laid_out(gradient, index, arguments[index])
        for gradient, index in zip(grads, _DIFFERENTIABLE, strict=True)
    )


def _fused_experts_backward_fake(grad: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    return tuple(
        _zero_gradient(index, arguments) if wanted else grad.new_empty(0)
        for index, wanted in zip(_DIFFERENTIABLE, arguments[-1], strict=True)
    )


register(f"fused_experts({_TENSORS}, {_SETTINGS}) -> Tensor", _fused_experts, _fused_experts_fake, _grad, _setup)
register(
    f"fused_experts_keeping({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fused_experts_keeping,
    _fused_experts_keeping_fake,
    _grad,
    _setup_keeping,
)
register(
    f"fused_experts_out({_TENSORS}, {_SETTINGS}, Tensor(a!) out) -> ()",
    _fused_experts_out,
    lambda *arguments: None,
)
register(
    f"fused_experts_backward(Tensor grad, {_TENSORS}, {_KEPT}, {_SETTINGS}, bool[] needed) "
    f"-> ({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
    _fused_experts_backward,
    _fused_experts_backward_fake,
)
