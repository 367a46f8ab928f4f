"""Checks of a call of the experts: its tensors, the map of the experts that are here, and where the output goes."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cupymoe.activation import MoEActivation
from cupymoe.backends import check_name
from cupymoe.checks.tensors import (
    AsPlain,
    Description,
    check_floating,
    check_plain,
    check_same,
    check_shape,
    describe,
    overlap,
    passed,
)
from cupymoe.checks.weights import as_plain, check_transposed, check_weights
from cupymoe.weights.quantized import QuantizedWeight, Weight


def check_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: MoEActivation,
    backend: str,
) -> None:
    """The arguments of a call of the experts, quantised or not; a kind of call that has passed is only looked up."""
    gate_up: torch.Tensor | AsPlain
    down: torch.Tensor | AsPlain
    if isinstance(gate_up_proj, QuantizedWeight) or isinstance(down_proj, QuantizedWeight):
        dtype = describe("hidden_states", hidden_states).dtype
        gate_up, down = as_plain("gate_up_proj", gate_up_proj, dtype), as_plain("down_proj", down_proj, dtype)
    else:
        gate_up, down = gate_up_proj, down_proj
    biases = () if gate_up_bias is None and down_bias is None else (gate_up_bias, down_bias)
    tensors = (hidden_states, gate_up, down, top_k_index, top_k_weights, *biases)
    if not passed(_check_kind, activation, backend, tensors=tensors):
        _check_described(
            activation,
            backend,
            describe("hidden_states", hidden_states),
            describe("gate_up_proj", gate_up),
            describe("down_proj", down),
            describe("top_k_index", top_k_index),
            describe("top_k_weights", top_k_weights),
            None if gate_up_bias is None else describe("gate_up_bias", gate_up_bias),
            None if down_bias is None else describe("down_bias", down_bias),
        )
    if biases:
        _check_bias_layout("gate_up_bias", gate_up_bias)
        _check_bias_layout("down_bias", down_bias)
    if not gate_up.is_contiguous():
        check_transposed("gate_up_proj", gate_up)
    if not down.is_contiguous():
        check_transposed("down_proj", down)


@functools.lru_cache(maxsize=4096)
def _check_kind(activation: MoEActivation, backend: str, *attributes: tuple[Any, ...] | None) -> None:
    described: list[Any] = [None if each is None else Description(*each) for each in attributes]
    _check_described(activation, backend, *described)


def _check_described(
    activation: MoEActivation,
    backend: str,
    hidden_states: Description,
    gate_up_proj: Description,
    down_proj: Description,
    top_k_index: Description,
    top_k_weights: Description,
    gate_up_bias: Description | None = None,
    down_bias: Description | None = None,
) -> None:
    for name, given in (
        ("hidden_states", hidden_states),
        ("gate_up_proj", gate_up_proj),
        ("down_proj", down_proj),
        ("top_k_index", top_k_index),
        ("top_k_weights", top_k_weights),
    ):
        check_plain(name, given)
    check_shape("hidden_states", hidden_states, (None, None))
    check_floating("hidden_states", hidden_states)
    num_tokens, hidden_size = hidden_states.shape
    check_weights(activation, hidden_states, None, hidden_size, gate_up_proj, down_proj)
    for name, bias, weight_name, weight in (
        ("gate_up_bias", gate_up_bias, "gate_up_proj", gate_up_proj),
        ("down_bias", down_bias, "down_proj", down_proj),
    ):
        if bias is not None:
            check_plain(name, bias)
            check_shape(name, bias, tuple(weight.shape[:2]))
            check_same(name, bias, weight_name, weight, dtype=True)
    check_shape("top_k_index", top_k_index, (num_tokens, None))
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"top_k_index must be int32 or int64, got {top_k_index.dtype}")
    check_same("top_k_index", top_k_index, "hidden_states", hidden_states, dtype=False)
    check_shape("top_k_weights", top_k_weights, tuple(top_k_index.shape))
    check_floating("top_k_weights", top_k_weights)
    check_same("top_k_weights", top_k_weights, "hidden_states", hidden_states, dtype=False)
    check_name(backend)


def _check_bias_layout(name: str, bias: torch.Tensor | None) -> None:
    if bias is not None and not bias.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {bias.stride()}")


def check_global_num_experts(given: int, num_experts: int) -> None:
    """No fewer than the experts that are here."""
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"global_num_experts must be an integer or None, got {given!r}")
    if given < num_experts:
        raise ValueError(
            f"global_num_experts must be at least {num_experts}, as many as weights are given, got {given}"
        )


def check_expert_map(
    expert_map: torch.Tensor | None,
    global_num_experts: int | None,
    num_experts: int,
    hidden_states: torch.Tensor,
) -> int | None:
    """How many experts there are in all, by ``global_num_experts`` or the map, which agree; None: neither is given."""
    if global_num_experts is not None:
        check_global_num_experts(global_num_experts, num_experts)
    if expert_map is None:
        return global_num_experts
    given = describe("expert_map", expert_map)
    check_plain("expert_map", given)
    check_shape("expert_map", given, (global_num_experts,))
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_map must be int32 or int64, got {given.dtype}")
    check_same("expert_map", given, "hidden_states", describe("hidden_states", hidden_states), dtype=False)
    count = given.shape[0]
    if count < num_experts:
        raise ValueError(
            "expert_map must have an entry for each expert of the model, at least the "
            f"{num_experts} whose weights are given, got {count}"
        )
    return count


def check_out(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Memory that the output of the experts, whose tensors are ``inputs``, can be written into."""
    hidden_states = describe("hidden_states", inputs[0])
    given = describe("out", out)
    check_plain("out", given)
    check_shape("out", given, tuple(inputs[0].shape))
    check_same("out", given, "hidden_states", hidden_states, dtype=True)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, *inputs)):
        raise ValueError("out must be None where a gradient is asked for: call under torch.no_grad(), or leave it out")
    if not torch.compiler.is_compiling() and any(overlap(out, tensor) for tensor in inputs):
        raise ValueError("out must not overlap an input: each counts as all memory from its first to its last element")
