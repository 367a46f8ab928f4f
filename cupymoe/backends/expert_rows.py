"""The algebra of rows in expert order: what a forward and a backward of the experts consist of, LoRA's products too.

One row is one kept (token, k) pair, and the rows of an expert lie together. :func:`forward` and :func:`backward` are
written once, in terms of what an :class:`ExpertRows` can do, and a backend says with whose kernels that is done. A LoRA
adapter is never merged: its low-rank products stand beside those with the weight, ``x W^T + (x A^T) B^T``. The backward
computes from the arguments what it needs and was not kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.backends import DIFFERENTIABLE, BatchTensors, Direction, ExpertsCall, ExpertsTensors, Kept
from cupymoe.backends.adapters import adapters_of
from cupymoe.gradients import activation_backward
from cupymoe.lora import LowRank, Packed
from cupymoe.weights.dequantize import WeightOnDemand
from cupymoe.weights.format import PLAIN, formats_of


class ExpertRows(ABC):
    """The kept (token, k) pairs by expert, and products of their rows with each row's own expert.

    Rows of masked pairs come last. They are undefined, and no product or sum of another row reads them.
    """

    slot_of_pair: torch.Tensor
    """``[T, K]`` row of each pair; -1: masked."""

    @abstractmethod
    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None: ...

    def packed(self, adapter: LowRank, weight: torch.Tensor) -> Packed:
        """An adapter of a weight, for :meth:`linear`."""
        return adapter.packed(weight)

    @abstractmethod
    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` -> ``[T * K, H]``."""

    @abstractmethod
    def combine(self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``[T * K, H]`` -> ``[T, H]``, weighted with ``[T, K]`` in float32 or wider; into ``out`` if it is given."""

    @abstractmethod
    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``rows @ weight[e].T + bias[e]``: ``[T * K, in]``, ``[E, out, in]``, ``[E, out]`` -> ``[T * K, out]``."""

    @abstractmethod
    def outer(self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sums over each expert's rows: ``[T * K, out]``, ``[T * K, in]`` -> ``[E, out, in]``; zeros without rows."""

    @abstractmethod
    def activate(self, gate_up: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
        """``act(gate) * up``."""

    def sums(self, rows: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sums over each expert's rows of ``factors * rows``: ``[T * K, out]``, ``[T * K, 1]`` -> ``[E, out]``."""
        # Eight columns, because the grouped GEMM takes rows of whole 16-byte packs.
        return self.outer(rows, factors.expand(-1, 8).contiguous(), dtype)[..., 0].contiguous()

    def of_slots(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """``[T, K]`` -> ``[T * K, 1]``; zero for masked pairs."""
        pairs = of_pairs.numel()
        slots = torch.where(self.slot_of_pair < 0, pairs, self.slot_of_pair).flatten().long()
        return of_pairs.new_zeros(pairs + 1).scatter(0, slots, of_pairs.flatten())[:pairs, None]

    def of_pairs(self, of_slots: torch.Tensor) -> torch.Tensor:
        """``[T * K]`` -> ``[T, K]``; zero for masked pairs."""
        return torch.where(self.slot_of_pair < 0, 0, of_slots[self.slot_of_pair.clamp(min=0).long()])


class Projection(NamedTuple):
    """One of the experts' projections, with its adapter and its bias, if it has them: the weight is ``W + B A``, which
    is never formed."""

    rows: ExpertRows
    weight: torch.Tensor
    adapter: Packed | None
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls, rows: ExpertRows, weight: torch.Tensor, adapter: LowRank | None, bias: torch.Tensor | None
    ) -> Projection:
        """The adapter is packed here."""
        return cls(rows, weight, None if adapter is None else rows.packed(adapter, weight), bias)

    def low(self, rows: torch.Tensor) -> torch.Tensor | None:
        """``rows @ A^T``, where there is an adapter."""
        return None if self.adapter is None else self.rows.linear(rows, self.adapter.a)

    def __call__(self, rows: torch.Tensor, low: torch.Tensor | None) -> torch.Tensor:
        """``rows @ (W + B A)^T + bias``, given what :meth:`low` makes of the rows."""
        output = self.rows.linear(rows, self.weight, self.bias)
        return output if self.adapter is None or low is None else output + self.rows.linear(low, self.adapter.b)

    def transposed(self) -> Projection:
        """The projection back, by ``W + B A``."""
        adapter = None if self.adapter is None else self.adapter.transposed()
        return Projection(self.rows, self.weight.transpose(1, 2), adapter, None)

    def gradients(
        self, grad: torch.Tensor, rows: torch.Tensor, low: torch.Tensor | None, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients with respect to the weight, and to the adapter's a and b as they were given; None where not needed.

        Args:
            grad: of the output, ``[T * K, out]`` in expert order.
            rows: the input, ``[T * K, in]`` in expert order.
            low: what :meth:`low` makes of ``rows``; None: it is computed where it is needed.
            needed: which of the three.
        """
        linear, outer, dtype = self.rows.linear, self.rows.outer, reference.work_dtype(self.weight.dtype)
        of_weight = self._outer_as_weight(grad, rows) if needed[0] else None
        of_a = of_b = None
        if self.adapter is not None:
            a, b, given = self.adapter
            rank = given.a.shape[1]
            if needed[1]:  # b is scaled, a is not
                of_a = outer(linear(grad, b.transpose(1, 2)), rows, dtype)[:, :rank]
            if needed[2]:
                low = linear(rows, a) if low is None else low
                of_b = outer(grad, low, dtype)[..., :rank] * given.scaling
        return of_weight, of_a, of_b

    def _outer_as_weight(self, grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The weight's gradient in the layout of the weight, in which autograd can keep it without a copy."""
        if self.weight.is_contiguous():
            return self.rows.outer(grad, rows, self.weight.dtype)
        return self.rows.outer(rows, grad, self.weight.dtype).transpose(1, 2)


def dequantised(call: ExpertsCall) -> str:
    """What a backend's way adds where a weight is quantised."""
    return "" if call.weight_format == PLAIN else ", weights dequantised a few experts at a time"


def in_local_experts(tensors: ExpertsTensors) -> ExpertsTensors:
    """The same with ``top_k_index`` of the experts that are here and no map, where there is one."""
    if tensors.expert_map is None:
        return tensors
    index, count = tensors.top_k_index, len(tensors.expert_map)
    local = tensors.expert_map[index.clamp(0, count - 1)]
    return tensors._replace(top_k_index=torch.where((index >= 0) & (index < count), local, -1), expert_map=None)


def on_demand(call: ExpertsCall, tensors: ExpertsTensors) -> ExpertsTensors:
    """The same with a :class:`WeightOnDemand` for each weight that is quantised, which stands in for a tensor."""
    if call.weight_format == PLAIN:
        return tensors
    of_gate_up, of_down = formats_of(call.weight_format)
    num_experts, hidden_size, width = call.num_experts, call.hidden_size, tensors.gate_up_proj.shape[1]
    weights: dict[str, Any] = {}
    if of_gate_up is not None:
        buffers = tensors.gate_up_proj, tensors.gate_up_scales, tensors.gate_up_zeros, tensors.gate_up_row_scales
        weights["gate_up_proj"] = WeightOnDemand(of_gate_up, (num_experts, width, hidden_size), buffers, call.dtype)
    if of_down is not None:
        shape = num_experts, hidden_size, call.intermediate_size
        buffers = tensors.down_proj, tensors.down_scales, tensors.down_zeros, tensors.down_row_scales
        weights["down_proj"] = WeightOnDemand(of_down, shape, buffers, call.dtype)
    return tensors._replace(**weights)


def _projections(rows: ExpertRows, call: ExpertsCall, tensors: ExpertsTensors) -> tuple[Projection, Projection]:
    gate_up, down = adapters_of(call, tensors)
    return (
        Projection.of(rows, tensors.gate_up_proj, gate_up, tensors.gate_up_bias),
        Projection.of(rows, tensors.down_proj, down, tensors.down_bias),
    )


def forward(
    rows: ExpertRows, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, Kept]:
    """``[T, H]`` of the op's tensors, in the dtype of ``hidden_states``, into ``out`` if it is given; and what the
    gradients are computed from, not yet rounded."""
    up, down = _projections(rows, call, tensors)
    states = rows.gather(tensors.hidden_states)
    gate_up_low = up.low(states)
    gate_up = up(states, gate_up_low)
    del states  # as large as the output of all slots
    intermediate = rows.activate(gate_up, call.activation)
    down_low = down.low(intermediate)
    output = rows.combine(down(intermediate, down_low), tensors.top_k_weights, out)
    return output.to(tensors.hidden_states.dtype), Kept(gate_up, gate_up_low, down_low)


def backward(
    rows: ExpertRows,
    call: ExpertsCall,
    tensors: ExpertsTensors,
    kept: Kept | None,
    grad: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients with respect to :data:`cupymoe.backends.DIFFERENTIABLE`; None where not needed, and then not computed.

    Args:
        rows: of the op's ``top_k_index``.
        call: what is computed.
        tensors: the op's.
        kept: by a forward; None: it is computed again.
        grad: of the output, ``[T, H]``.
        needed: which of the tensors want one.
    """
    of_states, of_up, of_down, of_weights, *of_adapters, of_up_bias, of_down_bias = needed
    of_gate_up = of_states or of_up or any(of_adapters[:2]) or of_up_bias
    up, down = _projections(rows, call, tensors)
    weights = tensors.top_k_weights
    weight_of_slot = rows.of_slots(weights)
    grad_output = rows.gather(grad)  # not yet weighted
    needs_gate_up = of_weights or of_gate_up or of_down or any(of_adapters[2:])
    if of_up or any(of_adapters[:2]) or (needs_gate_up and kept is None):
        states = rows.gather(tensors.hidden_states)
    gate_up_low = down_low = None
    if kept is not None:
        inputs, gate_up_low, down_low = kept  # inputs of the activation
    elif needs_gate_up:
        gate_up_low = up.low(states)
        inputs = up(states, gate_up_low)
    grads: dict[str, torch.Tensor | None] = {}
    if of_weights or of_down or any(of_adapters[2:]):
        intermediate = rows.activate(inputs, call.activation)
    if of_down or any(of_adapters[2:]):
        weighted = _times(intermediate, weight_of_slot)
        grads["down_proj"], grads["down_a"], grads["down_b"] = down.gradients(
            grad_output,
            weighted,
            None if down_low is None else _times(down_low, weight_of_slot),
            (of_down, *of_adapters[2:]),
        )
    if of_down_bias:
        grads["down_bias"] = rows.sums(grad_output, weight_of_slot, tensors.down_proj.dtype)
    if of_weights or of_gate_up:
        down_back = down.transposed()
        back = down_back(grad_output, down_back.low(grad_output))
    if of_weights:
        of_slots = (back.to(weights.dtype) * intermediate.to(weights.dtype)).sum(-1)
        of_pairs = rows.of_pairs(of_slots)
        if tensors.down_bias is not None:
            wide = grad.to(weights.dtype)
            of_pairs = of_pairs + dot_with_bias(rows.slot_of_pair, wide, tensors.down_bias, tensors.top_k_index)
        grads["top_k_weights"] = of_pairs
    if of_gate_up:
        grad_gate_up = activation_backward(_times(back, weight_of_slot), inputs, call.activation)
    if of_up or any(of_adapters[:2]):
        grads["gate_up_proj"], grads["gate_up_a"], grads["gate_up_b"] = up.gradients(
            grad_gate_up, states, gate_up_low, (of_up, *of_adapters[:2])
        )
    if of_up_bias:
        ones = grad_gate_up.new_ones((len(grad_gate_up), 1))
        grads["gate_up_bias"] = rows.sums(grad_gate_up, ones, tensors.gate_up_proj.dtype)
    if of_states:
        up_back = up.transposed()
        of_slots = up_back(grad_gate_up, up_back.low(grad_gate_up))
        grads["hidden_states"] = rows.combine(of_slots, torch.ones_like(weights))
    return tuple(grads.get(name) for name in DIFFERENTIABLE)


def _times(rows: torch.Tensor, weight_of_slot: torch.Tensor) -> torch.Tensor:
    """Each row with its weight, in the dtype of the rows."""
    return (rows * weight_of_slot).to(rows.dtype)


def dot_with_bias(
    slot_of_pair: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor, top_k_index: torch.Tensor
) -> torch.Tensor:
    """``grad[t] . bias[e]`` of each pair, ``[T, K]``; zero for masked pairs."""
    # Every token with every expert: rows of grad and of bias for each pair would take far more memory.
    products = grad @ bias.to(grad.dtype).T
    experts = top_k_index.clamp(0, len(bias) - 1).long()
    return torch.where(slot_of_pair < 0, 0, products.gather(1, experts))


class RowsBackend:
    """A backend that computes both directions on rows in expert order; what it serves is its own to say."""

    rows: type[ExpertRows]
    uses_gate_up = True

    def faster(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """See :class:`cupymoe.backends.Backend`."""
        return None

    def forward(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        tensors = in_local_experts(tensors)
        rows = self.rows(tensors.top_k_index, call.num_experts)
        return forward(rows, call, on_demand(call, tensors), out)[0]

    def forward_batch(
        self, call: ExpertsCall, batch: BatchTensors, output: torch.Tensor, *, keeps_others: bool
    ) -> None:
        """See :class:`cupymoe.backends.Backend`; the rows go as tokens that chose one expert each."""
        if keeps_others:
            computed = self.forward(call, batch.as_routed()).view(output.shape)
            output.copy_(torch.where(batch.counted.unsqueeze(2), computed, output))
        else:
            self.forward(call, batch.as_routed(), output.flatten(0, 1))

    def forward_keeping(self, call: ExpertsCall, tensors: ExpertsTensors) -> tuple[torch.Tensor, Kept]:
        """See :class:`cupymoe.backends.Backend`."""
        tensors = in_local_experts(tensors)
        output, kept = forward(self.rows(tensors.top_k_index, call.num_experts), call, on_demand(call, tensors))
        lows = (None if low is None else low.to(call.dtype) for low in kept[1:])
        return output, Kept(kept.gate_up.to(call.dtype), *lows)

    def backward(
        self,
        call: ExpertsCall,
        tensors: ExpertsTensors,
        kept: Kept | None,
        grad: torch.Tensor,
        needed: Sequence[bool],
    ) -> tuple[torch.Tensor | None, ...]:
        """See :class:`cupymoe.backends.Backend`."""
        tensors = in_local_experts(tensors)
        rows = self.rows(tensors.top_k_index, call.num_experts)
        return backward(rows, call, on_demand(call, tensors), kept if self.uses_gate_up else None, grad, needed)
