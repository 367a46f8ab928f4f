"""How much work a call is, as far as the choice of regimes and tiles goes."""

from __future__ import annotations

import functools
from typing import NamedTuple


class Load(NamedTuple):
    """The (token, k) pairs of a call, and how many of them are expected to be kept: the others are masked."""

    num_tokens: int
    top_k: int
    num_experts: int
    """How many experts' weights are here."""
    expected_pairs: int
    """Where experts are spread over several devices, most pairs may be another's."""

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(num_tokens: int, top_k: int, num_experts: int, global_num_experts: int | None = None) -> Load:
        """The load of ``[T, K]`` indices that choose evenly from ``global_num_experts``, of which ``num_experts`` are
        here; None: all are here."""
        pairs = num_tokens * top_k
        if global_num_experts is not None:
            pairs = -(-pairs * num_experts // global_num_experts)
        return Load(num_tokens, top_k, num_experts, pairs)

    @property
    def num_pairs(self) -> int:
        """All pairs, masked or not: what indices and workspaces hold."""
        return self.num_tokens * self.top_k

    @property
    def pairs_per_expert(self) -> float:
        """Kept pairs of an expert on average, by which the choices go."""
        return self.expected_pairs / max(self.num_experts, 1)
