"""Launcher of ``cuda_src/plan_chunks.cu``: the chunks of pairs that are sorted already."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.arch import Arch
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.stream_workspace import Workspace

WARPS = 8


def variant(num_experts: int, tokens: int) -> Variant:
    """The compilation for one number of experts, and of tokens in a chunk."""
    return Variant("plan_chunks", (f"NUM_EXPERTS={num_experts}", f"TOKENS={tokens}", f"WARPS={WARPS}"))


@functools.cache
def _kernel(num_experts: int, tokens: int, device: int, arch: Arch | None) -> Kernel:
    return kernel(variant(num_experts, tokens), "plan_chunks", device, dependent=True, arch=arch)


def plan_chunks(expert_offsets: torch.Tensor, tokens: int, workspace: Workspace, arch: Arch | None = None) -> None:
    """Write chunks of at most ``tokens`` slots into the workspace, and their number.

    Args:
        expert_offsets: ``[E + 1]`` int32 of :class:`SortedPairs`.
        tokens: a multiple of 8.
        workspace: of the call.
        arch: as in :func:`cupymoe.kernels.jit.kernel`.
    """
    device = expert_offsets.get_device()
    _kernel(len(expert_offsets) - 1, tokens, device, arch)(
        (1, 1),
        WARPS * 32,
        current_stream(device),
        expert_offsets.data_ptr(),
        workspace.chunks,
        workspace.num_chunks,
    )
