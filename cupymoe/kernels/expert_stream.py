"""How ``cuda_src/common/expert_stream.cuh`` is set up for a call: what its kernels are compiled for, and limits."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from cupymoe.activation import MoEActivation
from cupymoe.kernels.arch import HOPPER, RESERVED_BYTES, Arch
from cupymoe.kernels.dtypes import INDEX_TYPES, SCALARS
from cupymoe.kernels.expert_map import MapKind, map_defines
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT, StoredWeight
from cupymoe.kernels.stream_regimes import Regime, Tiling

MAX_PAIRS = 8192
"""Of a call that plan_experts.cu plans; more are sorted before."""
MAX_SORTED_PAIRS = 2**22
"""Units of all chunks are counted in 32 bits."""
MAX_EXPERTS = 1024


@dataclass(frozen=True, eq=False)
class Shape:
    """What the kernels of a call are compiled for; :func:`shape_of` gives one object for one shape."""

    regime: Regime
    dtype: torch.dtype
    index_dtype: torch.dtype
    activation: MoEActivation
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    gate_up_transposed: bool = False
    """Whether gate_up_proj is ``[E, H, 2 I]`` in memory (``[E, H, I]`` if ungated), and not ``[E, 2 I, H]``."""
    down_transposed: bool = False
    """Whether down_proj is ``[E, I, H]`` in memory, and not ``[E, H, I]``."""
    has_gate_up_bias: bool = False
    has_down_bias: bool = False
    keeps_gate_up: bool = False
    """Whether the gate_up projection also stores what the activation is applied to."""
    gate_up_rank: int = 0
    """Of an adapter of gate_up_proj, a multiple of 16; 0 without one."""
    down_rank: int = 0
    arch: Arch = HOPPER
    sorted_pairs: bool = False
    """Whether sort_by_expert.cu and plan_chunks.cu make the plan, in which slots then have tokens, and not pairs."""
    gate_up_stored: StoredWeight = PLAIN_WEIGHT
    """How gate_up_proj is stored; a quantised weight is never transposed."""
    down_stored: StoredWeight = PLAIN_WEIGHT
    expert_map: MapKind | None = None
    """Of the call, where ``regime.inline_pairs``; else the launch that makes the plan has read it."""

    @property
    def up(self) -> Tiling:
        """Of the gate_up projection."""
        stored, rank = self.gate_up_stored, self.gate_up_rank
        return self._tiling(self.regime.up, self.gate_up_transposed, stored, rank, self.hidden_size, self._up_room)

    @property
    def down(self) -> Tiling:
        """Of the down projection."""
        stored, rank = self.down_stored, self.down_rank
        return self._tiling(
            self.regime.down, self.down_transposed, stored, rank, self.intermediate_size, self._down_room
        )

    def _tiling(
        self, plain: Tiling, transposed: bool, stored: StoredWeight, rank: int, depth: int, room: int
    ) -> Tiling:
        if transposed:
            return self.regime.transposed
        if stored.format is None:
            return plain
        return self.regime.tiling_of_codes(stored, depth, room, has_adapter=rank > 0)

    @property
    def shares_multiprocessor(self) -> bool:
        """Whether blocks of both GEMMs have to fit together."""
        formats = [stored.format for stored in (self.gate_up_stored, self.down_stored) if stored.format is not None]
        return self.regime.shares_multiprocessor and all(each.bits == 4 for each in formats)

    @property
    def _up_room(self) -> int:
        """For the ring of the gate_up projection; beside more of it two stages of the other would not fit."""
        whole = self.arch.shared_bytes_of_block
        return (whole * 4 // 7 if self.shares_multiprocessor else whole) - self.regime.static_bytes

    @property
    def _down_room(self) -> int:
        """The same of the down projection: what the other leaves, if they share a multiprocessor."""
        room = self.arch.shared_bytes_of_block - self.regime.static_bytes
        if self.shares_multiprocessor:
            room -= self.up_shared_bytes + self.regime.static_bytes + RESERVED_BYTES
        return room

    @property
    def up_shared_bytes(self) -> int:
        """Dynamic shared memory of a block of the gate_up projection.

        Beside a block of the down projection it takes more than half, needed or not: else two blocks of this one may
        come to share a multiprocessor, and another has none, so that the call takes half as long again.
        """
        ring = self.up.shared_bytes(self.regime.tokens, self.gate_up_stored)
        return max(ring, self.arch.shared_bytes_of_block // 2) if self.shares_multiprocessor else ring

    @property
    def down_shared_bytes(self) -> int:
        """The same of the down projection."""
        return self.down.shared_bytes(self.regime.tokens, self.down_stored)

    @property
    def slot_dtype(self) -> torch.dtype:
        """Of the experts' outputs before they are combined."""
        return torch.float32 if self.regime.fp32_slots else self.dtype

    def defines(self) -> tuple[str, ...]:
        """The macros that both GEMMs share."""
        return (
            f"SCALAR={SCALARS[self.dtype]}",
            f"INDEX={INDEX_TYPES[self.index_dtype]}",
            f"NUM_EXPERTS={self.num_experts}",
            f"TOP_K={1 if self.sorted_pairs else self.top_k}",
            f"HIDDEN={self.hidden_size}",
            f"INTERMEDIATE={self.intermediate_size}",
            f"INLINE_PAIRS={self.regime.inline_pairs}",
            f"TOKENS={self.regime.tokens}",
            f"SHARES_MULTIPROCESSOR={int(self.shares_multiprocessor)}",
            *map_defines(self.expert_map),
        )


shape_of = functools.cache(Shape)


def grid(tiling: Tiling, device: int) -> tuple[int, int]:
    """As many blocks as are resident at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count * tiling.blocks_per_sm, 1
