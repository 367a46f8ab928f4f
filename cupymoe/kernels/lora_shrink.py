"""Launcher of ``cuda_src/lora_shrink.cu``. Oracle: ``rows[its slots] @ factor[e].T`` of each expert."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

RANK_MULTIPLE = 16
"""Of the ranks that the tensor-core products take; factors are padded with zeros."""
MAX_RANK = 128

# Of a block, by ``transposed``: there 128 would spill registers.
_SLOTS = {False: 128, True: 64}
_STAGES = 3
_STEP = 64


def variant(dtype: torch.dtype, rank: int, *, gathered: bool, transposed: bool) -> Variant:
    """The compilation for one padded rank; it serves every number of experts and every depth."""
    return Variant(
        "lora_shrink",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"RANK={rank}",
            f"GATHERED={int(gathered)}",
            f"TRANSPOSED={int(transposed)}",
            f"SLOTS={_SLOTS[transposed]}",
            f"STAGES={_STAGES}",
        ),
    )


def _shared_bytes(rank: int, transposed: bool) -> int:
    """Each row has 16 bytes of padding."""
    lines, elements = (_STEP, rank) if transposed else (rank, _STEP)
    return _STAGES * (_SLOTS[transposed] * (2 * _STEP + 16) + lines * (2 * elements + 16))


@functools.cache
def _kernel(dtype: torch.dtype, rank: int, gathered: bool, transposed: bool, device: int) -> Kernel:
    return kernel(
        variant(dtype, rank, gathered=gathered, transposed=transposed),
        "lora_shrink",
        device,
        shared_bytes=_shared_bytes(rank, transposed),
        dependent=True,
    )


def lora_shrink(
    rows: torch.Tensor,
    factor: torch.Tensor,
    expert_offsets: torch.Tensor,
    token_of_slot: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[S, R]``, each slot's row times its expert's factor; rows in expert order, undefined past the last slot.

    Sums are float32, rounded once to the dtype of ``rows``.

    Args:
        rows: ``[T, K]`` if ``token_of_slot`` is given, else ``[S, K]`` in expert order; bfloat16 or float16,
            contiguous, 16-byte aligned; K a multiple of 8.
        factor: ``[E, R, K]``, 16-byte aligned, the dtype of ``rows``; contiguous, or the ``transpose(1, 2)`` of a
            contiguous tensor. R is a multiple of ``RANK_MULTIPLE`` up to ``MAX_RANK``.
        expert_offsets: ``[E + 1]`` int32 of :class:`SortedPairs`.
        token_of_slot: ``[S]`` int32 of :class:`SortedPairs`.
        low: where the result goes, contiguous, the dtype of ``rows``; None: new memory.
    """
    num_experts, rank, depth = factor.shape
    transposed, gathered = not factor.is_contiguous(), token_of_slot is not None
    num_slots, device = len(rows if token_of_slot is None else token_of_slot), rows.get_device()
    slots = _SLOTS[transposed]
    low = rows.new_empty((num_slots, rank)) if low is None else low
    _kernel(rows.dtype, rank, gathered, transposed, device)(
        (num_slots // slots + num_experts, 1),
        2 * slots,
        current_stream(device),
        rows.data_ptr(),
        factor.data_ptr(),
        expert_offsets.data_ptr(),
        0 if token_of_slot is None else token_of_slot.data_ptr(),
        low.data_ptr(),
        num_experts,
        depth,
    )
    return low
