"""Launcher of ``cuda_src/experts_outer_wgmma.cu``. Oracle: ``left[its slots].T @ right[its slots]`` of each expert."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import SortedPairs
from cupymoe.kernels.tensor_map import tensor_map

THREADS = 384
BLOCK_M, BLOCK_N, BLOCK_K = 256, 192, 64
"""Lines and columns of a tile, and slots of a stage. Of 192 and 176 columns with 64 and 32 slots, and 128 columns with
64, these were the fastest for most of Gemma 4's gradients on an H200, also where 176 divides the columns."""

_LINE_BYTES = 128
_GROUP_COLUMNS = 64
_STAGE_BYTES = (BLOCK_M + BLOCK_N) // _GROUP_COLUMNS * BLOCK_K * _LINE_BYTES + 16  # with its two barriers
STAGES = HOPPER.shared_bytes_of_block // _STAGE_BYTES


def variant(dtype: torch.dtype, left_gathered: bool) -> Variant:
    """The compilation for one dtype and one side that is gathered; it serves every size."""
    return Variant(
        "experts_outer_wgmma",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"LEFT_GATHERED={int(left_gathered)}",
            f"BLOCK_THREADS={THREADS}",
            f"BLOCK_N={BLOCK_N}",
            f"BLOCK_K={BLOCK_K}",
            f"STAGES={STAGES}",
        ),
    )


@functools.cache
def _prepared(dtype: torch.dtype, left_gathered: bool, device: int) -> tuple[Kernel, tuple[int, int]]:
    """The kernel and its grid: one block on each multiprocessor."""
    run = kernel(
        variant(dtype, left_gathered),
        "experts_outer_wgmma",
        device,
        shared_bytes=STAGES * _STAGE_BYTES,
        dependent=True,
        tensor_maps=1,
    )
    return run, (torch.cuda.get_device_properties(device).multi_processor_count, 1)


def _dense_map(dense: torch.Tensor) -> tuple[int, ...]:
    """Boxes of 64 columns and as many slots as a stage has."""
    slots, columns = dense.shape
    row = columns * dense.element_size()
    return tensor_map(dense.data_ptr(), dense.dtype, (columns, slots), (row,), (_GROUP_COLUMNS, BLOCK_K))


def experts_outer_wgmma(
    left: torch.Tensor, right: torch.Tensor, pairs: SortedPairs, num_experts: int, *, left_gathered: bool
) -> torch.Tensor:
    """``left[its rows].T @ right[its rows]`` summed over the slots of each expert, ``[E, M, N]``; zeros without slots.

    One of the two has a row for each token, which is gathered, the other a row for each slot. Sums are float32, slots
    in ascending order, and rounded once.

    Args:
        left: ``[T, M]`` where ``left_gathered``, else ``[T * K, M]`` in expert order; bfloat16 or float16, contiguous,
            16-byte aligned, M % 8 == 0.
        right: the other way round, ``[T * K, N]`` or ``[T, N]``, N % 8 == 0; in the dtype of ``left``.
        pairs: the sorted pairs; rows past the last slot are not read.
        num_experts: E.
        left_gathered: whether the left operand's rows are tokens, else the right one's.
    """
    device = left.device.index
    num_lines, num_columns = left.shape[1], right.shape[1]
    output = left.new_empty((num_experts, num_lines, num_columns))
    run, blocks = _prepared(left.dtype, left_gathered, device)
    run(
        blocks,
        THREADS,
        current_stream(device),
        *_dense_map(right if left_gathered else left),
        left.data_ptr(),
        right.data_ptr(),
        pairs.expert_offsets.data_ptr(),
        pairs.token_of_slot.data_ptr(),
        output.data_ptr(),
        num_lines,
        num_columns,
        num_experts,
    )
    return output
