"""Launcher of ``cuda_src/experts_up_wgmma.cu``: gate_up projection and activation of every slot, for many tokens."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_tiles import BLOCK_K, THREADS, AdapterStep, TileShape, grid, transposed_boxes
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import Slots
from cupymoe.kernels.tensor_map import tensor_map
from cupymoe.kernels.unsorted_pairs import UnsortedPairs


def variant(shape: TileShape) -> Variant:
    """The compilation for one shape."""
    activation = shape.activation
    return Variant(
        "experts_up_wgmma",
        (
            *shape.defines(),
            *shape.up.defines(),
            *activation_defines(activation),
            f"GATED={int(activation.is_gated)}",
            f"INTERLEAVED={int(activation.is_interleaved)}",
            f"TRANSPOSED={int(shape.gate_up_transposed)}",
            f"HAS_BIAS={int(shape.has_gate_up_bias)}",
            f"KEEPS_GATE_UP={int(shape.keeps_gate_up)}",
            f"LOW_RANK={shape.gate_up_rank}",
        ),
    )


@functools.cache
def _prepared(shape: TileShape, device: int) -> tuple[Kernel, tuple[int, int]]:
    """The kernel and its grid."""
    run = kernel(
        variant(shape),
        "experts_up_wgmma",
        device,
        shared_bytes=shape.up.shared_bytes,
        dependent=True,
        tensor_maps=1 + (shape.gate_up_rank > 0),
    )
    return run, grid(device, shape.up.blocks)


@functools.lru_cache(maxsize=4096)
def _gate_up_map(address: int, shape: TileShape, depth: int) -> tuple[int, ...]:
    """Of gate_up_proj, or of an adapter's factor, whose ``depth`` is its rank.

    Of a transposed weight a box is 64 of its columns, or 64 gate columns and the 64 up columns for the same outputs.
    Of another one boxes of 8 gate rows, the 8 up rows of the same columns, the next 8 gate rows, ...; of an ungated
    weight a box is simply the rows in their order.
    """
    if shape.gate_up_transposed:
        sizes = (shape.num_experts, depth, shape.gate_up_rows)
        boxes = transposed_boxes(*sizes, shape.gate_up_halves, shape.dtype.itemsize)
        return tensor_map(address, shape.dtype, *boxes)
    rows, row = shape.gate_up_rows, depth * shape.dtype.itemsize
    inputs = rows // shape.intermediate_size  # gate and up, or one
    next_column, next_input = (inputs * row, row) if shape.activation.is_interleaved else (row, rows // inputs * row)
    return tensor_map(
        address,
        shape.dtype,
        sizes=(depth, 8, inputs, shape.intermediate_size // 8, shape.num_experts),
        strides=(next_column, next_input, 8 * next_column, rows * row),
        box=(BLOCK_K, 8, inputs, shape.up.block_n // (8 * inputs), 1),
    )


def experts_up_wgmma(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    pairs: Slots | UnsortedPairs,
    shape: TileShape,
    bias: torch.Tensor | None = None,
    gate_up: torch.Tensor | None = None,
    adapter: AdapterStep | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T * K, I]`` of ``act(gate) * up``, rounded once; rows in expert order, undefined past the last slot.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned.
        gate_up_proj: ``[E, 2 I, H]``, or ``[E, I, H]`` of an ungated activation; 16-byte aligned; contiguous, or where
            ``shape.gate_up_transposed`` the ``transpose(1, 2)`` of a contiguous tensor.
        pairs: the sorted pairs; takes its first ticket counter. Where ``shape.unsorted``, the pairs as they were
            chosen, whose slots are written.
        bias: ``[E, 2 I]`` or ``[E, I]``, contiguous, where ``shape.has_gate_up_bias``, else None.
        gate_up: ``[T * K, 2 I]`` (``[T * K, I]``), written where ``shape.keeps_gate_up``, else None.
        adapter: of gate_up_proj, where ``shape.gate_up_rank``, else None.
        out: ``[T * K, I]``, contiguous, 16-byte aligned, where the output goes; None: new memory.
    """
    device = hidden_states.device.index
    its_pairs: tuple[int, ...]
    if isinstance(pairs, UnsortedPairs):
        slots, its_pairs = pairs.slot_of_pair.numel(), (*pairs.arguments(), pairs.slot_of_pair.data_ptr())
    else:
        slots = pairs.token_of_slot.shape[0]
        its_pairs = pairs.expert_offsets.data_ptr(), pairs.token_of_slot.data_ptr(), pairs.tickets.data_ptr()
    intermediate = hidden_states.new_empty((slots, shape.intermediate_size)) if out is None else out
    run, blocks = _prepared(shape, device)
    run(
        blocks,
        THREADS,
        current_stream(device),
        *_gate_up_map(gate_up_proj.data_ptr(), shape, shape.hidden_size),
        *(() if adapter is None else _gate_up_map(adapter.factor.data_ptr(), shape, shape.gate_up_rank)),
        *(() if adapter is None else (adapter.low.data_ptr(),)),
        hidden_states.data_ptr(),
        *its_pairs,
        intermediate.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if gate_up is None else gate_up.data_ptr(),
    )
    return intermediate
