"""Launcher of ``cuda_src/route.cu``. Oracle: :func:`cupymoe.reference.route`."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

WARPS = 4
MAX_EXPERTS = 1024


def variant(dtype: torch.dtype, scale_dtype: torch.dtype, num_experts: int, top_k: int, renormalize: bool) -> Variant:
    """The compilation for one router."""
    return Variant(
        "route",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"SCALE_SCALAR={SCALARS[scale_dtype]}",
            f"NUM_EXPERTS={num_experts}",
            f"TOP_K={top_k}",
            f"RENORMALIZE={int(renormalize)}",
            f"WARPS={WARPS}",
        ),
    )


@functools.cache
def _kernel(
    dtype: torch.dtype, scale_dtype: torch.dtype, num_experts: int, top_k: int, renormalize: bool, device: int
) -> Kernel:
    return kernel(variant(dtype, scale_dtype, num_experts, top_k, renormalize), "route", device, dependent=True)


def route(
    router_logits: torch.Tensor, top_k: int, per_expert_scale: torch.Tensor | None, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (float32) and experts (int64) of each token, ``[T, top_k]`` both.

    Args:
        router_logits: ``[T, E]``, contiguous.
        per_expert_scale: ``[E]``, contiguous, or None.
    """
    num_tokens, num_experts = router_logits.shape
    weights = router_logits.new_empty((num_tokens, top_k), dtype=torch.float32)
    index = router_logits.new_empty((num_tokens, top_k), dtype=torch.int64)
    if num_tokens == 0:
        return weights, index
    device = router_logits.device.index
    scale_dtype = per_expert_scale.dtype if per_expert_scale is not None else router_logits.dtype
    _kernel(router_logits.dtype, scale_dtype, num_experts, top_k, renormalize, device)(
        (-(-num_tokens // WARPS), 1),
        WARPS * 32,
        current_stream(device),
        router_logits.data_ptr(),
        per_expert_scale.data_ptr() if per_expert_scale is not None else 0,
        weights.data_ptr(),
        index.data_ptr(),
        num_tokens,
    )
    return weights, index
