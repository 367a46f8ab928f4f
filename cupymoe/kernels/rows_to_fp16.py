"""Launcher of ``cuda_src/rows_to_fp16.cu``. Oracle: ``torch.frexp`` of a row's largest magnitude."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

THREADS = 256
_ROWS = THREADS // 32


class NarrowedRows(NamedTuple):
    """Rows of bf16 as fp16 ones times a factor each."""

    rows: torch.Tensor
    """``[T, H]`` float16; the largest magnitude of a row is in [2^14, 2^15)."""
    factors: torch.Tensor
    """``[T]`` float32, powers of two."""


def variant(columns: int, *, has_counts: bool = False) -> Variant:
    """The compilation for one row width, of all rows or of those of a batch that count."""
    counts = ("HAS_COUNTS=1",) if has_counts else ()
    return Variant("rows_to_fp16", (f"COLS={columns}", f"BLOCK_THREADS={THREADS}", *counts))


@functools.cache
def _kernel(columns: int, has_counts: bool, device: int) -> Kernel:
    return kernel(variant(columns, has_counts=has_counts), "rows_to_fp16", device, dependent=True)


def rows_to_fp16(rows: torch.Tensor, expert_num_tokens: torch.Tensor | None = None) -> NarrowedRows:
    """The rows, ``rows * factors``, exactly but for what is below 2^-31 of a row's largest magnitude.

    Args:
        rows: ``[T, H]`` bfloat16, contiguous, 16-byte aligned, H a multiple of 8, at least one row.
        expert_num_tokens: ``[E]`` int32, contiguous: how many of the T / E rows of each expert count; the others are
            not read, and undefined. None: all count.
    """
    num_rows, columns = rows.shape
    narrowed = NarrowedRows(
        rows.new_empty(rows.shape, dtype=torch.float16), rows.new_empty(num_rows, dtype=torch.float32)
    )
    device = rows.device.index
    counts, max_tokens = 0, num_rows
    if expert_num_tokens is not None:
        counts, max_tokens = expert_num_tokens.data_ptr(), num_rows // len(expert_num_tokens)
    _kernel(columns, counts != 0, device)(
        (-(-num_rows // _ROWS), 1),
        THREADS,
        current_stream(device),
        rows.data_ptr(),
        narrowed.rows.data_ptr(),
        narrowed.factors.data_ptr(),
        num_rows,
        counts,
        max_tokens,
    )
    return narrowed
