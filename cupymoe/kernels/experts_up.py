"""Launcher of ``cuda_src/experts_up.cu``: gate_up projection and activation of every slot."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_stream import Shape, Workspace, num_blocks
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel


def variant(shape: Shape) -> Variant:
    """The compilation for one shape."""
    return Variant(
        "experts_up", (*shape.defines(), *shape.regime.up.defines(), f"ACTIVATION={shape.activation.function}")
    )


@functools.cache
def _kernel(shape: Shape, device: int) -> Kernel:
    shared_bytes = shape.regime.up.shared_bytes(shape.regime.tokens)
    return kernel(variant(shape), "experts_up", device, shared_bytes=shared_bytes, dependent=True)


def experts_up(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    shape: Shape,
    workspace: Workspace,
) -> None:
    """Write ``act(gate) * up`` of every slot, rounded once, into the workspace."""
    device = hidden_states.device.index
    _kernel(shape, device)(
        (num_blocks(device), 1),
        shape.regime.up.threads,
        current_stream(device),
        hidden_states.data_ptr(),
        gate_up_proj.data_ptr(),
        top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.num_chunks,
        workspace.slot_of_pair,
        workspace.intermediate,
        top_k_index.numel(),
    )
