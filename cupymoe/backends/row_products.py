"""Who moves and multiplies rows in expert order: our kernels with torch's grouped GEMM or our own, or plain torch.

Each is an :class:`~cupymoe.backends.expert_rows.ExpertRows`.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from itertools import pairwise

import torch
from torch.nn.functional import grouped_mm

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.backends.adapters import packed
from cupymoe.backends.expert_rows import ExpertRows
from cupymoe.lora import LowRank, Packed
from cupymoe.weights.dequantize import WeightOnDemand

_BIASED_AT_ONCE = 8192
"""Rows that a bias is added to in one step."""
_DEQUANTIZED_AT_ONCE = 1 << 25
"""Elements of a quantised weight, of whole experts and of one more."""


class KernelRows(ExpertRows):
    """What the rows have of our kernels, in whichever way their products are computed."""

    offsets: torch.Tensor
    """``[E + 1]`` int32: where each expert's rows begin, and where the last one's end."""
    dequantized_dtype: torch.dtype
    """What a quantised weight is rounded to before it is multiplied."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        from cupymoe.kernels.sort_by_expert import sort_by_expert

        pairs = sort_by_expert(top_k_index, num_experts)
        self.slot_of_pair, self.offsets = pairs.slot_of_pair, pairs.expert_offsets

    @functools.cached_property
    def _expert_of_slot(self) -> torch.Tensor:
        """``[T * K]`` int32; any expert for masked pairs."""
        ends = self.offsets[1:]
        slots = torch.arange(self.slot_of_pair.numel(), dtype=ends.dtype, device=ends.device)
        return torch.searchsorted(ends, slots, right=True, out_int32=True).clamp_(max=len(ends) - 1)

    @abstractmethod
    def _product(self, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """``rows @ weight[e].T`` for the rows of some neighbouring experts, ``[T * K, out]``; others are undefined.

        Args:
            rows: ``[T * K, in]``
            weight: ``[E', out, in]``, of these experts.
            offsets: ``[E' + 1]``, where their rows begin, and where the last one's end.
        """

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor | WeightOnDemand, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :class:`ExpertRows`. A quantised weight is dequantised a few experts at a time."""
        if isinstance(weight, torch.Tensor):
            output = self._product(rows, weight, self.offsets)
        else:
            output = self._product_on_demand(rows, weight)
        return self._add_bias(output, bias)

    def _product_on_demand(self, rows: torch.Tensor, weight: WeightOnDemand) -> torch.Tensor:
        num_experts, out_size, in_size = weight.shape
        # The more rows, the more experts at once: each slice multiplies the rows before it, too.
        at_once = max(_DEQUANTIZED_AT_ONCE, len(rows) * max(out_size, in_size))
        step = max(1, at_once // (out_size * in_size))
        slots = torch.arange(len(rows), dtype=self.offsets.dtype, device=rows.device).unsqueeze(-1)
        output = self._product(rows, weight.experts(slice(0, step), self.dequantized_dtype), self.offsets[: step + 1])
        for first in range(step, num_experts, step):
            # The grouped GEMM begins with the first row, wherever its first expert's begin, so one more expert takes
            # the rows before, of which it makes nothing that is used.
            some = slice(first - 1, first + step)
            dequantized = weight.experts(some, self.dequantized_dtype)
            product = self._product(rows, dequantized, self.offsets[first - 1 : first + step + 1])
            output = torch.where(slots < self.offsets[first], output, product)
        return output

    def _add_bias(self, output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """In place, some rows at a time, so that the rows' biases take little memory."""
        if bias is not None:
            for first in range(0, len(output), _BIASED_AT_ONCE):
                some = slice(first, first + _BIASED_AT_ONCE)
                output[some].add_(bias[self._expert_of_slot[some]])
        return output

    def packed(self, adapter: LowRank, weight: torch.Tensor) -> Packed:
        """See :class:`ExpertRows`."""
        (found,) = packed([adapter], [weight])
        assert found is not None
        return found

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        from cupymoe.kernels.gather import gather

        return gather(states, self.slot_of_pair)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        from cupymoe.kernels.combine import combine

        return combine(rows, self.slot_of_pair, weights, out)

    def activate(self, gate_up: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        from cupymoe.kernels.gated_activation import gated_activation

        output = gate_up.new_empty((gate_up.shape[0], activation.output_size(gate_up.shape[1])))
        return gated_activation(gate_up, output, activation, num_rows=self.offsets[-1:])


class GroupedRows(KernelRows):
    """Products by torch's grouped GEMM, which rounds each of them to the dtype of its rows; so does adding a bias."""

    dequantized_dtype = torch.bfloat16

    def _product(self, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:])

    def outer(self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        return grouped_mm(left.T, right.to(left.dtype), offs=self.offsets[1:]).to(dtype)


class SimtRows(KernelRows):
    """Products on the CUDA cores, whatever the alignment; all of them in float32."""

    dequantized_dtype = torch.float32

    def _product(self, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        from cupymoe.kernels.grouped_linear import grouped_linear

        return grouped_linear(rows, weight, offsets, torch.float32)

    def outer(self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        from cupymoe.kernels.grouped_outer import grouped_outer

        return grouped_outer(left, right, self.offsets, dtype)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        output = super().combine(rows, weights)
        return output if out is None else out.copy_(output)


class LoopRows(ExpertRows):
    """Plain torch, any device and dtype, one expert after the other; rows in float32 at least, as the reference's."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int) -> None:
        kept = (top_k_index >= 0) & (top_k_index < num_experts)
        experts, pair_of_slot = torch.sort(torch.where(kept, top_k_index, num_experts).flatten(), stable=True)
        self.slot_of_pair = torch.where(kept, pair_of_slot.argsort().view_as(top_k_index), -1)
        following = torch.arange(1, num_experts + 1, dtype=experts.dtype, device=experts.device)
        self.offsets = [0, *torch.searchsorted(experts, following).tolist()]
        self._token_of_slot = pair_of_slot // top_k_index.shape[1]
        self._rows = [slice(start, end) for start, end in pairwise(self.offsets)]

    def gather(self, states: torch.Tensor) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        return states.to(reference.work_dtype(states.dtype))[self._token_of_slot]

    def combine(self, rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        kept = (self.slot_of_pair >= 0).unsqueeze(-1)
        output = torch.where(kept, rows[self.slot_of_pair.clamp(min=0)] * weights.unsqueeze(-1), 0).sum(1)
        return output if out is None else out.copy_(output)

    def linear(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        output = rows.new_zeros((rows.shape[0], weight.shape[1]))
        for expert, its in enumerate(self._rows):
            output[its] = reference.linear(rows[its], weight, bias, expert)
        return output

    def outer(self, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        return torch.stack([left[its].T @ right[its] for its in self._rows]).to(dtype)

    def activate(self, gate_up: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
        """See :class:`ExpertRows`."""
        return reference.activate(gate_up, activation)
