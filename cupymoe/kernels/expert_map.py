"""What kernels that read ``top_k_index`` are compiled for where an expert map comes with it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cupymoe.kernels.dtypes import INDEX_TYPES


class MapKind(NamedTuple):
    """Of ``expert_map``, which has the place of each of all experts among those that are here."""

    dtype: torch.dtype
    """int32 or int64."""
    global_experts: int
    """How many entries it has."""

    def defines(self) -> tuple[str, ...]:
        """The macros of ``cuda_src/common/pairs.cuh``."""
        return (
            "HAS_EXPERT_MAP=1",
            f"EXPERT_MAP={INDEX_TYPES[self.dtype]}",
            f"GLOBAL_EXPERTS={self.global_experts}",
        )


def map_kind(expert_map: torch.Tensor | None) -> MapKind | None:
    """Of a map ``[global experts]``, if there is one."""
    return None if expert_map is None else MapKind(expert_map.dtype, expert_map.shape[0])


def map_defines(kind: MapKind | None) -> tuple[str, ...]:
    """Without a map there are none, so that kernels are those that calls without one always had."""
    return () if kind is None else kind.defines()
