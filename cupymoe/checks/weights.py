"""Checks of both weights of the experts: a quantised one is looked at as a plain one of the same shape."""

from __future__ import annotations

import torch

from cupymoe.activation import MoEActivation
from cupymoe.checks.tensors import AsPlain, Description, check_same, check_shape
from cupymoe.weights.quantized import QuantizedWeight, Weight


def as_plain(name: str, weight: Weight, dtype: torch.dtype) -> torch.Tensor | AsPlain:
    """A weight as the other checks look at it; the buffers of a quantised one are checked here."""
    if isinstance(weight, QuantizedWeight):
        weight.check(name)
        return AsPlain(torch.Size(weight.shape), dtype, weight.device)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a cupymoe.QuantizedWeight, got {type(weight).__name__}")
    return weight


def check_weights(
    activation: MoEActivation,
    hidden_states: Description,
    num_experts: int | None,
    hidden_size: int,
    gate_up_proj: Description,
    down_proj: Description,
) -> None:
    """``[E, 2I, H]`` and ``[E, H, I]``, by ``down_proj`` where ``num_experts`` is None."""
    check_shape("down_proj", down_proj, (num_experts, hidden_size, None))
    num_experts, _, intermediate_size = down_proj.shape
    check_shape("gate_up_proj", gate_up_proj, (num_experts, activation.input_size(intermediate_size), hidden_size))
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_same(name, weight, "hidden_states", hidden_states, dtype=True)


def check_transposed(name: str, weight: torch.Tensor | AsPlain) -> None:
    """A weight that is not contiguous is the transpose of one that is."""
    assert isinstance(weight, torch.Tensor)
    _, rows, columns = weight.shape
    usual = weight.stride() == (rows * columns, 1, rows)  # asked first, because a view takes three times as long
    if not usual and not weight.transpose(1, 2).is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, or the transpose(1, 2) of a contiguous tensor, got strides {weight.stride()}: "
            "weights are never copied"
        )
