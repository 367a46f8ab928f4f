"""Launcher of ``cuda_src/gated_activation.cu``. Oracle: :func:`cupymoe.reference.activate`."""

from __future__ import annotations

import functools

import torch

from cupymoe.activation import MoEActivation
from cupymoe.kernels.bridge import SCALARS, current_stream, vector_width
from cupymoe.kernels.jit import Kernel, Variant, kernel

BLOCK_THREADS = 256


def variant(dtype: torch.dtype, activation: MoEActivation, columns: int, width: int) -> Variant:
    """The compilation for one dtype, activation and output width."""
    return Variant(
        "gated_activation",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"ACTIVATION={activation.function}",
            f"GATED={int(activation.is_gated)}",
            f"INTERLEAVED={int(activation.is_interleaved)}",
            f"COLS={columns}",
            f"VEC={width}",
        ),
    )


@functools.cache
def _kernel(dtype: torch.dtype, activation: MoEActivation, columns: int, width: int, device: int) -> Kernel:
    return kernel(variant(dtype, activation, columns, width), "gated_activation", device)


def gated_activation(
    input: torch.Tensor, output: torch.Tensor, activation: MoEActivation, num_rows: torch.Tensor | None = None
) -> torch.Tensor:
    """``output = act(gate) * up``, rounded once.

    Args:
        input: ``[..., 2N]`` (``[..., N]`` if ungated), contiguous.
        output: ``[..., N]``, contiguous, same dtype.
        num_rows: one int32 on the device; rows from there on are left as they are. None: all rows.
    """
    columns = output.shape[-1]
    if output.numel() == 0:
        return output
    device = output.device.index
    width = vector_width(columns, input, output)
    threads = output.numel() // width
    _kernel(output.dtype, activation, columns, width, device)(
        (-(-threads // BLOCK_THREADS), 1),
        BLOCK_THREADS,
        current_stream(device),
        input.data_ptr(),
        num_rows.data_ptr() if num_rows is not None else 0,
        output.data_ptr(),
        output.numel() // columns,
    )
    return output
