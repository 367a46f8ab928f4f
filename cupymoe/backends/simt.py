"""Raw kernels on the CUDA cores, for calls whose weights or dtype the tensor-core backends can't take."""

from __future__ import annotations

import torch

from cupymoe.activation import MoEActivation
from cupymoe.backends import ExpertsCall
from cupymoe.kernels import sort_by_expert
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.combine import combine
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.gated_activation import gated_activation
from cupymoe.kernels.gather import gather
from cupymoe.kernels.grouped_linear import grouped_linear


class SimtBackend:
    """Six launches (seven above 1024 pairs) and one to round, no host sync, any alignment and any sizes.

    Everything between the weights and the output is float32, which is rounded once: as the reference.
    """

    name = "simt"
    is_slow = True

    def unsupported_reason(self, call: ExpertsCall) -> str | None:
        """What the kernels' dtypes and the sort can't do."""
        if call.device.type != "cuda":
            return f"it runs on CUDA devices of compute capability 8.0 or newer, not on {call.device.type}"
        if Arch.of(call.device).capability < (8, 0):
            return "it needs compute capability 8.0 or newer"
        if call.dtype not in SCALARS:
            return f"its kernels take bfloat16, float16 and float32, not {call.dtype}"
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
        rows = gather(hidden_states, pairs.slot_of_pair)
        gate_up = grouped_linear(rows, gate_up_proj, pairs.expert_offsets, torch.float32)
        intermediate = gated_activation(
            gate_up,
            gate_up.new_empty((gate_up.shape[0], intermediate_size)),
            activation,
            num_rows=pairs.expert_offsets[num_experts:],
        )
        expert_output = grouped_linear(intermediate, down_proj, pairs.expert_offsets)
        return combine(expert_output, pairs.slot_of_pair, top_k_weights).to(hidden_states.dtype)
