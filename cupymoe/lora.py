"""LoRA on the experts without merging: ``x W^T + (x A^T) B^T``, forward and backward, behind ``cupymoe.lora_experts``.

Merged weights ``W + B A`` are 1.5 GB a layer at Gemma 4's sizes, to be written and read again for every call. Here the
low-rank products stand beside the grouped GEMMs, in expert order. The backward recomputes what it needs, so a call
keeps no more than its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm, pad

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.backends import registry
from cupymoe.gradients import activation_backward
from cupymoe.ops import experts_call, member_of, needed_gradients_fake, on_device_of, register

RANK_MULTIPLE = 8
"""Of the ranks that torch's grouped GEMM takes in bfloat16: its rows are whole 16-byte packs."""


class LowRank(NamedTuple):
    """What an adapter adds to a weight ``[E, out, in]``: ``b[e] @ a[e]``, any scaling included.

    Dtype and device are the weight's.
    """

    a: torch.Tensor
    """``[E, r, in]``"""
    b: torch.Tensor
    """``[E, out, r]``"""

    def prepared(self) -> LowRank:
        """Contiguous, with zeros up to a rank that the grouped GEMM takes; differentiable."""
        missing = -self.a.shape[1] % RANK_MULTIPLE
        if not missing:
            return LowRank(self.a.contiguous(), self.b.contiguous())
        return LowRank(pad(self.a, (0, 0, 0, missing)), pad(self.b, (0, missing)).contiguous())


