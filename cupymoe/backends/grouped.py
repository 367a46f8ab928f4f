"""Raw kernels around torch's grouped GEMM: sort, gather, gate_up, activation, down, combine."""

from __future__ import annotations

import torch
from torch.nn.functional import grouped_mm

from cupymoe.activation import MoEActivation
from cupymoe.backends import ExpertsCall, row_packs_reason
from cupymoe.kernels import sort_by_expert
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.combine import combine
from cupymoe.kernels.gated_activation import gated_activation
from cupymoe.kernels.gather import gather


class GroupedBackend:
    """Six launches (seven above 1024 pairs), no host sync, any number of tokens.

    The grouped GEMM rounds gate_up to bfloat16, so the intermediate is rounded twice.
    """

    name = "grouped"
    is_slow = False

    def unsupported_reason(self, call: ExpertsCall) -> str | None:
        """What torch's grouped GEMM and the sort can't do."""
        if call.device.type != "cuda":
            return f"it runs on CUDA devices of compute capability 8.0 or newer, not on {call.device.type}"
        if Arch.of(call.device).capability < (8, 0):
            return "it needs compute capability 8.0 or newer"
        if call.dtype != torch.bfloat16:
            return f"torch's grouped GEMM runs without a host sync in bfloat16 only, not in {call.dtype}"
        if (reason := row_packs_reason(call)) is not None:
            return reason
        if not call.aligned_weights:
            return "both weights must start on 16 bytes"
        return sort_by_expert.unsupported_reason(call.num_tokens * call.top_k, call.num_experts)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        activation: MoEActivation,
    ) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        num_experts, _, intermediate_size = down_proj.shape
        pairs = sort_by_expert.sort_by_expert(top_k_index, num_experts)
        group_ends = pairs.expert_offsets[1:]
        expert_hidden_states = gather(hidden_states, pairs.slot_of_pair)
        gate_up = grouped_mm(expert_hidden_states, gate_up_proj.transpose(1, 2), offs=group_ends)
        intermediate = gated_activation(
            gate_up,
            gate_up.new_empty((gate_up.shape[0], intermediate_size)),
            activation,
            num_rows=group_ends[num_experts - 1 :],
        )
        expert_output = grouped_mm(intermediate, down_proj.transpose(1, 2), offs=group_ends)
        return combine(expert_output, pairs.slot_of_pair, top_k_weights)
