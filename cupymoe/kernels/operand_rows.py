"""Launcher of ``cuda_src/operand_rows.cu``. Oracle: the rows, turned by ``transpose``; of narrowed rows also
``torch.frexp`` of a row's largest magnitude."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import Slots, SortedPairs
from cupymoe.kernels.stored_weight import turned_columns

THREADS = 128


class OperandRows(NamedTuple):
    """The tokens' rows; of a batch those alone that count, the others are undefined."""

    rows: torch.Tensor
    """``[T, turned_columns(H)]``, turned, in the tokens' dtype; or narrowed, float16, the largest magnitude of a row in
    [2^14, 2^15)."""
    factors: torch.Tensor | None
    """``[T]`` float32, powers of two, of which narrowed rows were made; None of the others."""


def variant(dtype: torch.dtype, columns: int, narrowed: bool) -> Variant:
    """The compilation for one dtype and row width."""
    sizes = f"SCALAR={SCALARS[dtype]}", f"COLS={columns}"
    return Variant("operand_rows", (*sizes, f"NARROWED={int(narrowed)}", f"BLOCK_THREADS={THREADS}"))


@functools.cache
def _kernel(dtype: torch.dtype, columns: int, narrowed: bool, device: int) -> Kernel:
    return kernel(variant(dtype, columns, narrowed), "operand_rows", device, dependent=True)


def operand_rows(hidden_states: torch.Tensor, slots: Slots, *, narrowed: bool) -> OperandRows:
    """Turned rows of the tokens. Narrowed, ``rows * factors`` are the tokens' rows, exactly but for what is below 2^-31
    of a row's largest magnitude.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned, H a multiple of 8, at least one token; bfloat16 where
            ``narrowed``, else of 16 bits.
        slots: of a batch, which says which rows count; of sorted pairs nothing is read, and each token has its row.
        narrowed: whether rows are float16.
    """
    num_tokens = len(hidden_states)
    dtype = torch.float16 if narrowed else hidden_states.dtype
    rows = hidden_states.new_empty((num_tokens, turned_columns(hidden_states.shape[1])), dtype=dtype)
    factors = hidden_states.new_empty(num_tokens, dtype=torch.float32) if narrowed else None
    if isinstance(slots, SortedPairs):
        _launch(hidden_states, None, None, rows, factors)
    else:
        _launch(hidden_states, slots.token_of_slot, _num_slots(slots), rows, factors)
    return OperandRows(rows, factors)


def turned_rows(rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """``[slots, turned_columns(I)]``: rows that lie in expert order, turned.

    Args:
        rows: ``[slots, I]`` of 16 bits, contiguous, 16-byte aligned, I a multiple of 8, at least one.
        slots: of sorted pairs, or of a batch.
    """
    turned = rows.new_empty((len(rows), turned_columns(rows.shape[1])))
    _launch(rows, None, _num_slots(slots), turned, None)
    return turned


def _num_slots(slots: Slots) -> torch.Tensor:
    return slots.expert_offsets[-1:]


def _launch(
    source: torch.Tensor,
    row_of_slot: torch.Tensor | None,
    num_slots: torch.Tensor | None,
    rows: torch.Tensor,
    factors: torch.Tensor | None,
) -> None:
    device = source.get_device()
    _kernel(source.dtype, source.shape[1], factors is not None, device)(
        (len(rows), 1),
        THREADS,
        current_stream(device),
        source.data_ptr(),
        0 if row_of_slot is None else row_of_slot.data_ptr(),
        0 if num_slots is None else num_slots.data_ptr(),
        rows.data_ptr(),
        0 if factors is None else factors.data_ptr(),
    )
