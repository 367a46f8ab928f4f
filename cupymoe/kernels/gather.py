"""Launcher of ``cuda_src/gather.cu``. Oracle: ``hidden_states[token_of_slot]``."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.rows import row_defines, row_geometry, vector_width


def variant(dtype: torch.dtype, columns: int, width: int, top_k: int) -> Variant:
    """The compilation for one dtype, row width and number of choices."""
    threads = row_geometry(columns, width)[1]
    return Variant("gather", row_defines(dtype, columns, width, top_k, threads))


@functools.cache
def _prepared(dtype: torch.dtype, columns: int, aligned: bool, top_k: int, device: int) -> tuple[Kernel, int, int]:
    """The kernel, and the blocks and threads of a row."""
    width = vector_width(dtype, columns, aligned)
    return kernel(variant(dtype, columns, width, top_k), "gather", device), *row_geometry(columns, width)


def gather(hidden_states: torch.Tensor, slot_of_pair: torch.Tensor) -> torch.Tensor:
    """Rows of the tokens in expert order, ``[T * K, H]``; rows without a pair (masked ones' share) are undefined.

    Args:
        hidden_states: ``[T, H]``, contiguous, at least one token.
        slot_of_pair: ``[T, K]`` int32 of :class:`SortedPairs`.
    """
    num_tokens, columns = hidden_states.shape
    top_k = slot_of_pair.shape[1]
    expert_hidden_states = hidden_states.new_empty((num_tokens * top_k, columns))
    device, address = hidden_states.device.index, hidden_states.data_ptr()
    run, blocks, threads = _prepared(hidden_states.dtype, columns, address % 16 == 0, top_k, device)
    run(
        (num_tokens, blocks),
        threads,
        current_stream(device),
        address,
        slot_of_pair.data_ptr(),
        expert_hidden_states.data_ptr(),
    )
    return expert_hidden_states
