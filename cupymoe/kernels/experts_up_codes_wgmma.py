"""Launcher of ``cuda_src/experts_up_codes_wgmma.cu``: as :mod:`cupymoe.kernels.experts_up_wgmma`, of a quantised
gate_up_proj."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.coded_tiles import CodedTiling, RowOrder, Scales, coded_maps, defines, tiling_of
from cupymoe.kernels.expert_tiles import TileShape, grid
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.operand_rows import operand_rows
from cupymoe.kernels.sort_by_expert import Slots


def variant(shape: TileShape) -> Variant:
    """The compilation for one shape."""
    activation = shape.activation
    return Variant(
        "experts_up_codes_wgmma",
        (
            *defines(shape, shape.gate_up_stored),
            *activation_defines(activation),
            f"GATED={int(activation.is_gated)}",
            f"INTERLEAVED={int(activation.is_interleaved)}",
            f"HAS_BIAS={int(shape.has_gate_up_bias)}",
            f"KEEPS_GATE_UP={int(shape.keeps_gate_up)}",
            f"SCALED_TOKENS={int(shape.scales_tokens)}",
            f"TURNS_OUTPUT={int(shape.turns_intermediate)}",
        ),
    )


@functools.cache
def _prepared(shape: TileShape, device: int) -> tuple[Kernel, tuple[int, int], CodedTiling, RowOrder]:
    """The kernel, its grid, its tiles, and the order of the rows of a stage."""
    tiling = tiling_of(shape, shape.gate_up_stored)
    run = kernel(
        variant(shape),
        "experts_up_codes_wgmma",
        device,
        shared_bytes=tiling.shared_bytes,
        dependent=True,
        tensor_maps=shape.gate_up_stored.maps,
    )
    is_gated, is_interleaved = shape.activation.is_gated, shape.activation.is_interleaved
    return run, grid(device), tiling, RowOrder(2 if is_gated else 1, is_interleaved)


def experts_up_codes_wgmma(
    hidden_states: torch.Tensor,
    codes: torch.Tensor,
    scales: Scales,
    pairs: Slots,
    shape: TileShape,
    bias: torch.Tensor | None = None,
    gate_up: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[T * K, shape.intermediate_columns]`` of ``act(gate) * up``, rounded once; rows in expert order, undefined past
    the last slot. Where ``shape.turns_intermediate`` they are turned.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned.
        codes: of gate_up_proj, uint8 ``[E, 2 I, row bytes]``, or ``[E, I, row bytes]`` of an ungated activation;
            contiguous, 16-byte aligned.
        scales: what belongs to them.
        pairs: the sorted pairs; takes its first ticket counter.
        bias: ``[E, 2 I]`` or ``[E, I]``, contiguous, where ``shape.has_gate_up_bias``, else None.
        gate_up: ``[T * K, 2 I]`` (``[T * K, I]``), written where ``shape.keeps_gate_up``, else None.
        out: what is returned, contiguous, 16-byte aligned; None: new memory.
    """
    device = hidden_states.device.index
    sizes = pairs.token_of_slot.shape[0], shape.intermediate_columns
    intermediate = hidden_states.new_empty(sizes) if out is None else out
    run, blocks, tiling, order = _prepared(shape, device)
    rows, factors = operand_rows(hidden_states, pairs, narrowed=shape.scales_tokens)
    run(
        blocks,
        tiling.threads,
        current_stream(device),
        *coded_maps(codes, scales, order, tiling),
        rows.data_ptr(),
        pairs.expert_offsets.data_ptr(),
        pairs.token_of_slot.data_ptr(),
        pairs.tickets.data_ptr(),
        intermediate.data_ptr(),
        scales.row_scales_address,
        0 if bias is None else bias.data_ptr(),
        0 if gate_up is None else gate_up.data_ptr(),
        0 if factors is None else factors.data_ptr(),
    )
    return intermediate
