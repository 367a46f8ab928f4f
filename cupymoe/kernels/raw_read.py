"""Launcher of ``cuda_src/raw_read.cu``, the benchmark's measure of memory bandwidth."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

BLOCK_THREADS = 512
BLOCKS_PER_MULTIPROCESSOR = 4


def variant() -> Variant:
    """The only compilation."""
    return Variant("raw_read", (f"BLOCK_THREADS={BLOCK_THREADS}",))


@functools.cache
def _kernel(device: int) -> Kernel:
    return kernel(variant(), "raw_read", device)


def raw_read(data: torch.Tensor) -> None:
    """Read a contiguous, 16-byte aligned CUDA tensor once, in whole 16 bytes, and do nothing with them."""
    device = data.device.index
    blocks = torch.cuda.get_device_properties(device).multi_processor_count * BLOCKS_PER_MULTIPROCESSOR
    result = data.new_empty(blocks, dtype=torch.int32)
    packs = data.numel() * data.element_size() // 16
    _kernel(device)((blocks, 1), BLOCK_THREADS, current_stream(device), data.data_ptr(), result.data_ptr(), packs)
