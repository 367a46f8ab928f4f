"""Launcher of ``cuda_src/experts_up.cu``: gate_up projection and activation of every slot."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.activation_defines import activation_defines
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.expert_stream import Shape, Workspace, grid
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel


def variant(shape: Shape) -> Variant:
    """The compilation for one shape."""
    return Variant("experts_up", (*shape.defines(), *shape.regime.up.defines(), *activation_defines(shape.activation)))


@functools.cache
def _plan(shape: Shape, device: int) -> tuple[Kernel, tuple[int, int], int]:
    """The kernel, its grid and the threads of a block."""
    tile = shape.regime.up
    shared_bytes = tile.shared_bytes(shape.regime.tokens)
    run = kernel(variant(shape), "experts_up", device, shared_bytes=shared_bytes, dependent=True)
    return run, grid(tile, device), tile.threads


def experts_up(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    shape: Shape,
    workspace: Workspace,
) -> None:
    """Write ``act(gate) * up`` of every slot, rounded once, into the workspace."""
    device = hidden_states.get_device()
    run, blocks, threads = _plan(shape, device)
    run(
        blocks,
        threads,
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
