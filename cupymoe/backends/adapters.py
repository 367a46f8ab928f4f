"""The low-rank adapters of a call: as they were given, and packed by kernels as the products take them.

They are packed in the forward and again in the backward, so that autograd keeps nothing but what was given.
"""

from __future__ import annotations

import torch

from cupymoe.backends import ExpertsCall, ExpertsTensors
from cupymoe.kernels.pack_adapter import has_experts_innermost, pack_adapter
from cupymoe.lora import LowRank, Packed, padded_rank


def adapters_of(call: ExpertsCall, tensors: ExpertsTensors) -> tuple[LowRank | None, LowRank | None]:
    """Those of gate_up_proj and down_proj, as they were given."""
    parts = (
        (tensors.gate_up_a, tensors.gate_up_b, call.gate_up_scaling),
        (tensors.down_a, tensors.down_b, call.down_scaling),
    )
    gate_up, down = (None if a is None or b is None else LowRank(a, b, scaling) for a, b, scaling in parts)
    return gate_up, down


def packed(adapter: LowRank, weight: torch.Tensor) -> Packed:
    """The bits of :meth:`LowRank.packed`, on CUDA and without gradients, in one launch for each factor.

    A factor that is as it should be already is taken as it is.
    """
    num_experts, out_size, in_size = weight.shape
    rank = padded_rank(adapter.a.shape[1])
    return Packed(
        _packed(adapter.a, (num_experts, rank, in_size), weight, 1.0),
        _packed(adapter.b, (num_experts, out_size, rank), weight, adapter.scaling),
        adapter,
    )


def _packed(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> torch.Tensor:
    transposed = not weight.is_contiguous()
    num_experts, lines, columns = shape
    in_memory = (num_experts, columns, lines) if transposed else shape
    source = factor.transpose(1, 2) if transposed else factor
    is_packed = source.shape == in_memory and source.is_contiguous() and source.data_ptr() % 16 == 0
    if is_packed and source.dtype == weight.dtype and scale == 1.0:
        return factor
    output = weight.new_empty(in_memory)
    pack_adapter(source, output, scale)
    return output.transpose(1, 2) if transposed else output


def new_gradient(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the gradient of a factor, in its dtype and layout; and where a kernel stores it first.

    These are the same unless the factor has its experts innermost, as PEFT's B: whoever computes one expert at a time
    would store its elements far apart, 119 us for both weights of Gemma 4's sizes at rank 16 instead of 51.
    """
    gradient = torch.empty_like(factor)
    return gradient, factor.new_empty(factor.shape) if has_experts_innermost(factor) else gradient
