"""Our kernels on the CUDA cores, for calls whose weights or dtype the tensor-core backends can't take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cupymoe.backends import Direction, ExpertsCall, ExpertsTensors, expert_rows
from cupymoe.backends.expert_rows import SimtRows
from cupymoe.kernels import sort_by_expert
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.dtypes import SCALARS


class SimtBackend:
    """Six launches (seven above 1024 pairs) and one to round, no host sync, any alignment and any sizes.

    Everything between the weights and the output is float32, which is rounded once: as the reference.
    """

    name = "simt"
    is_slow = True

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """What the kernels' dtypes and the sort can't do, in either direction."""
        if call.device.type != "cuda":
            return f"it runs on CUDA devices of compute capability 8.0 or newer, not on {call.device.type}"
        if Arch.of(call.device).capability < (8, 0):
            return "it needs compute capability 8.0 or newer"
        if call.dtype not in SCALARS:
            return f"its kernels take bfloat16, float16 and float32, not {call.dtype}"
        return sort_by_expert.unsupported_reason(call.num_tokens * call.top_k, call.num_experts)

    def way(self, call: ExpertsCall) -> str:
        """See :class:`cupymoe.backends.Backend`."""
        return "products on the CUDA cores"

    def forward(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        rows = SimtRows(tensors.top_k_index, call.num_experts)
        return expert_rows.forward(rows, tensors, call.activation, out)

    def backward(
        self, call: ExpertsCall, tensors: ExpertsTensors, grad: torch.Tensor, needed: Sequence[bool]
    ) -> tuple[torch.Tensor | None, ...]:
        """See :class:`cupymoe.backends.Backend`."""
        rows = SimtRows(tensors.top_k_index, call.num_experts)
        return expert_rows.backward(rows, tensors, call.activation, grad, needed)
