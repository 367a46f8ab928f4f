"""Launcher of ``cuda_src/plan_experts.cu``: which tokens of which expert make a chunk."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import INDEX_TYPES, current_stream
from cupymoe.kernels.expert_stream import MAX_PAIRS, Workspace
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

WARPS = 32


def variant(index_dtype: torch.dtype, num_experts: int, tokens: int) -> Variant:
    """The compilation for one number of experts and of tokens in a chunk."""
    return Variant(
        "plan_experts",
        (
            f"INDEX={INDEX_TYPES[index_dtype]}",
            f"NUM_EXPERTS={num_experts}",
            f"TOKENS={tokens}",
            f"WARPS={WARPS}",
            f"PAIRS_PER_LANE={MAX_PAIRS // (WARPS * 32)}",
        ),
    )


@functools.cache
def _kernel(index_dtype: torch.dtype, num_experts: int, tokens: int, device: int) -> Kernel:
    return kernel(variant(index_dtype, num_experts, tokens), "plan_experts", device, dependent=True)


def plan_experts(top_k_index: torch.Tensor, num_experts: int, tokens: int, workspace: Workspace) -> None:
    """Write chunks of at most ``tokens`` slots, and the slots of ``top_k_index`` ``[T, K]``, into the workspace."""
    device = top_k_index.device.index
    _kernel(top_k_index.dtype, num_experts, tokens, device)(
        (1, 1),
        WARPS * 32,
        current_stream(device),
        top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.slot_of_pair,
        workspace.num_chunks,
        top_k_index.numel(),
    )
