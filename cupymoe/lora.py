"""LoRA on the experts without merging: ``x W^T + (x A^T) B^T``, forward and backward, behind ``cupymoe.lora_experts``.

Merged weights ``W + B A`` are 1.5 GB a layer at Gemma 4's sizes, to be written and read again for every call. Here the
low-rank products are added to those with the weights, in expert order: on the way
(:mod:`cupymoe.backends.fused_adapters`) or afterwards (:mod:`cupymoe.backends.expert_rows`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from cupymoe.kernels.lora_shrink import RANK_MULTIPLE


def padded_rank(rank: int) -> int:
    """The least rank that the kernels take and that holds this one."""
    return max(-(-rank // RANK_MULTIPLE), 1) * RANK_MULTIPLE


class LowRank(NamedTuple):
    """What an adapter adds to a weight ``[E, out, in]``: ``scaling * b[e] @ a[e]``.

    Each factor is of the weight's dtype or of float32, and of any strides. It is used in the weight's dtype, to which
    ``a`` and ``scaling * b`` are rounded once in each call.
    """

    a: torch.Tensor
    """``[E, r, in]``"""
    b: torch.Tensor
    """``[E, out, r]``"""
    scaling: float = 1.0

    def packed(self, weight: torch.Tensor) -> Packed:
        """For products beside those with a weight; in plain torch, and differentiable."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        missing = padded_rank(self.a.shape[1]) - self.a.shape[1]
        a = pad(self.a.to(weight.dtype), (0, 0, 0, missing))
        b = pad((self.b.to(wide) * self.scaling).to(weight.dtype), (0, missing))
        if weight.is_contiguous():
            return Packed(a.contiguous(), b.contiguous(), self)
        a, b = (factor.transpose(1, 2).contiguous().transpose(1, 2) for factor in (a, b))
        return Packed(a, b, self)


class Packed(NamedTuple):
    """An adapter as products take it: in the dtype of the weight, laid out as it, and padded with zeros."""

    a: torch.Tensor
    """``[E, R, in]``, where R is :func:`padded_rank`."""
    b: torch.Tensor
    """``[E, out, R]``, the scaling in it."""
    given: LowRank
    """What was packed."""

    def transposed(self) -> Packed:
        """What is added to the transposed weight."""
        return Packed(self.b.transpose(1, 2), self.a.transpose(1, 2), self.given)
