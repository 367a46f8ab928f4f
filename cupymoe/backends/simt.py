"""Our kernels on the CUDA cores, for calls whose weights or dtype the tensor-core backends can't take."""

from __future__ import annotations

from cupymoe.backends import Direction, ExpertsCall, ampere_reason
from cupymoe.backends.expert_rows import RowsBackend, dequantised
from cupymoe.backends.row_products import SimtRows
from cupymoe.kernels import sort_by_expert
from cupymoe.kernels.dtypes import SCALARS


class SimtBackend(RowsBackend):
    """Six launches (seven above 1024 pairs) and one to round, no host sync, any alignment and any sizes.

    Everything between the weights and the output is float32, which is rounded once: as the reference.
    """

    name = "simt"
    rows = SimtRows
    is_slow = True
    uses_gate_up = False  # what is kept is rounded

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """What the kernels' dtypes and the sort can't do, in either direction."""
        if (reason := ampere_reason(call)) is not None:
            return reason
        if call.dtype not in SCALARS:
            return f"its kernels take bfloat16, float16 and float32, not {call.dtype}"
        return sort_by_expert.unsupported_reason(call.num_tokens * call.top_k, call.num_experts)

    def way(self, call: ExpertsCall, direction: Direction = "forward") -> str:
        """See :class:`cupymoe.backends.Backend`."""
        return "products on the CUDA cores" + dequantised(call)
