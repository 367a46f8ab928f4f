"""Launcher of ``cuda_src/experts_up_wgmma.cu``: gate_up projection and activation of every slot, for many tokens."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_tiles import BLOCK_K, THREADS, TileShape, grid
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import SortedPairs
from cupymoe.kernels.tensor_map import tensor_map


def variant(shape: TileShape) -> Variant:
    """The compilation for one shape."""
    return Variant("experts_up_wgmma", (*shape.defines(), *shape.up.defines(), *activation_defines(shape.activation)))


@functools.cache
def _plan(shape: TileShape, device: int) -> tuple[Kernel, tuple[int, int]]:
    """The kernel and its grid."""
    run = kernel(
        variant(shape),
        "experts_up_wgmma",
        device,
        shared_bytes=shape.up.shared_bytes,
        dependent=True,
        tensor_maps=1,
    )
    return run, grid(shape.up, device)


@functools.lru_cache(maxsize=4096)
def _gate_up_map(address: int, shape: TileShape) -> tuple[int, ...]:
    """Boxes of 8 gate rows, the 8 up rows of the same columns, the next 8 gate rows, ..."""
    row = shape.hidden_size * shape.dtype.itemsize
    return tensor_map(
        address,
        shape.dtype,
        sizes=(shape.hidden_size, 8, 2, shape.intermediate_size // 8, shape.num_experts),
        strides=(row, shape.intermediate_size * row, 8 * row, 2 * shape.intermediate_size * row),
        box=(BLOCK_K, 8, 2, shape.up.block_n // 16, 1),
    )


def experts_up_wgmma(
    hidden_states: torch.Tensor, gate_up_proj: torch.Tensor, pairs: SortedPairs, shape: TileShape
) -> torch.Tensor:
    """``[T * K, I]`` of ``act(gate) * up``, rounded once; rows in expert order, undefined past the last slot.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned.
        gate_up_proj: ``[E, 2 I, H]``, contiguous, 16-byte aligned.
        pairs: the sorted pairs; takes its first ticket counter.
    """
    device = hidden_states.device.index
    intermediate = hidden_states.new_empty((pairs.token_of_slot.shape[0], shape.intermediate_size))
    run, blocks = _plan(shape, device)
    run(
        blocks,
        THREADS,
        current_stream(device),
        *_gate_up_map(gate_up_proj.data_ptr(), shape),
        hidden_states.data_ptr(),
        pairs.expert_offsets.data_ptr(),
        pairs.token_of_slot.data_ptr(),
        pairs.tickets.data_ptr(),
        intermediate.data_ptr(),
    )
    return intermediate
