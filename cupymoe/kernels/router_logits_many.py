"""Launcher of ``cuda_src/router_logits_many.cu``. Oracle: :func:`cupymoe.reference.router_logits`, and bit for bit
:func:`cupymoe.kernels.router_logits.router_logits`."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels import router_logits
from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

# Of a warp: together as many logits as it has lanes.
_TOKENS, _EXPERTS = 4, 8
_MAX_BLOCKS = 65535
"""Of a grid in its second dimension, which is that of the tokens."""
MAX_TOKENS = _MAX_BLOCKS * router_logits.WARPS * _TOKENS


def variant(dtype: torch.dtype, hidden_size: int, eps: float) -> Variant:
    """The compilation for one router: that for few tokens, and the part of the logits that a warp has."""
    of_few = router_logits.variant(dtype, hidden_size, eps)
    return Variant("router_logits_many", (*of_few.defines, f"TOKENS={_TOKENS}", f"EXPERTS={_EXPERTS}"))


@functools.cache
def _kernel(dtype: torch.dtype, hidden_size: int, eps: float, device: int) -> Kernel:
    return kernel(variant(dtype, hidden_size, eps), "router_logits_many", device, dependent=True)


def unsupported_reason(hidden_states: torch.Tensor) -> str | None:
    """Why the kernel can't take such hidden states; None if it can."""
    dtype, hidden_size = hidden_states.dtype, hidden_states.shape[1]
    width = 16 // dtype.itemsize
    if dtype not in SCALARS:
        return f"its kernels take bfloat16, float16 and float32, not {dtype}"
    if hidden_size % width:
        return f"rows must be whole 16-byte packs: a hidden size that is a multiple of {width}, not {hidden_size}"
    if len(hidden_states) > MAX_TOKENS:
        return f"its kernels take at most {MAX_TOKENS} tokens, not {len(hidden_states)}"
    return None


def router_logits_many(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> torch.Tensor:
    """Logits ``[T, E]``, for any number of tokens with the bits that few have.

    Args:
        hidden_states: ``[T, H]``, such as :func:`unsupported_reason` has nothing against; contiguous, 16-byte aligned.
        scale: ``[H]``, likewise and of the same dtype.
        projection: ``[E, H]``, likewise.
        eps: added to the mean square.
    """
    num_tokens, hidden_size = hidden_states.shape
    num_experts = projection.shape[0]
    output = hidden_states.new_empty((num_tokens, num_experts))
    if output.numel() == 0:
        return output
    device = hidden_states.device.index
    _kernel(hidden_states.dtype, hidden_size, eps, device)(
        (-(-num_experts // _EXPERTS), -(-num_tokens // (router_logits.WARPS * _TOKENS))),
        router_logits.WARPS * 32,
        current_stream(device),
        hidden_states.data_ptr(),
        scale.data_ptr(),
        projection.data_ptr(),
        output.data_ptr(),
        num_tokens,
        num_experts,
    )
    return output
