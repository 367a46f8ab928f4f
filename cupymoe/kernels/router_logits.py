"""Launcher of ``cuda_src/router_logits.cu``. Oracle: :func:`cupymoe.reference.router_logits`."""

from __future__ import annotations

import functools

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel

WARPS = 8
MAX_TOKENS = 32
"""Up to here it beats a launch for each step and cuBLAS; measured on an H100 (benchmarks/NOTES.md)."""
MAX_HIDDEN_SIZE = 4096


def variant(dtype: torch.dtype, hidden_size: int, eps: float) -> Variant:
    """The compilation for one router."""
    return Variant(
        "router_logits",
        (
            f"SCALAR={SCALARS[dtype]}",
            f"HIDDEN={hidden_size}",
            f"VEC={16 // dtype.itemsize}",
            f"EPS={eps!r}f",
            f"ROOT={hidden_size**-0.5!r}f",
            f"WARPS={WARPS}",
        ),
    )


@functools.cache
def _kernel(dtype: torch.dtype, hidden_size: int, eps: float, device: int) -> Kernel:
    return kernel(variant(dtype, hidden_size, eps), "router_logits", device, dependent=True)


def serves(hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor) -> bool:
    """Whether the kernel computes these; what it does not is computed by torch, to the same formula."""
    num_tokens, hidden_size = hidden_states.shape
    tensors = (hidden_states, scale, projection)
    return (
        0 < num_tokens <= MAX_TOKENS
        and hidden_size <= MAX_HIDDEN_SIZE
        and hidden_states.dtype in SCALARS
        and hidden_size % (16 // hidden_states.dtype.itemsize) == 0
        and all(t.dtype == hidden_states.dtype and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
    )


def router_logits(
    hidden_states: torch.Tensor, scale: torch.Tensor, projection: torch.Tensor, eps: float
) -> torch.Tensor:
    """Logits ``[T, E]`` of tensors that :func:`serves` takes.

    Args:
        hidden_states: ``[T, H]``.
        scale: ``[H]``.
        projection: ``[E, H]``.
        eps: added to the mean square.
    """
    num_tokens, hidden_size = hidden_states.shape
    num_experts = projection.shape[0]
    output = hidden_states.new_empty((num_tokens, num_experts))
    device = hidden_states.device.index
    _kernel(hidden_states.dtype, hidden_size, eps, device)(
        (num_experts, -(-num_tokens // WARPS)),
        WARPS * 32,
        current_stream(device),
        hidden_states.data_ptr(),
        scale.data_ptr(),
        projection.data_ptr(),
        output.data_ptr(),
        num_tokens,
    )
    return output
