"""A batch of the experts on the fused backend: two projections of the rows that count, and a small plan before them.

    plan_batch -> experts_up -> experts_down          the weight stream
    plan_batch -> experts_up_wgmma -> experts_down_wgmma    tiles

How many rows count is on the device alone, so which way and which tiles are taken goes by how many there may be.
"""

from __future__ import annotations

import functools

import torch

from cupymoe.backends import BatchTensors, ExpertsCall
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.coded_tiles import Scales
from cupymoe.kernels.expert_stream import Shape, batch_regime, new_batch_workspace, shape_of
from cupymoe.kernels.expert_tiles import TileShape, batch_cut, tile_shape_of
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_down_codes_wgmma import experts_down_codes_wgmma
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.experts_up_codes_wgmma import experts_up_codes_wgmma
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.plan_batch import plan_batch, plan_batch_chunks
from cupymoe.kernels.stored_weight import StoredWeight, stored_weight
from cupymoe.weights.format import PLAIN, formats_of

_ScaleDtypes = tuple[torch.dtype | None, torch.dtype | None]


def stream(call: ExpertsCall, batch: BatchTensors, output: torch.Tensor, arch: Arch) -> None:
    """Few rows of each expert: writes the rows that count of ``output``, ``[E * max_tokens, H]``."""
    shape = _stream_shape(call, batch.scale_dtypes, arch)
    workspace = new_batch_workspace(batch.rows, shape, output)
    plan_batch_chunks(batch.expert_num_tokens, batch.max_tokens, shape.regime.tokens, workspace, arch)
    of_codes = batch.gate_up_scales, batch.gate_up_zeros, batch.gate_up_row_scales
    experts_up(batch.rows, batch.gate_up_proj, None, shape, workspace, None, None, None, *of_codes)
    of_codes = batch.down_scales, batch.down_zeros, batch.down_row_scales
    experts_down(batch.down_proj, None, shape, workspace, None, None, *of_codes)


def tiles(call: ExpertsCall, batch: BatchTensors, output: torch.Tensor) -> None:
    """The same with many."""
    slots = plan_batch(batch.expert_num_tokens, batch.max_tokens)
    shape = _tile_shape(call, batch.scale_dtypes)
    of_gate_up, of_down = formats_of(call.weight_format)
    if of_gate_up is None:
        intermediate = experts_up_wgmma(batch.rows, batch.gate_up_proj, slots, shape)
    else:
        scales = Scales(batch.gate_up_scales, batch.gate_up_zeros, batch.gate_up_row_scales)
        intermediate = experts_up_codes_wgmma(batch.rows, batch.gate_up_proj, scales, slots, shape)
    if of_down is None:
        experts_down_wgmma(intermediate, batch.down_proj, slots, shape, out=output)
    else:
        scales = Scales(batch.down_scales, batch.down_zeros, batch.down_row_scales)
        experts_down_codes_wgmma(intermediate, batch.down_proj, scales, slots, shape, out=output)


def _stored_weights(call: ExpertsCall, scale_dtypes: _ScaleDtypes) -> tuple[StoredWeight, ...]:
    """How both weights are stored; nothing where both are plain, as a shape has it."""
    return () if call.weight_format == PLAIN else tuple(map(stored_weight, call.weight_format.split(","), scale_dtypes))


@functools.lru_cache(maxsize=4096)
def _stream_shape(call: ExpertsCall, scale_dtypes: _ScaleDtypes, arch: Arch) -> Shape:
    stored = _stored_weights(call, scale_dtypes)
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
def _tile_shape(call: ExpertsCall, scale_dtypes: _ScaleDtypes) -> TileShape:
    stored = _stored_weights(call, scale_dtypes)
    return tile_shape_of(
        *batch_cut(call.load, call.intermediate_size),
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
    )