class _ExpertOrder(ABC):
    """The kept (token, k) pairs by expert, and products of their rows with each row's own expert.

    Rows of masked pairs come last. They are undefined, and no product or sum of another row reads them.
    """

    slot_of_pair: torch.Tensor
    """``[T, K]`` row of each pair; -1: masked."""
    ends: torch.Tensor
    """``[E]`` int32, the row past each expert's last."""

    @abstractmethod
    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` -> ``[T * K, H]``."""

    @abstractmethod
    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``[T * K, H]`` -> ``[T, H]``, weighted with ``[T, K]`` in float32 or wider."""

    @abstractmethod
    def linear(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``rows @ weight[e].T``: ``[T * K, in]``, ``[E, out, in]`` -> ``[T * K, out]``."""

    @abstractmethod
    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Sums over each expert's rows: ``[T * K, out]``, ``[T * K, in]`` -> ``[E, out, in]``."""

    @abstractmethod
    def activate(self, gate_up: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
        """``act(gate) * up``."""

    def of_slots(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """``[T, K]`` -> ``[T * K, 1]``; zero for masked pairs."""
        pairs = of_pairs.numel()
        slots = torch.where(self.slot_of_pair < 0, pairs, self.slot_of_pair).flatten().long()
        return of_pairs.new_zeros(pairs + 1).scatter(0, slots, of_pairs.flatten())[:pairs, None]

    def of_pairs(self, of_slots: torch.Tensor) -> torch.Tensor:
        """``[T * K]`` -> ``[T, K]``; zero for masked pairs."""
        return torch.where(self.slot_of_pair < 0, 0, of_slots[self.slot_of_pair.clamp(min=0).long()])


class _Kernels(_ExpertOrder):
    """Our kernels and torch's grouped GEMM: what the ``grouped`` backend serves."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        from cupymoe.kernels.sort_by_expert import sort_by_expert

        pairs = sort_by_expert(top_k_index, num_experts)
        self.slot_of_pair, self.ends = pairs.slot_of_pair, pairs.expert_offsets[1:]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        from cupymoe.kernels.gather import gather

        return gather(states, self.slot_of_pair)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from cupymoe.kernels.combine import combine

        return combine(rows, self.slot_of_pair, weights)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return grouped_mm(rows, weight.transpose(1, 2), offs=self.ends)

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return grouped_mm(left.T, right, offs=self.ends)

    def activate(self, gate_up: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
        from cupymoe.kernels.gated_activation import gated_activation

        output = gate_up.new_empty((gate_up.shape[0], activation.output_size(gate_up.shape[1])))
        return gated_activation(gate_up, output, activation, num_rows=self.ends[-1:])


class _Loop(_ExpertOrder):
    """Plain torch, any device and dtype, one expert after the other; rows in float32 at least, as the reference's."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        kept = (top_k_index >= 0) & (top_k_index < num_experts)
        experts, pair_of_slot = torch.sort(torch.where(kept, top_k_index, num_experts).flatten(), stable=True)
        self.slot_of_pair = torch.where(kept, pair_of_slot.argsort().view_as(top_k_index), -1)
        following = torch.arange(1, num_experts + 1, dtype=experts.dtype, device=experts.device)
        self.ends = torch.searchsorted(experts, following)
        self._token_of_slot = pair_of_slot // top_k_index.shape[1]
        self._rows = [slice(start, end) for start, end in pairwise([0, *self.ends.tolist()])]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        return states.to(reference.work_dtype(states.dtype))[self._token_of_slot]

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        kept = (self.slot_of_pair >= 0).unsqueeze(-1)
        return torch.where(kept, rows[self.slot_of_pair.clamp(min=0)] * weights.unsqueeze(-1), 0).sum(1)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        output = rows.new_zeros((rows.shape[0], weight.shape[1]))
        for expert, its in enumerate(self._rows):
            output[its] = rows[its] @ weight[expert].to(rows.dtype).T
        return output

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.stack([left[its].T @ right[its] for its in self._rows])

    def activate(self, gate_up: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
        return reference.activate(gate_up, activation)


class _Linear(NamedTuple):
    """One of the experts' projections with its adapter: the weight is ``W + B A``, which is never formed."""

    order: _ExpertOrder
    weight: torch.Tensor
    a: torch.Tensor | None
    b: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ (W + B A)^T``."""
        output = self.order.linear(rows, self.weight)
        if self.a is None or self.b is None:
            return output
        return output + self.order.linear(self.order.linear(rows, self.a), self.b)

    def transposed(self) -> _Linear:
        """The projection back: its call is ``rows @ (W + B A)``."""
        a, b = (None if part is None else part.transpose(1, 2) for part in (self.a, self.b))
        return _Linear(self.order, self.weight.transpose(1, 2), b, a)

    def gradients(
        self, grad: torch.Tensor, rows: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """Of weight, a and b where needed, from the gradient of the output and the input, rows of both."""
        linear, outer = self.order.linear, self.order.outer
        return (
            outer(grad, rows) if needed[0] else None,
            outer(linear(grad, self.b.transpose(1, 2)), rows) if needed[1] and self.b is not None else None,
            outer(grad, linear(rows, self.a)) if needed[2] and self.a is not None else None,
        )


class _Call(NamedTuple):
    """The tensors of the op, in its order."""

    hidden_states: torch.Tensor
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    gate_up_a: torch.Tensor | None
    gate_up_b: torch.Tensor | None
    down_a: torch.Tensor | None
    down_b: torch.Tensor | None

    @property
    def is_empty(self) -> bool:
        """Whether every output is a sum of nothing: no pair, no expert, or a size of zero."""
        return not (self.top_k_index.numel() and self.down_proj.numel())

    def projections(self, activation: MoEActivation) -> tuple[_ExpertOrder, _Linear, _Linear]:
        """The pairs in expert order, and both projections over them."""
        call = experts_call(*self[:4], activation)
        adapters = [tensor for tensor in self[5:] if tensor is not None]
        served = registry()["grouped"].unsupported_reason(call) is None
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in adapters)
        order = (_Kernels if served and aligned else _Loop)(self.top_k_index.contiguous(), self.down_proj.shape[0])
        return (
            order,
            _Linear(order, self.gate_up_proj, self.gate_up_a, self.gate_up_b),
            _Linear(order, self.down_proj, self.down_a, self.down_b),
        )


def _forward(*arguments: Any) -> torch.Tensor:
    *tensors, name = arguments
    call, activation = _Call(*tensors), member_of(name)
    if call.is_empty:
        return call.hidden_states.new_zeros(call.hidden_states.shape)
    with on_device_of(call.hidden_states):
        order, up, down = call.projections(activation)
        intermediate = order.activate(up(order.gather(call.hidden_states.contiguous())), activation)
        output = order.combine(down(intermediate), call.top_k_weights.contiguous())
    return output.to(call.hidden_states.dtype)


def _backward(grad: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    """Gradients of the tensors that need one, in the op's order."""
    *tensors, name, needed = arguments
    call, activation = _Call(*tensors), member_of(name)
    if call.is_empty:
        return [torch.zeros_like(tensor) for tensor, wanted in zip(tensors, needed, strict=True) if wanted]
    with on_device_of(call.hidden_states):
        order, up, down = call.projections(activation)
        weights = call.top_k_weights.contiguous()
        weight_of_slot = order.of_slots(weights)
        states = order.gather(call.hidden_states.contiguous())
        gate_up = up(states)
        intermediate = order.activate(gate_up, activation)

        grad_output = order.gather(grad.contiguous())  # not yet weighted
        back = down.transposed()(grad_output)
        grad_weights = order.of_pairs((back.to(weights.dtype) * intermediate.to(weights.dtype)).sum(-1))
        grad_gate_up = activation_backward((back * weight_of_slot).to(back.dtype), gate_up, activation)
        weighted = (intermediate * weight_of_slot).to(intermediate.dtype)
        grad_states = order.combine(up.transposed()(grad_gate_up), torch.ones_like(weights)) if needed[0] else None

        up_weight, up_a, up_b = up.gradients(grad_gate_up, states, (needed[1], *needed[5:7]))
        down_weight, down_a, down_b = down.gradients(grad_output, weighted, (needed[2], *needed[7:]))
    grads = (grad_states, up_weight, down_weight, None, grad_weights, up_a, up_b, down_a, down_b)
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor, wanted in zip(grads, call, needed, strict=True)
        if wanted and gradient is not None and tensor is not None
    ]


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


@once_differentiable  # the kernels in it have no gradient of their own
def _autograd(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[: len(_Call._fields)])
    grads = iter(torch.ops.cupymoe.lora_experts_backward(grad, *ctx.saved_tensors, ctx.activation, needed))
    return *(next(grads) if wanted else None for wanted in needed), None


_TENSORS = (
    "Tensor hidden_states, Tensor gate_up_proj, Tensor down_proj, Tensor top_k_index, Tensor top_k_weights, "
    "Tensor? gate_up_a, Tensor? gate_up_b, Tensor? down_a, Tensor? down_b"
)
register(
    f"lora_experts({_TENSORS}, str activation) -> Tensor",
    _forward,
    lambda hidden_states, *_: hidden_states.new_empty(hidden_states.shape),
    _autograd,
    _setup_context,
)
register(
    f"lora_experts_backward(Tensor grad, {_TENSORS}, str activation, bool[] needed) -> Tensor[]",
    _backward,
    needed_gradients_fake,
)
