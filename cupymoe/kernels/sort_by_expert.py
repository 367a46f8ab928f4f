"""Launcher of ``cuda_src/sort_by_expert.cu``. Oracle: ``torch.sort(stable=True)`` over the experts of the pairs."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import INDEX_TYPES
from cupymoe.kernels.expert_map import MapKind, map_defines, map_kind
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

PAIRS_PER_BLOCK = 1024
FEW_PAIRS = 8192
MAX_EXPERTS = 1024
TICKETS = 3
MAX_PAIRS = 2**31 - 1 - PAIRS_PER_BLOCK


def unsupported_reason(num_pairs: int, num_experts: int) -> str | None:
    """Why a call's pairs can't be sorted; None if they can."""
    if num_experts > MAX_EXPERTS:
        return f"the sort serves at most {MAX_EXPERTS} experts, not {num_experts}"
    if num_pairs > MAX_PAIRS:
        return f"slots are 32-bit: at most {MAX_PAIRS} (token, k) pairs, not {num_pairs}"
    return None


class SortedPairs(NamedTuple):
    """The (token, k) pairs in expert order; a slot is a place in that order, masked pairs have none."""

    expert_offsets: torch.Tensor
    """``[E + 1]`` int32: first slot of each expert; the last is the number of pairs kept."""
    token_of_slot: torch.Tensor
    """``[T * K]`` int32; undefined from ``expert_offsets[E]`` on."""
    slot_of_pair: torch.Tensor
    """``[T, K]`` int32; -1 for a masked pair."""
    tickets: torch.Tensor
    """``[TICKETS]`` int32 zeros, from each of which a later kernel counts the work that it hands out."""
    weight_of_slot: torch.Tensor | None
    """``[T * K]`` float32; undefined from ``expert_offsets[E]`` on. None where no weights were given."""


class Slots(Protocol):
    """What the tiles need to know of rows in expert order: sorted pairs, or the rows of a batch."""

    @property
    def expert_offsets(self) -> torch.Tensor:
        """See :class:`SortedPairs`."""

    @property
    def token_of_slot(self) -> torch.Tensor:
        """See :class:`SortedPairs`; as long as there may be slots."""

    @property
    def tickets(self) -> torch.Tensor:
        """See :class:`SortedPairs`."""


class Block(NamedTuple):
    """What one block sorts."""

    pairs: int
    warps: int
    """Each has a counter per expert, in at most 48 KB."""


def block_of(num_pairs: int, num_experts: int) -> Block:
    """The blocks of a call: one where that does, smaller ones where all of them together are few."""
    if num_pairs <= 128:
        return Block(128, 4)
    if num_experts > 256:
        return Block(PAIRS_PER_BLOCK, 8)
    few = PAIRS_PER_BLOCK < num_pairs <= FEW_PAIRS
    return Block(PAIRS_PER_BLOCK // 2 if few else PAIRS_PER_BLOCK, 16)


def variant(
    index_dtype: torch.dtype,
    num_experts: int,
    top_k: int,
    block: Block,
    has_weights: bool = False,
    its_map: MapKind | None = None,
) -> Variant:
    """The compilation for one number of experts and of choices, one size of a block, and one kind of expert map."""
    return Variant(
        "sort_by_expert",
        (
            f"INDEX={INDEX_TYPES[index_dtype]}",
            f"NUM_EXPERTS={num_experts}",
            f"TOP_K={top_k}",
            f"WARPS={block.warps}",
            f"PAIRS_PER_BLOCK={block.pairs}",
            f"TICKETS={TICKETS}",
            f"HAS_WEIGHTS={int(has_weights)}",
            *map_defines(its_map),
        ),
    )


@functools.cache
def _kernel(
    entry: str,
    index_dtype: torch.dtype,
    num_experts: int,
    top_k: int,
    block: Block,
    has_weights: bool,
    its_map: MapKind | None,
    device: int,
    dependent: bool,
) -> Kernel:
    its_variant = variant(index_dtype, num_experts, top_k, block, has_weights, its_map)
    return kernel(its_variant, entry, device, dependent=dependent)


def sort_by_expert(
    top_k_index: torch.Tensor,
    num_experts: int,
    top_k_weights: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> SortedPairs:
    """Stable order of the pairs by expert. One launch up to 1024 pairs, two beyond.

    Args:
        top_k_index: ``[T, K]`` int32 or int64, contiguous, at least one pair; an index outside ``[0, num_experts)``
            is masked.
        top_k_weights: ``[T, K]`` float32, contiguous, where each slot's is wanted.
        expert_map: ``[global experts]`` int32 or int64, contiguous: what each of the experts that ``top_k_index``
            chooses from is among the ``num_experts``; one outside of these masks its pairs. None: it is itself.
    """
    num_pairs, top_k = top_k_index.numel(), top_k_index.shape[1]
    device, stream = top_k_index.device.index, current_stream(top_k_index.device.index)
    block, has_weights = block_of(num_pairs, num_experts), top_k_weights is not None
    its_map = map_kind(expert_map)
    map_address = 0 if expert_map is None else expert_map.data_ptr()
    blocks, threads = -(-num_pairs // block.pairs), block.warps * 32
    # One allocation for all that is written: it lives and dies together, and later than the launch, which the next one
    # may overtake.
    sizes = [num_experts + 1, num_pairs, num_pairs, TICKETS, num_pairs * has_weights, blocks * num_experts]
    buffer = top_k_index.new_empty(sum(sizes), dtype=torch.int32)
    expert_offsets, token_of_slot, slot_of_pair, tickets, weight_bits, counts = buffer.split_with_sizes(sizes)
    weight_of_slot = weight_bits.view(torch.float32) if has_weights else None
    block_counts = 0
    if blocks > 1:
        block_counts = counts.data_ptr()
        _kernel("count_by_expert", top_k_index.dtype, num_experts, top_k, block, has_weights, its_map, device, True)(
            (blocks, 1), threads, stream, top_k_index.data_ptr(), block_counts, num_pairs, map_address
        )
    _kernel("sort_by_expert", top_k_index.dtype, num_experts, top_k, block, has_weights, its_map, device, True)(
        (blocks, 1),
        threads,
        stream,
        top_k_index.data_ptr(),
        block_counts,
        expert_offsets.data_ptr(),
        token_of_slot.data_ptr(),
        slot_of_pair.data_ptr(),
        tickets.data_ptr(),
        num_pairs,
        0 if top_k_weights is None else top_k_weights.data_ptr(),
        0 if weight_of_slot is None else weight_of_slot.data_ptr(),
        map_address,
    )
    return SortedPairs(expert_offsets, token_of_slot, slot_of_pair.view(top_k_index.shape), tickets, weight_of_slot)
