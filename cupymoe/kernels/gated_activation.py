"""Launcher of ``cuda_src/gated_activation.cu``. Oracle: :func:`cupymoe.reference.activate`."""

from __future__ import annotations

import functools

import torch

from cupymoe.activation import MoEActivation
from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.rows import vector_width

BLOCK_THREADS = 256


def variant(dtype: torch.dtype, activation: MoEActivation, columns: int, width: int) -> Variant:
    """The compilation for one dtype, activation and output width."""
    return Variant(
        "gated_activation",
        (
            f"SCALAR={SCALARS[dtype]}",
            *activation_defines(activation),
            f"GATED={int(activation.is_gated)}",
            f"INTERLEAVED={int(activation.is_interleaved)}",
            f"COLS={columns}",
            f"VEC={width}",
            f"BLOCK_THREADS={BLOCK_THREADS}",
        ),
    )


@functools.cache
def _prepared(
    dtype: torch.dtype, activation: MoEActivation, columns: int, aligned: bool, device: int
) -> tuple[Kernel, int]:
    """The kernel, and the elements of one thread."""
    width = vector_width(dtype, columns, aligned)
    return kernel(variant(dtype, activation, columns, width), "gated_activation", device), width


def gated_activation(
    input: torch.Tensor, output: torch.Tensor, activation: MoEActivation, num_rows: torch.Tensor | None = None
) -> torch.Tensor:
    """``output = act(gate) * up``, rounded once.

    Args:
        input: ``[..., 2N]`` (``[..., N]`` if ungated), contiguous.
        output: ``[..., N]``, contiguous, same dtype.
        num_rows: one int32 on the device; rows from there on are left as they are. None: all rows.
    """
    columns, elements = output.shape[-1], output.numel()
    if elements == 0:
        return output
    device, source, target = output.device.index, input.data_ptr(), output.data_ptr()
    run, width = _prepared(output.dtype, activation, columns, (source | target) % 16 == 0, device)
    run(
        (-(-elements // (width * BLOCK_THREADS)), 1),
        BLOCK_THREADS,
        current_stream(device),
        source,
        num_rows.data_ptr() if num_rows is not None else 0,
        target,
        elements // columns,
    )
    return output
