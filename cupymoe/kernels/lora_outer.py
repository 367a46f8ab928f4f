"""Launcher of ``cuda_src/lora_outer.cu``. Oracle: ``low[its slots].T @ rows[its slots]`` of each expert."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel, word_of

_COLUMNS = 256
_THREADS = _COLUMNS  # a warp for each 32 columns
_STAGES = 4
_STEP = 32


def variant(dtype: torch.dtype, output_dtype: torch.dtype, rank: int, *, gathered: bool, weighted: bool) -> Variant:
    """The compilation for one padded rank; it serves every number of experts and of columns."""
    return Variant(
        "lora_outer",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"OUT_SCALAR={SCALARS[output_dtype]}",
            f"RANK={rank}",
            f"GATHERED={int(gathered)}",
            f"WEIGHTED={int(weighted)}",
            f"COLUMNS={_COLUMNS}",
            f"STAGES={_STAGES}",
        ),
    )


def _shared_bytes(rank: int, weighted: bool) -> int:
    """Each row has 16 bytes of padding."""
    return _STAGES * _STEP * (2 * _COLUMNS + 16 + 2 * rank + 16 + 4 * int(weighted))


@functools.cache
def _kernel(
    dtype: torch.dtype, output_dtype: torch.dtype, rank: int, gathered: bool, weighted: bool, device: int
) -> Kernel:
    return kernel(
        variant(dtype, output_dtype, rank, gathered=gathered, weighted=weighted),
        "lora_outer",
        device,
        shared_bytes=_shared_bytes(rank, weighted),
        dependent=True,
    )


def lora_outer(
    low: torch.Tensor,
    rows: torch.Tensor,
    expert_offsets: torch.Tensor,
    output: torch.Tensor,
    token_of_slot: torch.Tensor | None = None,
    weight_of_slot: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """``output[e] = scale * low[s].T @ rows[s]`` summed over the slots s of each expert; zeros for one without any.

    Sums are float32, slots in ascending order, and rounded once.

    Args:
        low: ``[S, R]`` in expert order, contiguous, 16-byte aligned; R a multiple of 16 up to 128.
        rows: ``[T, C]`` if ``token_of_slot`` is given, else ``[S, C]`` in expert order; the dtype of ``low``,
            contiguous, 16-byte aligned; C a multiple of 8.
        expert_offsets: ``[E + 1]`` int32 of :class:`SortedPairs`.
        output: ``[E, r, C]``, of any strides, r up to R: what is beyond it of ``low`` is padding. Float32, or the
            dtype of ``low``.
        token_of_slot: ``[S]`` int32 of :class:`SortedPairs`.
        weight_of_slot: ``[S]`` float32, with which ``low`` is multiplied; the product is rounded to the dtype of
            ``low`` first.
        scale: multiplies the sums before they are rounded.
    """
    num_experts, ranks, columns = output.shape
    gathered, weighted, device = token_of_slot is not None, weight_of_slot is not None, rows.get_device()
    _kernel(low.dtype, output.dtype, low.shape[1], gathered, weighted, device)(
        (-(-columns // _COLUMNS), num_experts),
        _THREADS,
        current_stream(device),
        low.data_ptr(),
        rows.data_ptr(),
        expert_offsets.data_ptr(),
        0 if token_of_slot is None else token_of_slot.data_ptr(),
        0 if weight_of_slot is None else weight_of_slot.data_ptr(),
        output.data_ptr(),
        word_of(scale),
        ranks,
        columns,
        *output.stride(),
    )
