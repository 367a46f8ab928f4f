"""Our own expert GEMMs for up to a thousand tokens, at the speed of reading the hit experts' weights once."""

from __future__ import annotations

import torch

from cupymoe.activation import MoEActivation
from cupymoe.backends import ExpertsCall, row_packs_reason
from cupymoe.kernels.combine import combine_workspace
from cupymoe.kernels.expert_stream import MAX_EXPERTS, MAX_PAIRS, new_workspace, regime, shape_of
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.plan_experts import plan_experts


class FusedBackend:
    """Three launches up to 128 pairs, four beyond, each begun while the one before still runs.

    The intermediate is rounded once, after ``act(gate) * up``.
    """

    name = "fused"

    def unsupported_reason(self, call: ExpertsCall) -> str | None:
        """What the weight stream was not built or not run for."""
        if call.device.type != "cuda":
            return f"it runs on CUDA devices of compute capability 9.0, not on {call.device.type}"
        if torch.cuda.get_device_capability(call.device) != (9, 0):
            return "it has been run on compute capability 9.0 only"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"its tensor-core products take bfloat16 and float16, not {call.dtype}"
        if not call.activation.is_gated or call.activation.is_interleaved:
            return f"it pairs rows i and I + i of gate_up_proj, which {call.activation.name} does not want"
        if (reason := row_packs_reason(call)) is not None:
            return reason
        if not (call.aligned_hidden_states and call.aligned_weights):
            return "hidden_states and both weights must start on 16 bytes"
        if call.num_experts > MAX_EXPERTS:
            return f"its plan has counters for {MAX_EXPERTS} experts, not {call.num_experts}"
        if call.num_tokens * call.top_k > MAX_PAIRS:
            return f"its plan holds {MAX_PAIRS} (token, k) pairs, not {call.num_tokens * call.top_k}"
        return None

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
        num_tokens, top_k = top_k_index.shape
        num_experts, hidden_size, intermediate_size = down_proj.shape
        shape = shape_of(
            regime(num_tokens, top_k, intermediate_size),
            hidden_states.dtype,
            top_k_index.dtype,
            activation,
            num_experts,
            hidden_size,
            intermediate_size,
            top_k,
        )
        workspace = new_workspace(hidden_states, shape, top_k_index.numel())
        output = torch.empty_like(hidden_states)
        if not shape.regime.inline_pairs:
            plan_experts(top_k_index, num_experts, shape.regime.tokens, workspace)
        experts_up(hidden_states, gate_up_proj, top_k_index, shape, workspace)
        experts_down(down_proj, top_k_index, shape, workspace)
        return combine_workspace(shape, workspace, top_k_weights, output)
