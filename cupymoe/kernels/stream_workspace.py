"""The workspace of the weight stream: one allocation, in which the launches of a call hand results to each other."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cupymoe.kernels.expert_stream import Shape


class Workspace(NamedTuple):
    """Addresses in one allocation: what the launches of a call hand to each other."""

    memory: torch.Tensor
    """Keeps the allocation; torch may reuse it for later work on the same stream."""
    chunks: int
    pair_of_slot: int
    num_chunks: int
    slot_of_pair: int
    intermediate: int
    expert_output: int
    gate_up_low: int
    """``[slots, shape.gate_up_rank]``: hidden states times the first factor of gate_up_proj's adapter."""
    down_low: int
    """``[slots, shape.down_rank]``: the same of the intermediate and down_proj's."""

    def keeping(self, gate_up_low: torch.Tensor | None, down_low: torch.Tensor | None) -> Workspace:
        """The same, but that these are written where they are given: what outlives the call."""
        return self._replace(
            gate_up_low=self.gate_up_low if gate_up_low is None else gate_up_low.data_ptr(),
            down_low=self.down_low if down_low is None else down_low.data_ptr(),
        )

    def of_sorted(self, token_of_slot: torch.Tensor, slot_of_pair: torch.Tensor) -> Workspace:
        """The same, where a sort has made these two, which the caller keeps."""
        return self._replace(pair_of_slot=token_of_slot.data_ptr(), slot_of_pair=slot_of_pair.data_ptr())


def most_chunks(shape: Shape, num_pairs: int) -> int:
    """That ``num_pairs`` pairs may make."""
    return min(num_pairs, shape.num_experts + num_pairs // shape.regime.tokens)


@functools.lru_cache(maxsize=4096)
def _layout(shape: Shape, num_pairs: int) -> tuple[int, ...]:
    """Offsets of the addresses of a :class:`Workspace` past chunks, and its size; rows start on 128 bytes."""
    pair_of_slot = 16 * most_chunks(shape, num_pairs)
    num_chunks = pair_of_slot + 4 * num_pairs
    slot_of_pair = num_chunks + 4
    starts, end = [pair_of_slot, num_chunks, slot_of_pair], slot_of_pair + 4 * num_pairs
    for row_bytes in (
        shape.intermediate_size * shape.dtype.itemsize,
        shape.hidden_size * shape.slot_dtype.itemsize,
        shape.gate_up_rank * shape.dtype.itemsize,
        shape.down_rank * shape.dtype.itemsize,
    ):
        start = -(-end // 128) * 128
        starts.append(start)
        end = start + num_pairs * row_bytes
    return *starts, end


def new_workspace(like: torch.Tensor, shape: Shape, num_pairs: int) -> Workspace:
    """Memory for ``num_pairs`` pairs, uninitialised, on the device of ``like``."""
    *starts, size = _layout(shape, num_pairs)
    memory = like.new_empty(size, dtype=torch.uint8)
    base = memory.data_ptr()
    return Workspace(memory, base, *(base + start for start in starts))


def new_batch_workspace(like: torch.Tensor, shape: Shape, output: torch.Tensor) -> Workspace:
    """The same for a batch with the rows of ``output``, which is where the experts' outputs go."""
    rows = len(output)
    pair_of_slot = 16 * most_chunks(shape, rows)
    num_chunks = pair_of_slot + 4 * rows
    intermediate = -(-(num_chunks + 4) // 128) * 128
    memory = like.new_empty(intermediate + rows * shape.intermediate_size * shape.dtype.itemsize, dtype=torch.uint8)
    base = memory.data_ptr()
    addresses = base, base + pair_of_slot, base + num_chunks, 0, base + intermediate, output.data_ptr(), 0, 0
    return Workspace(memory, *addresses)
