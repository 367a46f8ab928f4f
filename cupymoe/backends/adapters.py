"""The low-rank adapters of a call: as they were given, and packed by kernels as the products take them.

They are packed in the forward and again in the backward, so that autograd keeps nothing but what was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cupymoe.backends import ExpertsCall, ExpertsTensors
from cupymoe.kernels.pack_adapter import Copy, has_experts_innermost, pack_adapter
from cupymoe.lora import LowRank, Packed, is_packed, packed_shapes

FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")
"""Names of :class:`ExpertsTensors`."""


def adapters_of(call: ExpertsCall, tensors: ExpertsTensors) -> tuple[LowRank | None, LowRank | None]:
    """Those of gate_up_proj and down_proj, as they were given."""
    parts = (
        (tensors.gate_up_a, tensors.gate_up_b, call.gate_up_scaling),
        (tensors.down_a, tensors.down_b, call.down_scaling),
    )
    gate_up, down = (None if a is None or b is None else LowRank(a, b, scaling) for a, b, scaling in parts)
    return gate_up, down


def packed(
    adapters: Sequence[LowRank | None], weights: Sequence[torch.Tensor], *, old_factors: bool = False
) -> list[Packed | None]:
    """Each weight's adapter, the bits of :meth:`LowRank.packed`, on CUDA and without gradients.

    All factors of up to two weights take one launch. A factor that is as it should be already is taken as it is.
    ``old_factors`` as ``old_sources`` of ``pack_adapter``.
    """
    copies: list[Copy] = []

    def of(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> torch.Tensor:
        if takes_as_it_is(factor, shape, weight, scale):
            return factor
        output = new_packed(shape, weight)
        copies.append(Copy(factor, output, scale))
        return output

    found: list[Packed | None] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if adapter is None:
            found.append(None)
            continue
        a_shape, b_shape = packed_shapes(weight, adapter.a.shape[1])
        a, b = of(adapter.a, a_shape, weight, 1.0), of(adapter.b, b_shape, weight, adapter.scaling)
        found.append(Packed(a, b, adapter))
    pack_adapter(copies, old_sources=old_factors)
    return found


def takes_as_it_is(factor: torch.Tensor, shape: tuple[int, int, int], weight: torch.Tensor, scale: float) -> bool:
    """Whether the kernels read a factor where it lies, and ``scale`` changes nothing."""
    return is_packed(factor, shape, weight, scale) and factor.data_ptr() % 16 == 0


def new_packed(shape: tuple[int, int, int], weight: torch.Tensor) -> torch.Tensor:
    """Memory for a factor as it is packed for a weight."""
    if weight.is_contiguous():
        return weight.new_empty(shape)
    num_experts, lines, columns = shape
    return weight.new_empty((num_experts, columns, lines)).transpose(1, 2)


def pack_into(copies: Sequence[Copy]) -> None:
    """What ``pack_adapter`` does, on CUDA or the CPU."""
    if all(copy.output.is_cuda for copy in copies):
        pack_adapter(copies)
        return
    for factor, output, scale in copies:
        _, rows, columns = factor.shape
        output[:, rows:].zero_()
        output[..., columns:].zero_()
        output[:, :rows, :columns].copy_(factor.float() * scale)


def new_gradient(factor: torch.Tensor) -> torch.Tensor:
    """Where a kernel stores the gradient of a factor, in the dtype of the factor.

    It has the layout of the factor, unless that has its experts innermost, as PEFT's B: whoever computes one expert at
    a time would store its elements far apart, 119 us for both weights of Gemma 4's sizes at rank 16 instead of 51. See
    :func:`lay_out_gradients`.
    """
    return factor.new_empty(factor.shape) if has_experts_innermost(factor) else torch.empty_like(factor)


def lay_out_gradients(gradients: dict[str, torch.Tensor | None], tensors: ExpertsTensors) -> None:
    """Bring what is stored in :func:`new_gradient` into the layouts of the factors, all of it in one launch.

    Args:
        gradients: by name; those of factors are replaced where their layout is another.
        tensors: of the call.
    """
    copies: dict[str, Copy] = {}
    for name in FACTORS:
        stored, factor = gradients.get(name), getattr(tensors, name)
        if stored is not None and has_experts_innermost(factor):
            copies[name] = Copy(stored, torch.empty_like(factor))
    pack_adapter([*copies.values()])
    gradients.update((name, copy.output) for name, copy in copies.items())
