"""Our kernels around torch's grouped GEMM: sort, gather, gate_up, activation, down, combine; and the way back."""

from __future__ import annotations

import torch

from cupymoe.backends import Direction, ExpertsCall, ampere_reason, row_packs_reason
from cupymoe.backends.expert_rows import RowsBackend, dequantised
from cupymoe.backends.row_products import GroupedRows
from cupymoe.kernels import sort_by_expert


class GroupedBackend(RowsBackend):
    """Six launches (seven above 1024 pairs) without adapters, no host sync, any number of tokens.

    The grouped GEMM rounds gate_up to bfloat16, so the intermediate is rounded twice.
    """

    name = "grouped"
    rows = GroupedRows
    is_slow = False

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """What torch's grouped GEMM and the sort can't do, in either direction."""
        if (reason := ampere_reason(call)) is not None:
            return reason
        if call.is_invariant(direction):
            return "torch's grouped GEMM may sum in another order for another number of tokens"
        if call.dtype != torch.bfloat16:
            return f"torch's grouped GEMM runs without a host sync in bfloat16 only, not in {call.dtype}"
        if (reason := row_packs_reason(call)) is not None:
            return reason
        if not call.aligned_weights:
            return "both weights must start on 16 bytes"
        return sort_by_expert.unsupported_reason(call.num_tokens * call.top_k, call.num_experts)

    def way(self, call: ExpertsCall, direction: Direction = "forward") -> str:
        """See :class:`cupymoe.backends.Backend`."""
        return "torch's grouped GEMM" + dequantised(call)
