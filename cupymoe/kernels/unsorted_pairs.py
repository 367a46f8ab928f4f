"""The (token, k) pairs of a call that are so few that each block of the tiles puts them in expert order for itself."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cupymoe.kernels.dtypes import INDEX_TYPES
from cupymoe.kernels.expert_map import MapKind, map_defines, map_kind

MAX_PAIRS = 128
"""No expert then has more slots than one tile, see ``cuda_src/common/tiles/inline_plan.cuh``."""


class PairsKind(NamedTuple):
    """What kernels that read the choices themselves are compiled for."""

    index_dtype: torch.dtype
    """int32 or int64."""
    top_k: int
    expert_map: MapKind | None = None

    def defines(self) -> tuple[str, ...]:
        """The macros of ``cuda_src/common/tiles/inline_plan.cuh``."""
        return (
            f"INLINE_PAIRS={MAX_PAIRS}",
            f"INDEX={INDEX_TYPES[self.index_dtype]}",
            f"TOP_K={self.top_k}",
            *map_defines(self.expert_map),
        )


class UnsortedPairs(NamedTuple):
    """Choices with what ``sort_by_expert`` takes beside them, and where the gate_up projection says which slots they
    have."""

    top_k_index: torch.Tensor
    """``[T, K]`` int32 or int64, contiguous, at most ``MAX_PAIRS``."""
    expert_map: torch.Tensor | None
    """``[global experts]`` int32 or int64, contiguous, if there is one."""
    slot_of_pair: torch.Tensor
    """``[T, K]`` int32, uninitialised before ``experts_up_wgmma``; then as of ``SortedPairs``."""

    @staticmethod
    def of(top_k_index: torch.Tensor, expert_map: torch.Tensor | None) -> UnsortedPairs:
        """With new memory for the slots."""
        return UnsortedPairs(top_k_index, expert_map, torch.empty_like(top_k_index, dtype=torch.int32))

    @property
    def kind(self) -> PairsKind:
        """What the kernels are compiled for."""
        return PairsKind(self.top_k_index.dtype, self.top_k_index.shape[1], map_kind(self.expert_map))

    def arguments(self) -> tuple[int, ...]:
        """What both projections are launched with: the choices, the map, and how many pairs there are."""
        map_address = 0 if self.expert_map is None else self.expert_map.data_ptr()
        return self.top_k_index.data_ptr(), map_address, self.top_k_index.numel()
