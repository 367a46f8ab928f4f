"""Launcher of ``cuda_src/experts_up.cu``: gate_up projection and activation of every slot."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_stream import Shape, grid
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.stream_workspace import Workspace


def variant(shape: Shape) -> Variant:
    """The compilation for one shape."""
    return Variant(
        "experts_up",
        (
            *shape.defines(),
            *shape.up.defines(),
            *shape.gate_up_stored.defines(),
            *activation_defines(shape.activation),
            f"GATED={int(shape.activation.is_gated)}",
            f"INTERLEAVED={int(shape.activation.is_interleaved)}",
            f"TRANSPOSED={int(shape.gate_up_transposed)}",
            f"HAS_BIAS={int(shape.has_gate_up_bias)}",
            f"KEEPS_GATE_UP={int(shape.keeps_gate_up)}",
            f"LOW_RANK={shape.gate_up_rank}",
        ),
    )


@functools.cache
def _prepared(shape: Shape, device: int) -> tuple[Kernel, tuple[int, int], int]:
    """The kernel, its grid and the threads of a block."""
    tile = shape.up
    shared_bytes = shape.up_shared_bytes
    run = kernel(variant(shape), "experts_up", device, shared_bytes=shared_bytes, dependent=True, arch=shape.arch)
    return run, grid(tile, device), tile.threads


def experts_up(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    top_k_index: torch.Tensor | None,
    shape: Shape,
    workspace: Workspace,
    bias: torch.Tensor | None = None,
    gate_up: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    row_scales: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Write ``act(gate) * up`` of every slot, rounded once, into the workspace.

    Args:
        hidden_states: ``[T, H]``, contiguous, 16-byte aligned.
        gate_up_proj: ``[E, 2 I, H]``, or ``[E, I, H]`` of an ungated activation; 16-byte aligned; contiguous, or where
            ``shape.gate_up_transposed`` the ``transpose(1, 2)`` of a contiguous tensor. Where
            ``shape.gate_up_stored`` is quantised its packed codes, uint8 ``[E, 2 I, row_bytes]``, contiguous.
        top_k_index: ``[T, K]``, contiguous, at least one pair; None of a batch.
        shape: of the call.
        workspace: of the call; after :func:`plan_experts`, :func:`plan_chunks` or :func:`plan_batch_chunks`, unless
            ``shape.regime.inline_pairs``.
        bias: ``[E, 2 I]`` or ``[E, I]``, contiguous, where ``shape.has_gate_up_bias``, else None.
        gate_up: ``[T * K, 2 I]`` or ``[T * K, I]``, written in expert order where ``shape.keeps_gate_up``, else None.
        factor: ``[E, 2 I, R]`` or ``[E, I, R]``, the second of an adapter, 16-byte aligned, laid out as gate_up_proj,
            where ``shape.gate_up_rank``, else None; what :func:`lora_shrink_chunks` made with the first is in the
            workspace, and was the launch just before this one.
        scales: ``[E, 2 I, G]`` where the format of ``shape.gate_up_stored`` has groups, G the number of them and padded
            to whole 16 bytes; contiguous, 16-byte aligned; else None.
        zeros: uint8, the same, where the format has zero points, else None.
        row_scales: ``[E, 2 I]`` float32, contiguous, where the format has scales of rows, else None.
        expert_map: as of ``sort_by_expert``, where ``shape.expert_map``, else None.
    """
    device = hidden_states.get_device()
    run, blocks, threads = _prepared(shape, device)
    run(
        blocks,
        threads,
        current_stream(device),
        hidden_states.data_ptr(),
        gate_up_proj.data_ptr(),
        0 if top_k_index is None else top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.num_chunks,
        workspace.slot_of_pair,
        workspace.intermediate,
        0 if top_k_index is None else top_k_index.numel(),
        0 if bias is None else bias.data_ptr(),
        0 if gate_up is None else gate_up.data_ptr(),
        0 if factor is None else factor.data_ptr(),
        workspace.gate_up_low,
        0 if scales is None else scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        0 if row_scales is None else row_scales.data_ptr(),
        0 if expert_map is None else expert_map.data_ptr(),
    )
