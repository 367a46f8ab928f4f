"""Launcher of ``cuda_src/plan_experts.cu``: which tokens of which expert make a chunk."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.arch import Arch
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import INDEX_TYPES
from cupymoe.kernels.expert_map import MapKind, map_defines, map_kind
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.stream_workspace import Workspace

WARPS = 32


def shared_bytes_of_plan(num_experts: int, num_pairs: int) -> int:
    """Of its block: counters of each warp, and 2 bytes a pair."""
    return WARPS * num_experts * 4 + WARPS * 32 * pairs_per_lane(num_pairs) * 2 + 2 * WARPS * 4


def pairs_per_lane(num_pairs: int) -> int:
    """A power of two, so that few variants serve all calls: the fewer a lane has, the sooner the plan is made."""
    return 1 << max(0, (-(-num_pairs // (WARPS * 32)) - 1).bit_length())


def variant(
    index_dtype: torch.dtype, num_experts: int, tokens: int, pairs_per_lane: int, its_map: MapKind | None = None
) -> Variant:
    """The compilation for one number of experts, of tokens in a chunk, and of pairs that a lane reads, and one kind of
    expert map."""
    return Variant(
        "plan_experts",
        (
            f"INDEX={INDEX_TYPES[index_dtype]}",
            f"NUM_EXPERTS={num_experts}",
            f"TOKENS={tokens}",
            f"WARPS={WARPS}",
            f"PAIRS_PER_LANE={pairs_per_lane}",
            *map_defines(its_map),
        ),
    )


@functools.cache
def _kernel(
    index_dtype: torch.dtype,
    num_experts: int,
    tokens: int,
    pairs_per_lane: int,
    its_map: MapKind | None,
    device: int,
    arch: Arch | None,
) -> Kernel:
    its_variant = variant(index_dtype, num_experts, tokens, pairs_per_lane, its_map)
    counters = WARPS * num_experts * 4
    return kernel(its_variant, "plan_experts", device, shared_bytes=counters, dependent=True, arch=arch)


def plan_experts(
    top_k_index: torch.Tensor,
    num_experts: int,
    tokens: int,
    workspace: Workspace,
    arch: Arch | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    """Write chunks of at most ``tokens`` slots, and the slots of ``top_k_index`` ``[T, K]``, into the workspace.

    ``arch`` is as in :func:`cupymoe.kernels.jit.kernel`, and ``expert_map`` as in
    :func:`cupymoe.kernels.sort_by_expert.sort_by_expert`.
    """
    device, num_pairs = top_k_index.get_device(), top_k_index.numel()
    lane, its_map = pairs_per_lane(num_pairs), map_kind(expert_map)
    _kernel(top_k_index.dtype, num_experts, tokens, lane, its_map, device, arch)(
        (1, 1),
        WARPS * 32,
        current_stream(device),
        top_k_index.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.slot_of_pair,
        workspace.num_chunks,
        num_pairs,
        0 if expert_map is None else expert_map.data_ptr(),
    )
