"""From codes and scales to weights: all at once, or a few experts when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cupymoe.kernels.dtypes import SCALARS
from cupymoe.weights.format import WeightFormat
from cupymoe.weights.pack import unpack_codes

Buffers = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Codes, scales, zeros and row_scales of a :class:`cupymoe.QuantizedWeight`."""


def some_of(buffers: Buffers, experts: slice) -> Buffers:
    """Those of some experts, views."""
    codes, *factors = buffers
    scales, zeros, row_scales = (None if factor is None else factor[experts] for factor in factors)
    return codes[experts], scales, zeros, row_scales


@functools.lru_cache(maxsize=256)
def _cached_values(format: WeightFormat, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(format.values, dtype=dtype, device=device)


def values_on(format: WeightFormat, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of every code. Kept by device: a copy from the host would wait for the GPU, and can't be captured in a graph."""
    values = _cached_values(format, dtype, device)
    if type(values) is not torch.Tensor:  # made under a mode of torch whose tensors live no longer than that
        _cached_values.cache_clear()
    return values


def _of_codes(of_groups: torch.Tensor, format: WeightFormat, k: int) -> torch.Tensor:
    """``[E, n, G]`` -> ``[E, n, k]``: each code's, of what belongs to groups, the last of which may be cut."""
    assert format.group is not None
    return of_groups.repeat_interleave(format.group, dim=-1)[..., :k]


def dequantize(format: WeightFormat, k: int, buffers: Buffers, dtype: torch.dtype) -> torch.Tensor:
    """``[E, n, k]`` in ``dtype``, of the buffers of a weight of depth ``k``.

    Exact in float64. In another dtype, products of value and scales are computed in float32 and rounded once more, to
    that dtype.
    """
    codes, scales, zeros, row_scales = buffers
    work, groups = torch.float64 if dtype == torch.float64 else torch.float32, format.groups(k)
    weight = values_on(format, work, codes.device)[unpack_codes(format, codes, k).int()]
    if zeros is not None:
        weight -= _of_codes(zeros[..., :groups].to(work), format, k)
    if scales is not None:
        weight *= _of_codes(scales[..., :groups].to(work), format, k)
    if row_scales is not None:
        weight *= row_scales.to(work).unsqueeze(-1)
    return weight.to(dtype)


def _fastest(dtype: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    """:func:`dequantize`, or on CUDA the kernel that gives its bits; that has no float64."""
    if device.type != "cuda" or dtype not in SCALARS:
        return dequantize
    from cupymoe.kernels import dequantize as kernel

    return kernel.dequantize


@dataclass(frozen=True)
class WeightOnDemand:
    """A quantised weight for whoever computes with weights as they are, an expert or a few of them at a time.

    It has what the products of :mod:`cupymoe.reference` and :mod:`cupymoe.backends.row_products` ask of a tensor
    ``[E, out, in]``, and is never dequantised as a whole.
    """

    format: WeightFormat
    shape: tuple[int, int, int]
    """``(E, out, in)``"""
    buffers: Buffers
    dtype: torch.dtype
    """That of what it is multiplied with, and of what is added to it."""
    is_transposed: bool = False
    """Whether the codes are those of ``[E, in, out]``."""

    def experts(self, some: slice, dtype: torch.dtype) -> torch.Tensor:
        """These experts' weights, ``[E', out, in]``; see :func:`dequantize`."""
        k = self.shape[1 if self.is_transposed else 2]
        weight = _fastest(dtype, self.buffers[0].device)(self.format, k, some_of(self.buffers, some), dtype)
        return weight.transpose(1, 2) if self.is_transposed else weight

    def __getitem__(self, expert: int) -> torch.Tensor:
        """One expert's weight, ``[out, in]``, exact in float64."""
        return self.experts(slice(expert, expert + 1), torch.float64)[0]

    def transpose(self, first: int, second: int) -> WeightOnDemand:
        """``[E, in, out]``; of no other two dimensions."""
        assert (first, second) == (1, 2)
        num_experts, out_size, in_size = self.shape
        return replace(self, shape=(num_experts, in_size, out_size), is_transposed=not self.is_transposed)

    def is_contiguous(self) -> bool:
        """Whether what belongs to it, an adapter, is laid out as ``[E, out, in]``, and not as its transpose."""
        return not self.is_transposed

    def new_empty(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Memory on its device, in its dtype."""
        return self.buffers[0].new_empty(shape, dtype=self.dtype)
