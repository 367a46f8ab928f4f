"""The low-rank adapters of a call: as they were given, and packed by kernels as the products take them.

They are packed in the forward and again in the backward, so that autograd keeps nothing but what was given.
"""

from __future__ import annotations

import torch

from cupymoe.backends import ExpertsCall, ExpertsTensors
from cupymoe.kernels.pack_adapter import has_experts_innermost, pack_adapter
from cupymoe.lora import LowRank, Packed, is_packed, packed_shapes


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
    a_shape, b_shape = packed_shapes(weight, adapter.a.shape[1])
    return Packed(
        _packed(adapter.a, a_shape, weight, 1.0), _packed(adapter.b, b_shape, weight, adapter.scaling), adapter
    )


def _packed(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> torch.Tensor:
    if takes_as_it_is(factor, shape, weight, scale):
        return factor
    output = new_packed(shape, weight)
    pack_adapter(factor, output, scale)
    return output


def takes_as_it_is(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> bool:
    """Whether the kernels read a factor where it lies, and ``scale`` changes nothing."""
    return is_packed(factor, shape, weight, scale) and factor.data_ptr() % 16 == 0


def new_packed(shape: tuple[int, int, int], weight: torch.Tensor) -> torch.Tensor:
    """Memory for a factor as it is packed for a weight."""
    if weight.is_contiguous():
        return weight.new_empty(shape)
    num_experts, lines, columns = shape
    return weight.new_empty((num_experts, columns, lines)).transpose(1, 2)


def pack_into(output: torch.Tensor, factor: torch.Tensor, scale: float) -> None:
    """Write ``scale * factor``, rounded once to the dtype of ``output``, and zeros where that is larger.

    Args:
        output: ``[E, M, N]`` bfloat16, float16 or float32, on CUDA or the CPU.
        factor: ``[E, m, n]``, m <= M and n <= N, any of these dtypes.
        scale: used in float32.
    """
    if output.is_cuda:
        pack_adapter(factor, output, scale)
        return
    _, rows, columns = factor.shape
    output[:, rows:].zero_()
    output[..., columns:].zero_()
    output[:, :rows, :columns].copy_(factor.float() * scale)


def new_gradient(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the gradient of a factor, in its dtype and layout; and where a kernel stores it first.

    These are the same unless the factor has its experts innermost, as PEFT's B: whoever computes one expert at a time
    would store its elements far apart, 119 us for both weights of Gemma 4's sizes at rank 16 instead of 51.
    """
    gradient = torch.empty_like(factor)
    return gradient, factor.new_empty(factor.shape) if has_experts_innermost(factor) else gradient
