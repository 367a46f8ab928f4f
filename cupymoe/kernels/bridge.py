"""Between torch and CUDA: the current stream, launch geometry, and zero-copy arrays through DLPack.

The launchers pass raw pointers (a DLPack crossing costs 5 to 30 us of host time); :func:`as_cupy` and :func:`as_torch`
are for users who want to work on the same memory with CuPy.
"""

from __future__ import annotations

from typing import Any

import torch

from cupymoe.kernels.jit import import_cupy

SCALARS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""CUDA names of the dtypes that the kernels serve."""

INDEX_TYPES = {torch.int32: "int", torch.int64: "long long"}
"""CUDA names of the dtypes of ``top_k_index``."""


def current_stream(device: int) -> int:
    """The raw handle of torch's current stream on a device."""
    # torch.cuda.current_stream() makes a Python object, at 30 times the cost.
    return int(torch._C._cuda_getCurrentRawStream(device))


def vector_width(dtype: torch.dtype, columns: int, aligned: bool) -> int:
    """Elements in one access: 16 bytes' worth where the rows and the pointers (``aligned``) allow it, else one."""
    width = 16 // dtype.itemsize
    return width if aligned and columns % width == 0 else 1


def row_geometry(columns: int, width: int) -> tuple[int, int]:
    """(blocks, threads) that cover one row with ``width`` columns a thread: at most 256 threads, in whole warps."""
    threads = -(-columns // width)
    blocks = -(-threads // 256)
    return blocks, -(-threads // (blocks * 32)) * 32


def row_defines(dtype: torch.dtype, columns: int, width: int, top_k: int, threads: int) -> tuple[str, ...]:
    """Defines of a kernel that moves whole rows."""
    return (
        f"SCALAR={SCALARS[dtype]}",
        f"COLS={columns}",
        f"VEC={width}",
        f"TOP_K={top_k}",
        f"BLOCK_THREADS={threads}",
    )


def as_cupy(tensor: torch.Tensor) -> Any:
    """A ``cupy.ndarray`` over the memory of a CUDA tensor: no copy, same pointer, same strides.

    CuPy has no bfloat16 of its own, so a bfloat16 tensor comes as its bits, in uint16; ``as_torch(array,
    torch.bfloat16)`` takes it back. CuPy's current stream waits for the work queued on torch's.

    Raises:
        ValueError: the tensor is not on a CUDA device.
    """
    if tensor.device.type != "cuda":
        raise ValueError(f"as_cupy needs a CUDA tensor, got one on {tensor.device}")
    tensor = tensor.detach()
    return import_cupy().from_dlpack(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)


def as_torch(array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor over the memory of a ``cupy.ndarray``: no copy, same pointer, same strides.

    ``dtype``, of the same width, reinterprets the elements: ``torch.bfloat16`` for the bits that :func:`as_cupy` gave.
    """
    tensor = torch.utils.dlpack.from_dlpack(array)
    return tensor if dtype is None else tensor.view(dtype)
