"""The buffers of a quantised weight: their shapes and dtypes, the padding of their rows, and how they move."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cupymoe.weights.format import WeightFormat

BUFFERS = ("codes", "scales", "zeros", "row_scales")
ROW_SCALE_DTYPE = torch.float32
ROW_BYTES_MULTIPLE = 16
"""Rows of scales and of zero points are padded to a multiple of this, so that they can be copied 16 bytes at a time."""


def _padded_groups(groups: int, dtype: torch.dtype) -> int:
    return -(-groups * dtype.itemsize // ROW_BYTES_MULTIPLE) * ROW_BYTES_MULTIPLE // dtype.itemsize


def expected_buffers(
    format: WeightFormat, shape: tuple[int, int, int], scale_dtype: torch.dtype | None
) -> tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]:
    """Shape and dtype of each buffer; None for one that the format does not have."""
    *outer, k = shape
    groups = format.groups(k)
    dtype = scale_dtype or next(iter(format.scale_dtypes), None)
    return (
        ((*outer, format.row_bytes(k)), torch.uint8),
        None if dtype is None else ((*outer, _padded_groups(groups, dtype)), dtype),
        ((*outer, _padded_groups(groups, torch.uint8)), torch.uint8) if format.has_zeros else None,
        ((*outer,), ROW_SCALE_DTYPE) if format.has_row_scales else None,
    )


def padded(of_groups: torch.Tensor) -> torch.Tensor:
    """``[E, n, G]`` with rows of whole 16 bytes; the bytes are copied, because torch pads no tensor of 8-bit floats."""
    row_bytes = _padded_groups(of_groups.shape[-1], of_groups.dtype) * of_groups.dtype.itemsize
    as_bytes = of_groups.contiguous().view(torch.uint8)
    output = as_bytes.new_zeros((*as_bytes.shape[:-1], row_bytes))
    output[..., : as_bytes.shape[-1]] = as_bytes
    return output.view(of_groups.dtype)


def bytes_moved(fn: Callable[[torch.Tensor], torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    """What a module's ``to``, ``half``, ``cuda``, ``to_empty``, ``share_memory`` makes of a buffer, with its dtype.

    They are shown the bytes, which they take for integers and never cast; ``type`` casts all the same, and then only
    the device is changed.
    """
    as_bytes = buffer.view(torch.uint8)
    moved = fn(as_bytes)
    return (moved if moved.dtype == torch.uint8 else as_bytes.to(moved.device)).view(buffer.dtype)
