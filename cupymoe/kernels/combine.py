"""Launcher of ``cuda_src/combine.cu``. Oracle: the weighted sum over k in :func:`cupymoe.reference.experts`."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream, row_defines, row_geometry, vector_width
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel


def variant(dtype: torch.dtype, columns: int, width: int, top_k: int) -> Variant:
    """The compilation for one dtype, row width and number of choices."""
    return Variant("combine", row_defines(dtype, columns, width, top_k))


@functools.cache
def _plan(dtype: torch.dtype, columns: int, aligned: bool, top_k: int, device: int) -> tuple[Kernel, int, int]:
    """The kernel, and the blocks and threads of a row."""
    width = vector_width(dtype, columns, aligned)
    return kernel(variant(dtype, columns, width, top_k), "combine", device), *row_geometry(columns, width)


def combine(expert_output: torch.Tensor, slot_of_pair: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """``output[t] = sum over k of top_k_weights[t, k] * expert_output[slot_of_pair[t, k]]``, ``[T, H]``.

    Args:
        expert_output: ``[T * K, H]`` in expert order, contiguous.
        slot_of_pair: ``[T, K]`` int32 of :class:`SortedPairs`, at least one token.
        top_k_weights: ``[T, K]`` float32, contiguous.
    """
    num_tokens, top_k = slot_of_pair.shape
    columns = expert_output.shape[1]
    output = expert_output.new_empty((num_tokens, columns))
    device, address = output.device.index, expert_output.data_ptr()
    run, blocks, threads = _plan(output.dtype, columns, address % 16 == 0, top_k, device)
    run(
        (num_tokens, blocks),
        threads,
        current_stream(device),
        address,
        slot_of_pair.data_ptr(),
        top_k_weights.data_ptr(),
        output.data_ptr(),
    )
    return output
