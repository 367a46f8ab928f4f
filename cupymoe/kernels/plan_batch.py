"""Launchers of ``cuda_src/plan_batch.cu``: where the rows that count lie in a batch of the experts.

Oracle: the same by ``torch.cumsum``, in ``tests/kernels/test_plan_batch.py``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.arch import Arch
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel
from cupymoe.kernels.sort_by_expert import TICKETS
from cupymoe.kernels.stream_workspace import Workspace

THREADS = 128


class BatchSlots(NamedTuple):
    """The rows that count of a batch ``[E, max_tokens]``, one after the other; what the tiles take for sorted pairs.

    Of two for one batch, each for a cut of the tiles, one has them all and the other none.
    """

    expert_offsets: torch.Tensor
    """``[E + 1]`` int32: first slot of each expert; the last is the number of slots."""
    token_of_slot: torch.Tensor
    """``[E * max_tokens]`` int32: the row of each slot; undefined from ``expert_offsets[E]`` on. Neighbours among an
    expert's slots are neighbours as rows, too."""
    tickets: torch.Tensor
    """``[TICKETS]`` int32 zeros, as those of :class:`cupymoe.kernels.sort_by_expert.SortedPairs`."""


def variant(num_experts: int) -> Variant:
    """The compilation for one number of experts."""
    defines = f"NUM_EXPERTS={num_experts}", f"TICKETS={TICKETS}", f"BLOCK_THREADS={THREADS}"
    return Variant("plan_batch", defines)


@functools.cache
def _kernel(entry: str, num_experts: int, device: int, arch: Arch | None = None) -> Kernel:
    return kernel(variant(num_experts), entry, device, dependent=True, arch=arch)


def plan_batch(
    expert_num_tokens: torch.Tensor, max_tokens: int, many_from: int | None = None
) -> tuple[BatchSlots, ...]:
    """The slots of a batch: one plan, or two, the first of which has them where they are few and the second where they
    are many.

    Args:
        expert_num_tokens: ``[E]`` int32, contiguous: how many rows of each expert count; taken as 0 where negative, and
            as ``max_tokens`` where more.
        max_tokens: rows of an expert, those that don't count too.
        many_from: how many slots an expert has on average, from which on they are many; None: there is one plan.
    """
    device, num_experts = expert_num_tokens.get_device(), len(expert_num_tokens)
    plans = 1 if many_from is None else 2
    # One allocation, as of the sorted pairs.
    sizes = [plans * (num_experts + 1), num_experts * max_tokens, plans * TICKETS]
    expert_offsets, row_of_slot, tickets = expert_num_tokens.new_empty(sum(sizes)).split_with_sizes(sizes)
    _kernel("plan_batch", num_experts, device)(
        (num_experts, 1),
        THREADS,
        current_stream(device),
        expert_num_tokens.data_ptr(),
        expert_offsets.data_ptr(),
        row_of_slot.data_ptr(),
        tickets.data_ptr(),
        max_tokens,
        plans,
        many_from or 0,
    )
    of_each = zip(expert_offsets.chunk(plans), tickets.chunk(plans), strict=True)
    return tuple(BatchSlots(offsets, row_of_slot, its_tickets) for offsets, its_tickets in of_each)


def plan_batch_chunks(
    expert_num_tokens: torch.Tensor, max_tokens: int, tokens: int, workspace: Workspace, arch: Arch | None = None
) -> None:
    """Write chunks of at most ``tokens`` rows into the workspace, their number, and the row of each slot, itself.

    Args:
        expert_num_tokens, max_tokens: as of :func:`plan_batch`.
        tokens: a multiple of 8.
        workspace: of the call.
        arch: as in :func:`cupymoe.kernels.jit.kernel`.
    """
    device, num_experts = expert_num_tokens.get_device(), len(expert_num_tokens)
    _kernel("plan_batch_chunks", num_experts, device, arch)(
        (num_experts, 1),
        THREADS,
        current_stream(device),
        expert_num_tokens.data_ptr(),
        workspace.chunks,
        workspace.pair_of_slot,
        workspace.num_chunks,
        max_tokens,
        tokens,
    )
