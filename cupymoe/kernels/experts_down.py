"""Launcher of ``cuda_src/experts_down.cu``: down projection of every slot."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.expert_stream import Shape, grid
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.stream_workspace import Workspace


def variant(shape: Shape) -> Variant:
    """The compilation for one shape."""
    return Variant(
        "experts_down",
        (
            *shape.defines(),
            *shape.down.defines(),
            *shape.down_stored.defines(),
            f"SLOT_SCALAR={SCALARS[shape.slot_dtype]}",
            f"TRANSPOSED={int(shape.down_transposed)}",
            f"HAS_BIAS={int(shape.has_down_bias)}",
            f"LOW_RANK={shape.down_rank}",
        ),
    )


@functools.cache
def _prepared(shape: Shape, device: int) -> tuple[Kernel, tuple[int, int], int]:
    """The kernel, its grid and the threads of a block."""
    tile = shape.down
    shared_bytes = shape.down_shared_bytes
    run = kernel(variant(shape), "experts_down", device, shared_bytes=shared_bytes, dependent=True, arch=shape.arch)
    return run, grid(tile, device), tile.threads


def experts_down(
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor | None,
    shape: Shape,
    workspace: Workspace,
    bias: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    row_scales: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Write the experts' outputs, not yet weighted, into the workspace.

    Args:
        down_proj: ``[E, H, I]``, 16-byte aligned; contiguous, or where ``shape.down_transposed`` the
            ``transpose(1, 2)`` of a contiguous tensor. Where ``shape.down_stored`` is quantised its packed codes, uint8
            ``[E, H, row_bytes]``, contiguous.
        top_k_index: ``[T, K]``, contiguous, as ``experts_up`` had it in the launch just before this one, but for
            :func:`lora_shrink_chunks` between them.
        shape: of the call.
        workspace: of the call.
        bias: ``[E, H]``, contiguous, where ``shape.has_down_bias``, else None.
        factor: ``[E, H, R]``, the second of an adapter, 16-byte aligned, laid out as down_proj, where
            ``shape.down_rank``, else None; what :func:`lora_shrink_chunks` made with the first is in the workspace, and
            was the launch just before this one.
        scales, zeros, row_scales: ``[E, H, G]`` and ``[E, H]``, as those of ``experts_up``, by ``shape.down_stored``.
        expert_map: as ``experts_up`` had it.
    """
    device = down_proj.get_device()
    run, blocks, threads = _prepared(shape, device)
    run(
        blocks,
        threads,
        current_stream(device),
        workspace.intermediate,
        down_proj.data_ptr(),
        0 if top_k_index is None else top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.num_chunks,
        workspace.expert_output,
        0 if top_k_index is None else top_k_index.numel(),
        0 if bias is None else bias.data_ptr(),
        0 if factor is None else factor.data_ptr(),
        workspace.down_low,
        0 if scales is None else scales.data_ptr(),
        0 if zeros is None else zeros.data_ptr(),
        0 if row_scales is None else row_scales.data_ptr(),
        0 if expert_map is None else expert_map.data_ptr(),
    )
