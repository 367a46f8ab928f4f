"""Launcher of ``cuda_src/grouped_linear.cu``. Oracle: each row's ``row @ weight[its expert].T``."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

TILE = 64
"""Slots of a block, and columns."""
BLOCK_THREADS = 256
TILING = (f"TILE={TILE}", f"BLOCK_THREADS={BLOCK_THREADS}")
"""Defines of ``cuda_src/common/simt_product.cuh``."""


def variant(row_dtype: torch.dtype, weight_dtype: torch.dtype, output_dtype: torch.dtype) -> Variant:
    """The compilation for three dtypes; it serves every size."""
    return Variant(
        "grouped_linear",
        (
            f"ROW_SCALAR={SCALARS[row_dtype]}",
            f"WEIGHT_SCALAR={SCALARS[weight_dtype]}",
            f"OUT_SCALAR={SCALARS[output_dtype]}",
            *TILING,
        ),
    )


@functools.cache
def _kernel(row_dtype: torch.dtype, weight_dtype: torch.dtype, output_dtype: torch.dtype, device: int) -> Kernel:
    return kernel(variant(row_dtype, weight_dtype, output_dtype), "grouped_linear", device)


def grouped_linear(
    rows: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``rows[s] @ weight[e].T`` for each slot s of expert e, ``[S, N]``; rows without a pair are undefined.

    Sums are float32 and rounded once. The host does not wait, and nothing but the output is allocated.

    Args:
        rows: ``[S, K]`` in expert order, contiguous.
        weight: ``[E, N, K]``, any strides, at least one expert; its dtype may be another than that of ``rows``.
        expert_offsets: ``[E + 1]`` int32 of :class:`SortedPairs`.
        dtype: of the output; None: that of ``rows``.
    """
    num_slots, depth = rows.shape
    num_experts, num_columns, _ = weight.shape
    output = rows.new_empty((num_slots, num_columns), dtype=dtype)
    if output.numel() == 0:
        return output
    device = rows.get_device()
    _kernel(rows.dtype, weight.dtype, output.dtype, device)(
        (num_slots // TILE + num_experts, -(-num_columns // TILE)),
        BLOCK_THREADS,
        current_stream(device),
        rows.data_ptr(),
        weight.data_ptr(),
        expert_offsets.data_ptr(),
        output.data_ptr(),
        num_experts,
        num_columns,
        depth,
        *weight.stride(),
    )
    return output
