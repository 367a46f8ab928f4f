"""Launcher of ``cuda_src/operand_rows.cu``. Oracle: ``hidden_states[token_of_slot]``; of narrowed rows also
``torch.frexp`` of a row's largest magnitude."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

THREADS = 128


class OperandRows(NamedTuple):
    """Token rows in expert order; those without a pair (masked ones' share) are undefined."""

    rows: torch.Tensor
    """``[T * K, H]`` in the tokens' dtype; or narrowed, float16, the largest magnitude of a row in [2^14, 2^15)."""
    factors: torch.Tensor | None
    """``[T * K]`` float32, powers of two, of which narrowed rows were made; None of the others."""


def variant(dtype: torch.dtype, columns: int, top_k: int, narrowed: bool) -> Variant:
    """The compilation for one dtype, row width and number of choices."""
    sizes = f"COLS={columns}", f"TOP_K={top_k}", f"NARROWED={int(narrowed)}", f"BLOCK_THREADS={THREADS}"
    return Variant("operand_rows", (f"SCALAR={SCALARS[dtype]}", *sizes))


@functools.cache
def _kernel(dtype: torch.dtype, columns: int, top_k: int, narrowed: bool, device: int) -> Kernel:
    return kernel(variant(dtype, columns, top_k, narrowed), "operand_rows", device, dependent=True)


def operand_rows(hidden_states: torch.Tensor, slot_of_pair: torch.Tensor, *, narrowed: bool) -> OperandRows:
    """Rows of the tokens in expert order. Narrowed, ``rows * factors`` are the tokens' rows, exactly but for what is
    below 2^-31 of a row's largest magnitude.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned, H a multiple of 8, at least one token; bfloat16 where
            ``narrowed``, else of 16 bits.
        slot_of_pair: ``[T, K]`` int32 of :class:`cupymoe.kernels.sort_by_expert.SortedPairs`.
        narrowed: whether rows are float16.
    """
    (num_tokens, columns), top_k = hidden_states.shape, slot_of_pair.shape[1]
    slots, device = num_tokens * top_k, hidden_states.device.index
    rows = hidden_states.new_empty((slots, columns), dtype=torch.float16 if narrowed else hidden_states.dtype)
    factors = hidden_states.new_empty(slots, dtype=torch.float32) if narrowed else None
    _kernel(hidden_states.dtype, columns, top_k, narrowed, device)(
        (num_tokens, 1),
        THREADS,
        current_stream(device),
        hidden_states.data_ptr(),
        slot_of_pair.data_ptr(),
        rows.data_ptr(),
        0 if factors is None else factors.data_ptr(),
    )
    return OperandRows(rows, factors)
