"""Launcher of ``cuda_src/grouped_outer.cu``. Oracle: ``left[its slots].T @ right[its slots]`` of each expert."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.grouped_linear import BLOCK_THREADS, TILE, TILING
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel


def variant(left_dtype: torch.dtype, right_dtype: torch.dtype, output_dtype: torch.dtype) -> Variant:
    """The compilation for three dtypes; it serves every size."""
    return Variant(
        "grouped_outer",
        (
            f"LEFT_SCALAR={SCALARS[left_dtype]}",
            f"RIGHT_SCALAR={SCALARS[right_dtype]}",
            f"OUT_SCALAR={SCALARS[output_dtype]}",
            *TILING,
        ),
    )


@functools.cache
def _kernel(left_dtype: torch.dtype, right_dtype: torch.dtype, output_dtype: torch.dtype, device: int) -> Kernel:
    return kernel(variant(left_dtype, right_dtype, output_dtype), "grouped_outer", device)


def grouped_outer(
    left: torch.Tensor, right: torch.Tensor, expert_offsets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``left[s].T @ right[s]`` summed over the slots s of each expert, ``[E, M, N]``; zeros for an expert without any.

    Sums are float32, slots in ascending order, and rounded once. The host does not wait, and nothing but the output is
    allocated.

    Args:
        left: ``[S, M]`` in expert order, contiguous.
        right: ``[S, N]`` in expert order, contiguous; its dtype may be another than that of ``left``.
        expert_offsets: ``[E + 1]`` int32 of :class:`SortedPairs`; rows from the last offset on are not read.
        dtype: of the output; None: that of ``left``.
    """
    num_experts, num_lines, num_columns = expert_offsets.shape[0] - 1, left.shape[1], right.shape[1]
    output = left.new_empty((num_experts, num_lines, num_columns), dtype=dtype)
    if output.numel() == 0:
        return output
    device = left.get_device()
    _kernel(left.dtype, right.dtype, output.dtype, device)(
        (num_experts * -(-num_lines // TILE), -(-num_columns // TILE)),
        BLOCK_THREADS,
        current_stream(device),
        left.data_ptr(),
        right.data_ptr(),
        expert_offsets.data_ptr(),
        output.data_ptr(),
        num_lines,
        num_columns,
    )
    return output
