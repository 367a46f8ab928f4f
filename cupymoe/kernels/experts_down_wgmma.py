"""Launcher of ``cuda_src/experts_down_wgmma.cu``: down projection of every slot, for many tokens."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_tiles import BLOCK_K, THREADS, AdapterStep, TileShape, grid, slot_map, transposed_boxes
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import Slots
from cupymoe.kernels.tensor_map import tensor_map
from cupymoe.kernels.unsorted_pairs import UnsortedPairs


def variant(shape: TileShape) -> Variant:
    """The compilation for one shape."""
    return Variant(
        "experts_down_wgmma",
        (
            *shape.defines(),
            *shape.down.defines(),
            f"TRANSPOSED={int(shape.down_transposed)}",
            f"HAS_BIAS={int(shape.has_down_bias)}",
            f"LOW_RANK={shape.down_rank}",
            *(("SCATTERS=1",) if shape.scatters else ()),
        ),
    )


@functools.cache
def _prepared(shape: TileShape, device: int) -> tuple[Kernel, tuple[int, int]]:
    """The kernel and its grid."""
    run = kernel(
        variant(shape),
        "experts_down_wgmma",
        device,
        shared_bytes=shape.down.shared_bytes,
        dependent=True,
        tensor_maps=4 if shape.down_rank else 2,
    )
    return run, grid(device, shape.down.blocks)


@functools.lru_cache(maxsize=4096)
def _down_map(address: int, shape: TileShape, depth: int) -> tuple[int, ...]:
    """Of down_proj, or of an adapter's factor, whose ``depth`` is its rank.

    Of a transposed weight boxes of 64 of its columns.
    Of another one boxes of sixteens of rows, in each 0, 1, 4, 5, 8, 9, 12, 13, then 2, 3, 6, 7, ...: see the source.
    """
    if shape.down_transposed:
        sizes = (shape.num_experts, depth, shape.hidden_size)
        return tensor_map(address, shape.dtype, *transposed_boxes(*sizes, halves=1, itemsize=shape.dtype.itemsize))
    row = depth * shape.dtype.itemsize
    return tensor_map(
        address,
        shape.dtype,
        sizes=(depth, 2, 4, 2, shape.num_experts * shape.hidden_size // 16),
        strides=(row, 4 * row, 2 * row, 16 * row),
        box=(BLOCK_K, 2, 4, 2, shape.down.block_n // 16),
    )


def experts_down_wgmma(
    intermediate: torch.Tensor,
    down_proj: torch.Tensor,
    pairs: Slots | UnsortedPairs,
    shape: TileShape,
    bias: torch.Tensor | None = None,
    adapter: AdapterStep | None = None,
    ticket: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T * K, H]``, the experts' outputs, not yet weighted; rows in expert order, undefined past the last slot. Where
    ``shape.scatters``, the rows that ``pairs.token_of_slot`` says, and the others stay as they are.

    Args:
        intermediate: ``[T * K, I]``, of any launch before this one. All else but ``adapter.low`` must have been
            written two launches before it or earlier.
        down_proj: ``[E, H, I]``, 16-byte aligned; contiguous, or where ``shape.down_transposed`` the
            ``transpose(1, 2)`` of a contiguous tensor.
        pairs: the sorted pairs, or where ``shape.unsorted`` those that ``experts_up_wgmma`` had in the launch just
            before this one.
        bias: ``[E, H]``, contiguous, where ``shape.has_down_bias``, else None.
        adapter: of down_proj, where ``shape.down_rank``, else None.
        ticket: which of the ticket counters of sorted ``pairs`` it takes.
        out: ``[T * K, H]``, contiguous, 16-byte aligned, where the output goes; None: new memory.
    """
    device = intermediate.device.index
    expert_output = intermediate.new_empty((intermediate.shape[0], shape.hidden_size)) if out is None else out
    of_slots: tuple[int, ...] = ()
    if isinstance(pairs, UnsortedPairs):
        its_pairs = pairs.arguments()
    else:
        its_pairs = pairs.expert_offsets.data_ptr(), pairs.tickets.data_ptr() + 4 * ticket
        if shape.scatters:
            of_slots = (pairs.token_of_slot.data_ptr(),)
    run, blocks = _prepared(shape, device)
    run(
        blocks,
        THREADS,
        current_stream(device),
        *_down_map(down_proj.data_ptr(), shape, shape.intermediate_size),
        *slot_map(intermediate),
        *(() if adapter is None else slot_map(adapter.low)),
        *(() if adapter is None else _down_map(adapter.factor.data_ptr(), shape, shape.down_rank)),
        *its_pairs,
        expert_output.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        *of_slots,
    )
    return expert_output
