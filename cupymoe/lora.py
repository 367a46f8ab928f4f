"""LoRA on the experts without merging: ``x W^T + (x A^T) B^T``, forward and backward, behind ``cupymoe.lora_experts``.

Merged weights ``W + B A`` are 1.5 GB a layer at Gemma 4's sizes, to be written and read again for every call. Here the
low-rank products stand beside the grouped GEMMs, in expert order (:mod:`cupymoe.backends.expert_rows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

RANK_MULTIPLE = 8
"""Of the ranks that torch's grouped GEMM takes in bfloat16: its rows are whole 16-byte packs."""


class LowRank(NamedTuple):
    """What an adapter adds to a weight ``[E, out, in]``: ``b[e] @ a[e]``, any scaling included.

    Dtype and device are the weight's.
    """

    a: torch.Tensor
    """``[E, r, in]``"""
    b: torch.Tensor
    """``[E, out, r]``"""

    def prepared(self) -> LowRank:
        """Contiguous, with zeros up to a rank that the grouped GEMM takes; differentiable."""
        missing = -self.a.shape[1] % RANK_MULTIPLE
        if not missing:
            return LowRank(self.a.contiguous(), self.b.contiguous())
        return LowRank(pad(self.a, (0, 0, 0, missing)), pad(self.b, (0, missing)).contiguous())
