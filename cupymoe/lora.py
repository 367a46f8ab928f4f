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


def packed_shapes(weight: torch.Tensor, rank: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of ``a`` and ``b`` of a weight's adapter of this rank, as :class:`Packed` has them."""
    num_experts, out_size, in_size = weight.shape
    rank = padded_rank(rank)
    return (num_experts, rank, in_size), (num_experts, out_size, rank)


def is_packed(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> bool:
    """Whether ``scale * factor``, packed to a shape for a weight, would be the factor again."""
    in_memory = factor if weight.is_contiguous() else factor.transpose(1, 2)
    return scale == 1.0 and factor.dtype == weight.dtype and tuple(factor.shape) == shape and in_memory.is_contiguous()


def _packed(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> torch.Tensor:
    if is_packed(factor, shape, weight, scale):
        return factor
    scaled = factor if scale == 1.0 else factor.to(torch.promote_types(weight.dtype, torch.float32)) * scale
    output = pad(scaled.to(weight.dtype), (0, shape[2] - factor.shape[2], 0, shape[1] - factor.shape[1]))
    return output.contiguous() if weight.is_contiguous() else output.transpose(1, 2).contiguous().transpose(1, 2)


class LowRank(NamedTuple):
    """What an adapter adds to a weight ``[E, out, in]``: ``scaling * b[e] @ a[e]``.

    Each factor is of the weight's dtype or of float32, and of any strides. It is used in the weight's dtype, to which
    ``a`` and ``scaling * b`` are rounded once in each call; unless it is packed already: in the weight's dtype, of a
    rank that is a multiple of 16, contiguous (or its ``transpose(1, 2)``, as the weight is), and ``b`` with scaling 1.
    """

    a: torch.Tensor
    """``[E, r, in]``"""
    b: torch.Tensor
    """``[E, out, r]``"""
    scaling: float = 1.0

    def packed(self, weight: torch.Tensor) -> Packed:
        """For products beside those with a weight; in plain torch, and differentiable. A factor that is packed already
        is taken as it is."""
        a_shape, b_shape = packed_shapes(weight, self.a.shape[1])
        return Packed(_packed(self.a, a_shape, weight, 1.0), _packed(self.b, b_shape, weight, self.scaling), self)


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
