"""Launcher of ``cuda_src/experts_down_codes_wgmma.cu``: as :mod:`cupymoe.kernels.experts_down_wgmma`, of a quantised
down_proj."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.coded_tiles import BOX_SLOTS, CodedTiling, RowOrder, Scales, coded_maps, defines, tiling_of
from cupymoe.kernels.expert_tiles import TileShape, grid, slot_map
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.operand_rows import turned_rows
from cupymoe.kernels.sort_by_expert import Slots

_ORDER = RowOrder()


def variant(shape: TileShape) -> Variant:
    """The compilation for one shape."""
    return Variant(
        "experts_down_codes_wgmma",
        (
            *defines(shape, shape.down_stored),
            f"HAS_BIAS={int(shape.has_down_bias)}",
            *(("SCATTERS=1",) if shape.scatters else ()),
        ),
    )


@functools.cache
def _prepared(shape: TileShape, device: int) -> tuple[Kernel, tuple[int, int], CodedTiling]:
    """The kernel, its grid and its tiles."""
    tiling = tiling_of(shape, shape.down_stored)
    run = kernel(
        variant(shape),
        "experts_down_codes_wgmma",
        device,
        shared_bytes=tiling.shared_bytes,
        dependent=True,
        tensor_maps=shape.down_stored.maps + 1,
    )
    return run, grid(device), tiling


def experts_down_codes_wgmma(
    intermediate: torch.Tensor,
    codes: torch.Tensor,
    scales: Scales,
    pairs: Slots,
    shape: TileShape,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T * K, H]``, the experts' outputs, not yet weighted; rows in expert order, undefined past the last slot.

    Args:
        intermediate: ``[T * K, shape.intermediate_columns]``, of any launch before this one; turned where
            ``shape.turns_intermediate``, else it is turned here. All else must have been written two launches before it
            or earlier.
        codes: of down_proj, uint8 ``[E, H, row bytes]``, contiguous, 16-byte aligned.
        scales: what belongs to them.
        pairs: the sorted pairs.
        bias: ``[E, H]``, contiguous, where ``shape.has_down_bias``, else None.
        out: as of :func:`experts_down_wgmma`.
    """
    device = intermediate.device.index
    expert_output = intermediate.new_empty((intermediate.shape[0], shape.hidden_size)) if out is None else out
    run, blocks, tiling = _prepared(shape, device)
    if not shape.turns_intermediate:
        intermediate = turned_rows(intermediate, pairs)
    run(
        blocks,
        tiling.threads,
        current_stream(device),
        *coded_maps(codes, scales, _ORDER, tiling),
        *slot_map(intermediate, BOX_SLOTS),
        pairs.expert_offsets.data_ptr(),
        pairs.tickets.data_ptr() + 4,
        expert_output.data_ptr(),
        scales.row_scales_address,
        0 if bias is None else bias.data_ptr(),
        *((pairs.token_of_slot.data_ptr(),) if shape.scatters else ()),
    )
    return expert_output
