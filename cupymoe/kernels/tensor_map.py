"""Descriptions of tensors for Hopper's copy engine: ``TensorMap`` of ``cuda_src/common/tensor_copy.cuh``."""

from __future__ import annotations

import ctypes
import functools

import torch

from cupymoe.kernels.launch import MAP_BYTES, driver, error_name

WORDS = MAP_BYTES // 8
"""As many arguments of a launch make up one map."""

# enum values of cuda.h
_DATA_TYPES = {torch.uint8: 0, torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {16: 0, 64: 2, 128: 3}  # by the bytes of a box in its innermost dimension, all of which are swizzled
_NO_INTERLEAVE, _PROMOTE_TO_256_BYTES, _ZEROS_OUT_OF_BOUNDS = 0, 3, 0


# A map holds an address and a geometry, no contents: it stays right when other memory takes the address.
@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> tuple[int, ...]:
    """The words of a map of a tensor that is copied box by box, the innermost bytes of a box swizzled: in rows of 128
    bytes pack p of row r lies at p ^ (r % 8), in rows of 64 at p ^ (r / 2 % 4), and one of 16 is a single pack.

    Args:
        address: of the first element; a multiple of 16.
        sizes: elements in each dimension, innermost first.
        strides: bytes from one index to the next in every dimension but the innermost; multiples of 16, in any order.
        box: elements in each dimension; 128, 64 or 16 bytes in the innermost.

    Raises:
        RuntimeError: the driver refused the description.
    """
    rank = len(sizes)
    memory = (ctypes.c_uint64 * (WORDS + 8))()
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        _DATA_TYPES[dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLES[box[0] * dtype.itemsize],
        _PROMOTE_TO_256_BYTES,
        _ZEROS_OUT_OF_BOUNDS,
    )
    if status:
        raise RuntimeError(
            f"the driver refused a tensor map of sizes {sizes}, strides {strides} and box {box}: {error_name(status)}"
        )
    return tuple((ctypes.c_uint64 * WORDS).from_address(aligned))
