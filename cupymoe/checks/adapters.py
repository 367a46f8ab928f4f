"""Checks of an adapter, which belongs to one weight of the experts."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cupymoe.checks.tensors import Description, check_plain, check_same, check_shape, describe, passed
from cupymoe.lora import LowRank
from cupymoe.weights.quantized import Weight


def check_adapter(name: str, adapter: LowRank, weight: Weight, hidden_states: torch.Tensor) -> None:
    """An adapter of ``weight``: a number, and plain tensors of its shapes, on the device of ``hidden_states`` and each
    of its dtype or float32.

    As of the call's other tensors, a kind that has passed is only looked up.
    """
    if not isinstance(adapter, LowRank):
        raise TypeError(f"{name} must be a cupymoe.LowRank or None, got {type(adapter).__name__}")
    shape = tuple(weight.shape)
    if not passed(_check_kind_of_adapter, name, shape, tensors=(adapter.a, adapter.b, hidden_states)):
        a, b = describe(f"{name}.a", adapter.a), describe(f"{name}.b", adapter.b)
        _check_described_adapter(name, shape, a, b, describe("hidden_states", hidden_states))
    if not isinstance(adapter.scaling, int | float | torch.SymFloat) or isinstance(adapter.scaling, bool):
        raise TypeError(f"{name}.scaling must be a number, got {type(adapter.scaling).__name__}")


@functools.lru_cache(maxsize=4096)
def _check_kind_of_adapter(name: str, shape: tuple[int, ...], *attributes: tuple[Any, ...]) -> None:
    _check_described_adapter(name, shape, *(Description(*each) for each in attributes))


def _check_described_adapter(
    name: str, weight_shape: tuple[int, ...], a: Description, b: Description, base: Description
) -> None:
    num_experts, out_size, in_size = weight_shape
    check_shape(f"{name}.a", a, (num_experts, None, in_size))
    check_shape(f"{name}.b", b, (num_experts, out_size, a.shape[1]))
    for part, given in (("a", a), ("b", b)):
        check_plain(f"{name}.{part}", given)
        check_same(f"{name}.{part}", given, "hidden_states", base, dtype=False)
        if given.dtype not in (base.dtype, torch.float32):
            raise ValueError(
                f"{name}.{part} must have hidden_states's dtype {base.dtype} or torch.float32, got {given.dtype}"
            )
