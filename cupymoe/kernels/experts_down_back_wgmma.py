"""Launcher of ``cuda_src/experts_down_back_wgmma.cu``: every slot's gradient of gate_up, from that of the output."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_tiles import (
    BLOCK_K,
    THREADS,
    AdapterStep,
    TileShape,
    grid,
    transposed_boxes,
)
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import SortedPairs
from cupymoe.kernels.tensor_map import tensor_map


class DownBack(NamedTuple):
    """What the way back gives of every slot; rows in expert order, undefined past the last slot."""

    grad_gate_up: torch.Tensor
    """``[T * K, 2 I]``, or ``[T * K, I]`` of an ungated activation: the gradient, routing weights included."""
    weighted: torch.Tensor | None
    """``[T * K, I]``: the intermediate times the routing weight; None where it was not asked for."""
    dot_parts: torch.Tensor
    """``[T * K, parts]`` float32, whose sums over the parts are the gradients of the routing weights."""


def variant(shape: TileShape, stores_weighted: bool) -> Variant:
    """The compilation for one shape; ``stores_weighted``: whether the gradient of down_proj is wanted."""
    activation = shape.activation
    return Variant(
        "experts_down_back_wgmma",
        (
            *shape.defines(),
            *shape.down_back.defines(),
            *activation_defines(activation),
            f"GATED={int(activation.is_gated)}",
            f"INTERLEAVED={int(activation.is_interleaved)}",
            # down_proj's columns are the rows of this product, so that the contiguous weight is the transposed one.
            f"TRANSPOSED={int(not shape.down_transposed)}",
            f"STORES_WEIGHTED={int(stores_weighted)}",
            f"LOW_RANK={shape.down_rank}",
        ),
    )


@functools.cache
def _prepared(shape: TileShape, stores_weighted: bool, device: int) -> tuple[Kernel, tuple[int, int]]:
    """The kernel and its grid."""
    run = kernel(
        variant(shape, stores_weighted),
        "experts_down_back_wgmma",
        device,
        shared_bytes=shape.down_back.shared_bytes,
        dependent=True,
        tensor_maps=2 if shape.down_rank else 1,
    )
    return run, grid(device, shape.down_back.blocks)


@functools.lru_cache(maxsize=4096)
def _down_map(address: int, shape: TileShape, depth: int) -> tuple[int, ...]:
    """Of down_proj, or of an adapter's factor, whose ``depth`` is its rank: boxes of 64 columns of the weight, or where
    it is transposed of its rows."""
    rows = shape.intermediate_size
    if not shape.down_transposed:
        boxes = transposed_boxes(shape.num_experts, depth, rows, halves=1, itemsize=shape.dtype.itemsize)
        return tensor_map(address, shape.dtype, *boxes)
    row = depth * shape.dtype.itemsize
    return tensor_map(
        address,
        shape.dtype,
        sizes=(depth, 8, 1, rows // 8, shape.num_experts),
        strides=(row, rows * row, 8 * row, rows * row),
        box=(BLOCK_K, 8, 1, shape.down_back.block_n // 8, 1),
    )


def experts_down_back_wgmma(
    grad_output: torch.Tensor,
    down_proj: torch.Tensor,
    gate_up: torch.Tensor,
    weight_of_slot: torch.Tensor,
    pairs: SortedPairs,
    shape: TileShape,
    adapter: AdapterStep | None = None,
    *,
    stores_weighted: bool,
) -> DownBack:
    """The gradient of every slot's gate_up, and what the other gradients are made of.

    Args:
        grad_output: ``[T, H]`` of the layer, contiguous, 16-byte aligned, the dtype of the weights.
        down_proj: ``[E, H, I]``, 16-byte aligned; contiguous, or where ``shape.down_transposed`` the
            ``transpose(1, 2)`` of a contiguous tensor.
        gate_up: ``[T * K, 2 I]``, or ``[T * K, I]`` of an ungated activation: what ``experts_up`` kept.
        weight_of_slot: ``[T * K]`` float32, the routing weights in expert order.
        pairs: the sorted pairs; takes its second ticket counter.
        shape: of the call.
        adapter: of down_proj, where ``shape.down_rank``, else None: the gradient of the output times ``b``, and ``a``
            transposed, ``[E, I, R]``.
        stores_weighted: whether ``weighted`` of the result is wanted.
    """
    device, slots = grad_output.device.index, gate_up.shape[0]
    grad_gate_up = torch.empty_like(gate_up)
    weighted = gate_up.new_empty((slots, shape.intermediate_size)) if stores_weighted else None
    parts = -(-shape.intermediate_size // shape.down_back.block_n)
    dot_parts = gate_up.new_empty((slots, parts), dtype=torch.float32)
    run, blocks = _prepared(shape, stores_weighted, device)
    run(
        blocks,
        THREADS,
        current_stream(device),
        *_down_map(down_proj.data_ptr(), shape, shape.hidden_size),
        *(() if adapter is None else _down_map(adapter.factor.data_ptr(), shape, shape.down_rank)),
        *(() if adapter is None else (adapter.low.data_ptr(),)),
        grad_output.data_ptr(),
        pairs.expert_offsets.data_ptr(),
        pairs.token_of_slot.data_ptr(),
        weight_of_slot.data_ptr(),
        pairs.tickets.data_ptr() + 4,
        gate_up.data_ptr(),
        grad_gate_up.data_ptr(),
        0 if weighted is None else weighted.data_ptr(),
        dot_parts.data_ptr(),
    )
    return DownBack(grad_gate_up, weighted, dot_parts)
