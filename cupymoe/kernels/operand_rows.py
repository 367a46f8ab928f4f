"""Launcher of ``cuda_src/operand_rows.cu``. Oracle: ``hidden_states[token_of_slot]``, turned by ``transpose``; of
narrowed rows also ``torch.frexp`` of a row's largest magnitude."""

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
    """Token rows in expert order; those without a pair (masked ones' share) are undefined."""

    rows: torch.Tensor
    """``[T * K, turned_columns(H)]``, turned, in the tokens' dtype; or narrowed, float16, the largest magnitude of a
    row in [2^14, 2^15)."""
    factors: torch.Tensor | None
    """``[T * K]`` float32, powers of two, of which narrowed rows were made; None of the others."""


def variant(dtype: torch.dtype, columns: int, top_k: int, narrowed: bool) -> Variant:
    """The compilation for one dtype, row width and number of choices; 0: rows go by their slots."""
    sizes = f"COLS={columns}", f"BY_SLOT={int(top_k == 0)}", f"TOP_K={top_k}"
    return Variant(
        "operand_rows", (f"SCALAR={SCALARS[dtype]}", *sizes, f"NARROWED={int(narrowed)}", f"BLOCK_THREADS={THREADS}")
    )


@functools.cache
def _kernel(dtype: torch.dtype, columns: int, top_k: int, narrowed: bool, device: int) -> Kernel:
    return kernel(variant(dtype, columns, top_k, narrowed), "operand_rows", device, dependent=True)


def operand_rows(hidden_states: torch.Tensor, slots: Slots, *, narrowed: bool) -> OperandRows:
    """Turned rows of the tokens in expert order. Narrowed, ``rows * factors`` are the tokens' rows, exactly but for
    what is below 2^-31 of a row's largest magnitude.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned, H a multiple of 8, at least one token; bfloat16 where
            ``narrowed``, else of 16 bits.
        slots: of sorted pairs, or of a batch.
        narrowed: whether rows are float16.
    """
    num_slots = slots.token_of_slot.numel()
    dtype = torch.float16 if narrowed else hidden_states.dtype
    rows = hidden_states.new_empty((num_slots, turned_columns(hidden_states.shape[1])), dtype=dtype)
    factors = hidden_states.new_empty(num_slots, dtype=torch.float32) if narrowed else None
    slot_of_pair = slots.slot_of_pair if isinstance(slots, SortedPairs) else None
    _launch(hidden_states, slot_of_pair, slots.token_of_slot, slots, rows, factors)
    return OperandRows(rows, factors)


def turned_rows(rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """``[slots, turned_columns(I)]``: rows that lie in expert order already, turned.

    Args:
        rows: ``[slots, I]`` of 16 bits, contiguous, 16-byte aligned, I a multiple of 8, at least one.
        slots: of sorted pairs, or of a batch.
    """
    turned = rows.new_empty((len(rows), turned_columns(rows.shape[1])))
    _launch(rows, None, None, slots, turned, None)
    return turned


def _launch(
    source: torch.Tensor,
    slot_of_pair: torch.Tensor | None,
    token_of_slot: torch.Tensor | None,
    slots: Slots,
    rows: torch.Tensor,
    factors: torch.Tensor | None,
) -> None:
    device = source.get_device()
    blocks, top_k = (len(rows), 0) if slot_of_pair is None else slot_of_pair.shape
    _kernel(source.dtype, source.shape[1], top_k, factors is not None, device)(
        (blocks, 1),
        THREADS,
        current_stream(device),
        source.data_ptr(),
        0 if slot_of_pair is None else slot_of_pair.data_ptr(),
        0 if token_of_slot is None else token_of_slot.data_ptr(),
        slots.expert_offsets.data_ptr() + 4 * (slots.expert_offsets.numel() - 1),
        rows.data_ptr(),
        0 if factors is None else factors.data_ptr(),
    )
