"""Launcher of ``cuda_src/lora_back.cu``. Oracle: of each expert ``rows[its slots] @ factor[e].T`` and
``low[its slots].T @ rows[its slots]``, which are what ``lora_shrink`` and ``lora_outer`` make."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel, word_of

MAX_RANK = 32
"""With 64 a warp would have registers for 32 columns, and a slot's sums of low be four times their bytes."""

_STEP = 16
_INBOXES = 4
_MAX_SQUARES = 11
"""Of a warp, 16 columns by 16 ranks: they divide Gemma 4's rows, and take 132 registers of a thread."""
# One block of a multiprocessor, as its registers hold no more warps. Two of four warps, in clusters of twice as many
# blocks, took 37% longer at 2816 columns, and a fourth stage 1%.
_WARPS, _MAX_STAGES = 8, 3
_CLUSTERS = (1, 2, 4, 8)


class Tiling(NamedTuple):
    """How the columns of an expert are shared out."""

    cluster: int
    """Blocks of an expert."""
    squares: int
    """Of a warp, 16 columns each."""
    stages: int
    """Of 16 slots, in the ring of a block."""


def tiling_of(columns: int, rank: int, cluster: int) -> Tiling | None:
    """The tiling with so many blocks in a cluster, None where they don't take these columns."""
    squares = -(-columns // (16 * _WARPS * cluster))
    if squares * rank > 16 * _MAX_SQUARES or 16 * squares * _WARPS * (cluster - 1) >= columns:
        return None
    one_stage = Tiling(cluster, squares, 1)
    more = (HOPPER.shared_bytes_of_block - shared_bytes(one_stage, rank)) // _stage_bytes(one_stage, rank)
    return one_stage._replace(stages=min(1 + more, _MAX_STAGES))


@functools.cache
def tiling(columns: int, rank: int) -> Tiling | None:
    """How the kernel cuts rows of so many columns, for a padded rank; None: it does not take them."""
    if rank > MAX_RANK:
        return None
    tilings = (tiling_of(columns, rank, cluster) for cluster in _CLUSTERS)
    return next((found for found in tilings if found is not None), None)


def variant(
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    rank: int,
    tiling: Tiling,
    *,
    gathered: bool,
    weighted: bool,
    transposed: bool,
) -> Variant:
    """The compilation for one padded rank and one tiling; it serves every number of experts."""
    return Variant(
        "lora_back",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"OUT_SCALAR={SCALARS[output_dtype]}",
            f"RANK={rank}",
            f"GATHERED={int(gathered)}",
            f"WEIGHTED={int(weighted)}",
            f"TRANSPOSED={int(transposed)}",
            f"WARPS={_WARPS}",
            f"SQUARES={tiling.squares}",
            f"CLUSTER={tiling.cluster}",
            f"STAGES={tiling.stages}",
        ),
    )


def _stage_bytes(tiling: Tiling, rank: int) -> int:
    """Each row has 16 bytes of padding; with the stage's barrier."""
    return _STEP * (2 * 16 * _WARPS * tiling.squares + 16 + 2 * rank) + 8


def shared_bytes(tiling: Tiling, rank: int) -> int:
    """Of a block."""
    of_step = 4 * _STEP * rank
    inboxes = _INBOXES * (of_step + 16) if tiling.cluster > 1 else 0
    return tiling.stages * _stage_bytes(tiling, rank) + 2 * _WARPS * of_step + inboxes


@functools.cache
def _kernel(
    dtype: torch.dtype,
    output_dtype: torch.dtype,
    rank: int,
    tiling: Tiling,
    gathered: bool,
    weighted: bool,
    transposed: bool,
    device: int,
) -> Kernel:
    return kernel(
        variant(dtype, output_dtype, rank, tiling, gathered=gathered, weighted=weighted, transposed=transposed),
        "lora_back",
        device,
        shared_bytes=shared_bytes(tiling, rank),
        dependent=True,
    )


def lora_back(
    rows: torch.Tensor,
    factor: torch.Tensor,
    low: torch.Tensor,
    expert_offsets: torch.Tensor,
    grad_factor: torch.Tensor,
    tiling: Tiling,
    token_of_slot: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """``[S, R]``, each slot's row times its expert's factor, as ``lora_shrink`` gives it, and ``grad_factor[e]``, the
    sum of ``scale * low[s].T @ rows[s]`` over the slots s of each expert, as ``lora_outer`` does; rows are read once.

    Sums are float32, in an order of their own for the first, and rounded once.

    Args:
        rows: ``[T, C]`` if ``token_of_slot`` is given, else ``[S, C]`` in expert order; bfloat16 or float16,
            contiguous, 16-byte aligned; C a multiple of 8.
        factor: ``[E, R, C]``, 16-byte aligned, the dtype of ``rows``; contiguous, or the ``transpose(1, 2)`` of a
            contiguous tensor. R is a multiple of 16 up to ``MAX_RANK``.
        low: ``[S, R]`` in expert order, contiguous, 16-byte aligned, the dtype of ``rows``.
        expert_offsets: ``[E + 1]`` int32 of :class:`SortedPairs`.
        grad_factor: ``[E, r, C]``, of any strides, r up to R: what is beyond it of ``low`` is padding. Float32, or the
            dtype of ``rows``.
        tiling: :func:`tiling` of C and R.
        token_of_slot: ``[S]`` int32 of :class:`SortedPairs`.
        weight_of_slot: ``[S]`` float32, with which ``low`` is multiplied; the product is rounded to the dtype of
            ``low`` first.
        scale: multiplies the sums before they are rounded.
    """
    num_experts, ranks, columns = grad_factor.shape
    gathered, weighted, transposed = token_of_slot is not None, weight_of_slot is not None, not factor.is_contiguous()
    grad_low, device = torch.empty_like(low), rows.get_device()
    _kernel(rows.dtype, grad_factor.dtype, low.shape[1], tiling, gathered, weighted, transposed, device)(
        (tiling.cluster, num_experts),
        32 * _WARPS,
        current_stream(device),
        rows.data_ptr(),
        factor.data_ptr(),
        low.data_ptr(),
        expert_offsets.data_ptr(),
        0 if token_of_slot is None else token_of_slot.data_ptr(),
        0 if weight_of_slot is None else weight_of_slot.data_ptr(),
        grad_low.data_ptr(),
        grad_factor.data_ptr(),
        word_of(scale),
        ranks,
        columns,
        *grad_factor.stride(),
    )
    return grad_low
