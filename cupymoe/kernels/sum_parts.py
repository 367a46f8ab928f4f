"""Launcher of ``cuda_src/sum_parts.cu``: gradients of the routing weights, from the parts of each slot."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

_THREADS = 256


def variant(parts: int) -> Variant:
    """The compilation for one number of parts."""
    return Variant("sum_parts", (f"PARTS={parts}", f"BLOCK_THREADS={_THREADS}"))


@functools.cache
def _kernel(parts: int, device: int) -> Kernel:
    return kernel(variant(parts), "sum_parts", device, dependent=True)


def sum_parts(parts: torch.Tensor, slot_of_pair: torch.Tensor) -> torch.Tensor:
    """The sum of each pair's parts, ``[T, K]`` float32; zero where the pair is masked.

    Args:
        parts: ``[T * K, parts]`` float32 in expert order, contiguous.
        slot_of_pair: ``[T, K]`` int32 of :class:`SortedPairs`, at least one pair.
    """
    device, num_pairs = parts.device.index, slot_of_pair.numel()
    sums = parts.new_empty(slot_of_pair.shape)
    _kernel(parts.shape[1], device)(
        (-(-num_pairs // _THREADS), 1),
        _THREADS,
        current_stream(device),
        parts.data_ptr(),
        slot_of_pair.data_ptr(),
        sums.data_ptr(),
        num_pairs,
    )
    return sums
