"""Between torch and CUDA: the current stream, and zero-copy arrays through DLPack.

The launchers pass raw pointers (a DLPack crossing costs 5 to 30 us of host time); :func:`as_cupy` and :func:`as_torch`
are for users who want to work on the same memory with CuPy.
"""

from __future__ import annotations

from typing import Any

import torch

from cupymoe.kernels.cupy_import import import_cupy


def current_stream(device: int) -> int:
    """The raw handle of torch's current stream on a device."""
    # torch.cuda.current_stream() makes a Python object, at 30 times the cost.
    return int(torch._C._cuda_getCurrentRawStream(device))


def as_cupy(tensor: torch.Tensor) -> Any:
    """A ``cupy.ndarray`` over the memory of a CUDA tensor: no copy, same pointer, same strides.

    CuPy has no bfloat16 of its own, so a bfloat16 tensor comes as its bits, in uint16; ``as_torch(array,
    torch.bfloat16)`` takes it back. CuPy's current stream waits for the work queued on torch's.

    Raises:
        TypeError: ``tensor`` is no tensor.
        ValueError: it is not on a CUDA device.
        ImportError: CuPy is missing, or two of them are installed over each other.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cuda":
        raise ValueError(f"as_cupy needs a CUDA tensor, got one on {tensor.device}")
    tensor = tensor.detach()
    return import_cupy().from_dlpack(tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor)


def as_torch(array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor over the memory of a ``cupy.ndarray``: no copy, same pointer, same strides.

    torch's current stream waits for the work queued on CuPy's.

    Args:
        array: anything that speaks DLPack.
        dtype: reinterprets the elements as others of the same width: ``torch.bfloat16`` for the bits that
            :func:`as_cupy` gave.

    Raises:
        TypeError: ``array`` has no ``__dlpack__``.
        ValueError: ``dtype`` is of another width.
    """
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"array must be a cupy.ndarray or another DLPack array, got {type(array).__name__}")
    tensor = torch.utils.dlpack.from_dlpack(array)
    if dtype is not None and dtype.itemsize != tensor.dtype.itemsize:
        raise ValueError(f"dtype must be as wide as array's {tensor.dtype}, got {dtype}")
    return tensor if dtype is None else tensor.view(dtype)
