"""Launcher of ``cuda_src/pack_adapter.cu``. Oracle: ``scale * source``, padded with zeros, by torch's ``copy_``."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel, word_of

_THREADS = 256


class Tiling(NamedTuple):
    """Elements of a tile, and on which side threads go through the experts first."""

    experts: int
    rows: int
    columns: int
    source_experts_innermost: bool = False
    output_experts_innermost: bool = False


TILINGS = WIDE, NARROW, FROM_INNERMOST, TO_INNERMOST = (
    Tiling(1, 16, 128),
    Tiling(1, 128, 16),
    Tiling(32, 8, 16, source_experts_innermost=True),
    Tiling(32, 8, 16, output_experts_innermost=True),
)


def variant(source_dtype: torch.dtype, output_dtype: torch.dtype, tiling: Tiling) -> Variant:
    """The compilation for two dtypes; it serves every size and all strides."""
    return Variant(
        "pack_adapter",
        (
            f"IN_SCALAR={SCALARS[source_dtype]}",
            f"OUT_SCALAR={SCALARS[output_dtype]}",
            f"EXPERTS={tiling.experts}",
            f"ROWS={tiling.rows}",
            f"COLUMNS={tiling.columns}",
            f"SOURCE_EXPERTS_INNERMOST={int(tiling.source_experts_innermost)}",
            f"OUTPUT_EXPERTS_INNERMOST={int(tiling.output_experts_innermost)}",
            f"BLOCK_THREADS={_THREADS}",
        ),
    )


@functools.cache
def _kernel(source_dtype: torch.dtype, output_dtype: torch.dtype, tiling: Tiling, device: int) -> Kernel:
    return kernel(variant(source_dtype, output_dtype, tiling), "pack_adapter", device, dependent=True)


def has_experts_innermost(factor: torch.Tensor) -> bool:
    """Whether the elements of ``[E, M, N]`` that lie together are those of different experts, as in PEFT's B."""
    return factor.stride(0) == 1 and factor.stride(2) != 1


def pack_adapter(source: torch.Tensor, output: torch.Tensor, scale: float = 1.0) -> None:
    """``output = scale * source``, computed in float32 and rounded once, with zeros where ``output`` is larger.

    Args:
        source: ``[E, m, n]``, bfloat16, float16 or float32, any strides.
        output: ``[E, M, N]`` with M >= m and N >= n, any of these dtypes, any strides without overlap.
        scale: used in float32.
    """
    if output.numel() == 0:
        return
    from_innermost, to_innermost = has_experts_innermost(source), has_experts_innermost(output)
    side = source if to_innermost else output
    if side.stride(1) < side.stride(2):  # columns are what lies together
        source, output = source.transpose(1, 2), output.transpose(1, 2)
    if to_innermost:
        tiling = TO_INNERMOST
    elif from_innermost:
        tiling = FROM_INNERMOST
    else:
        tiling = WIDE if output.shape[2] >= WIDE.columns else NARROW
    experts, rows, columns = output.shape
    tiles = -(-experts // tiling.experts) * -(-rows // tiling.rows) * -(-columns // tiling.columns)
    device = output.get_device()
    _kernel(source.dtype, output.dtype, tiling, device)(
        (tiles, 1),
        _THREADS,
        current_stream(device),
        source.data_ptr(),
        output.data_ptr(),
        word_of(scale),
        *source.shape,
        rows,
        columns,
        *source.stride(),
        *output.stride(),
    )
