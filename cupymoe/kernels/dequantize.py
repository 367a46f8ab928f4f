"""Launcher of ``cuda_src/dequantize.cu``. Oracle: :func:`cupymoe.weights.dequantize.dequantize`; the same bits."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.weights.dequantize import Buffers, values_on
from cupymoe.weights.format import WeightFormat

BLOCK_THREADS = 256
WORDS_OF_THREAD = 8

_SCALES = {**SCALARS, torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}


def variant(format: WeightFormat, k: int, scale_dtype: torch.dtype | None, dtype: torch.dtype) -> Variant:
    """The compilation for a format, a depth, the dtype of the groups' scales, if there are any, and the output's."""
    return Variant(
        "dequantize",
        (
            f"OUT_SCALAR={SCALARS[dtype]}",
            f"DEPTH={k}",
            f"BITS={format.bits}",
            f"FIELDS={','.join('{' + ','.join(map(str, field)) + '}' for field in format.codec.fields)}",
            f"ROW_WORDS={format.row_bytes(k) // 4}",
            f"GROUP={format.group or 0}",
            f"SCALE={_SCALES[scale_dtype or torch.float32]}",
            f"HAS_ZEROS={int(format.has_zeros)}",
            f"HAS_ROW_SCALES={int(format.has_row_scales)}",
            f"WORDS_OF_THREAD={WORDS_OF_THREAD}",
            f"BLOCK_THREADS={BLOCK_THREADS}",
        ),
    )


@functools.cache
def _kernel(
    format: WeightFormat, k: int, scale_dtype: torch.dtype | None, dtype: torch.dtype, device: int
) -> tuple[Kernel, int]:
    """The kernel, and how many words of a row it reads."""
    return kernel(variant(format, k, scale_dtype, dtype), "dequantize", device), -(-k // format.codec.codes_of_word)


def dequantize(format: WeightFormat, k: int, buffers: Buffers, dtype: torch.dtype) -> torch.Tensor:
    """``[E, n, k]`` in ``dtype``; the host does not wait, but for the first call of a format on a device.

    Args:
        format: of the weight.
        k: its depth.
        buffers: of it, or of some neighbouring experts; contiguous.
        dtype: bfloat16, float16 or float32.
    """
    codes, scales, zeros, row_scales = buffers
    num_experts, rows, _ = codes.shape
    output = codes.new_empty((num_experts, rows, k), dtype=dtype)
    device = codes.get_device()
    run, words = _kernel(format, k, None if scales is None else scales.dtype, dtype, device)
    run(
        (-(-num_experts * rows * words // (BLOCK_THREADS * WORDS_OF_THREAD)), 1),
        BLOCK_THREADS,
        current_stream(device),
        codes.data_ptr(),
        values_on(format, torch.float32, codes.device).data_ptr(),
        0 if scales is None else scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        0 if row_scales is None else row_scales.data_ptr(),
        output.data_ptr(),
        num_experts * rows,
        0 if scales is None else scales.shape[2],
        0 if zeros is None else zeros.shape[2],
    )
    return output
