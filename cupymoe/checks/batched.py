"""Checks of a call of the experts on a batch of rows for each."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cupymoe.activation import MoEActivation
from cupymoe.checks.tensors import Description, check_floating, check_plain, check_same, check_shape, describe, passed
from cupymoe.checks.weights import as_plain, check_transposed, check_weights
from cupymoe.weights.quantized import Weight


def check_batch(
    hidden_states: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    activation: MoEActivation,
) -> None:
    """The arguments of a call of the experts on a batch of rows for each; a kind that has passed is only looked up."""
    dtype = describe("hidden_states", hidden_states).dtype
    weights = as_plain("gate_up_proj", gate_up_proj, dtype), as_plain("down_proj", down_proj, dtype)
    tensors = (hidden_states, expert_num_tokens, *weights)
    if not passed(_check_kind_of_batch, activation, tensors=tensors):
        names = ("hidden_states", "expert_num_tokens", "gate_up_proj", "down_proj")
        _check_described_batch(activation, *map(describe, names, tensors))
    for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True):
        if not weight.is_contiguous():
            check_transposed(name, weight)


@functools.lru_cache(maxsize=4096)
def _check_kind_of_batch(activation: MoEActivation, *attributes: tuple[Any, ...]) -> None:
    _check_described_batch(activation, *(Description(*each) for each in attributes))


def _check_described_batch(
    activation: MoEActivation,
    hidden_states: Description,
    expert_num_tokens: Description,
    gate_up_proj: Description,
    down_proj: Description,
) -> None:
    for name, given in (
        ("hidden_states", hidden_states),
        ("expert_num_tokens", expert_num_tokens),
        ("gate_up_proj", gate_up_proj),
        ("down_proj", down_proj),
    ):
        check_plain(name, given)
    check_shape("hidden_states", hidden_states, (None, None, None))
    check_floating("hidden_states", hidden_states)
    num_experts, _, hidden_size = hidden_states.shape
    check_shape("expert_num_tokens", expert_num_tokens, (num_experts,))
    if expert_num_tokens.dtype != torch.int32:
        raise TypeError(f"expert_num_tokens must be int32, got {expert_num_tokens.dtype}")
    check_same("expert_num_tokens", expert_num_tokens, "hidden_states", hidden_states, dtype=False)
    check_weights(activation, hidden_states, num_experts, hidden_size, gate_up_proj, down_proj)
