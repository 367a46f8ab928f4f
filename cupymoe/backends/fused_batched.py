"""A batch of the experts on the fused backend: two projections of the rows that count, and a small plan before them.

    plan_batch -> experts_up -> experts_down          the weight stream
    plan_batch -> experts_up_wgmma -> experts_down_wgmma    tiles

How many rows count is on the device alone, so which way is taken goes by how many there may be. Tiles of plain weights
are then cut for few rows or for many. Where there may be many, each projection is launched in both cuts, and plan_batch
leaves one of them without rows, so that its launch ends at once.
"""

from __future__ import annotations

import functools

import torch

from cupymoe.backends import BatchTensors, ExpertsCall
from cupymoe.backends.fused_codes import scales_of, stored_weights
from cupymoe.backends.fused_products import down_product, up_product
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.coded_tiles import SLOTS, coded_slots
from cupymoe.kernels.expert_stream import Shape, shape_of
from cupymoe.kernels.expert_tiles import MANY_SLOTS, TileShape, batch_cuts, tile_shape_of
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.plan_batch import plan_batch, plan_batch_chunks
from cupymoe.kernels.stored_weight import StoredWeight
from cupymoe.kernels.stream_regimes import batch_regime
from cupymoe.kernels.stream_workspace import new_batch_workspace


def stream(call: ExpertsCall, batch: BatchTensors, output: torch.Tensor, arch: Arch) -> None:
    """Few rows of each expert: writes the rows that count of ``output``, ``[E * max_tokens, H]``."""
    shape = _stream_shape(call, stored_weights(call, batch), arch)
    workspace = new_batch_workspace(batch.rows, shape, output)
    plan_batch_chunks(batch.expert_num_tokens, batch.max_tokens, shape.regime.tokens, workspace, arch)
    of_codes = batch.gate_up_scales, batch.gate_up_zeros, batch.gate_up_row_scales
    experts_up(batch.rows, batch.gate_up_proj, None, shape, workspace, None, None, None, *of_codes)
    of_codes = batch.down_scales, batch.down_zeros, batch.down_row_scales
    experts_down(batch.down_proj, None, shape, workspace, None, None, *of_codes)


def tiles(call: ExpertsCall, batch: BatchTensors, output: torch.Tensor) -> None:
    """The same with many."""
    stored = stored_weights(call, batch)
    shapes = _tile_shapes(call, stored)
    plans = plan_batch(batch.expert_num_tokens, batch.max_tokens, MANY_SLOTS if len(shapes) > 1 else None)
    of_gate_up, of_down = scales_of(call, batch)
    intermediate = batch.rows.new_empty((len(batch.rows), shapes[0].intermediate_columns))
    for slots, shape in zip(plans, shapes, strict=True):
        up_product(batch.rows, batch.gate_up_proj, of_gate_up, slots, shape, out=intermediate)
    for slots, shape in zip(plans, shapes, strict=True):
        down_product(intermediate, batch.down_proj, of_down, slots, shape, out=output)


@functools.lru_cache(maxsize=4096)
def _stream_shape(call: ExpertsCall, stored: tuple[StoredWeight, ...], arch: Arch) -> Shape:
    return shape_of(
        batch_regime(call.load, call.intermediate_size, arch, has_codes=bool(stored)),
        call.dtype,
        torch.int32,
        call.activation,
        call.num_experts,
        call.hidden_size,
        call.intermediate_size,
        1,
        call.gate_up_transposed,
        call.down_transposed,
        False,
        False,
        False,
        0,
        0,
        arch,
        True,
        *stored,
    )


@functools.lru_cache(maxsize=4096)
def _tile_shapes(call: ExpertsCall, stored: tuple[StoredWeight, ...]) -> tuple[TileShape, ...]:
    """For few rows, and for many where there may be so many. Beside a quantised weight one, for as many as there may
    be."""
    cuts = batch_cuts(call.load, call.intermediate_size)
    return tuple(
        tile_shape_of(
            *cut,
            call.dtype,
            call.activation,
            call.num_experts,
            call.hidden_size,
            call.intermediate_size,
            call.gate_up_transposed,
            call.down_transposed,
            False,
            False,
            False,
            0,
            0,
            *stored,
            scatters=True,
            coded_slots=coded_slots(call.load) if stored else SLOTS[-1],
        )
        for cut in (cuts[-1:] if stored else cuts)
    )
