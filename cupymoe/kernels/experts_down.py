"""Launcher of ``cuda_src/experts_down.cu``: down projection of every slot."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import SCALARS, current_stream
from cupymoe.kernels.expert_stream import Shape, Workspace, num_blocks
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel


def variant(shape: Shape) -> Variant:
    """The compilation for one shape."""
    return Variant(
        "experts_down",
        (*shape.defines(), *shape.regime.down.defines(), f"SLOT_SCALAR={SCALARS[shape.slot_dtype]}"),
    )


@functools.cache
def _kernel(shape: Shape, device: int) -> Kernel:
    shared_bytes = shape.regime.down.shared_bytes(shape.regime.tokens)
    return kernel(variant(shape), "experts_down", device, shared_bytes=shared_bytes, dependent=True)


def experts_down(down_proj: torch.Tensor, top_k_index: torch.Tensor, shape: Shape, workspace: Workspace) -> None:
    """Write the experts' outputs, not yet weighted, into the workspace."""
    device = down_proj.device.index
    _kernel(shape, device)(
        (num_blocks(device), 1),
        shape.regime.down.threads,
        current_stream(device),
        workspace.intermediate,
        down_proj.data_ptr(),
        top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.num_chunks,
        workspace.expert_output,
        top_k_index.numel(),
    )
