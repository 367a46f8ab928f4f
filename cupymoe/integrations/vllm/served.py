"""Which of vLLM's layers cupymoe computes, by vLLM's settings, and what the log says of each kind."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from cupymoe.activation import MoEActivation
from cupymoe.backends import INVARIANT, ExpertsCall, registry, serving
from cupymoe.integrations.vllm.activations import activation_of
from cupymoe.weights.format import PLAIN

ENVIRONMENT = "CUPYMOE_VLLM"
"""The variable that must be 1."""
FP8_ENVIRONMENT = "CUPYMOE_VLLM_FP8"
"""The variable that must be 1 too for layers whose hidden states vLLM would round to FP8."""
LOGGER = "vllm.plugins.cupymoe"
"""Below vLLM's own, so that its handlers show what is said."""


def variable(name: str) -> bool:
    """Whether a variable of the environment is 1.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    given = os.environ.get(name, "")
    if given not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {given!r}")
    return given == "1"


def takes_fp8() -> bool:
    """Whether the user has asked for FP8 layers beside hidden states of 16 bits, where vLLM would round these too.

    Raises:
        ValueError: see :func:`variable`.
    """
    return variable(FP8_ENVIRONMENT)


def numerics() -> str:
    """What vLLM's own setting asks of the bits of an output."""
    from vllm import envs

    return INVARIANT if envs.VLLM_BATCH_INVARIANT else "fast"


def sizes(moe: Any) -> tuple[int, int, int, int]:
    """Experts here, experts of a token, hidden size, and intermediate size here, where tensor parallelism cuts it."""
    return moe.num_local_experts, moe.experts_per_token, moe.hidden_dim, moe.intermediate_size_per_partition


def slow_reason(moe: Any, activation: MoEActivation, numerics: str, weight_format: str = PLAIN) -> str | None:
    """Why none of the fast backends serves a layer, of few tokens or of many; None if one does."""
    num_experts, top_k, hidden_size, intermediate_size = sizes(moe)
    for num_tokens in (1, 8192):
        call = ExpertsCall(
            torch.device(moe.device),
            moe.in_dtype,
            activation,
            num_tokens,
            top_k,
            num_experts,
            hidden_size,
            intermediate_size,
            aligned_hidden_states=True,
            aligned_weights=True,
            has_bias=moe.has_bias,
            weight_format=weight_format,
            numerics=numerics,
        )
        if serving(call).is_slow:
            fast = [backend for backend in registry().values() if not backend.is_slow]
            reasons = {f"{backend.name}: {backend.unsupported_reason(call)}" for backend in fast}
            return f"only a slow backend serves {num_tokens} tokens ({'; '.join(sorted(reasons))})"
    return None


def refusal(moe: Any, experts: type[Any], weight_format: str = PLAIN) -> str | None:
    """Why cupymoe doesn't compute a layer; None if it does.

    Args:
        moe: vLLM's ``FusedMoEConfig``.
        experts: the class that would compute it.
        weight_format: of both weights.
    """
    if moe.moe_backend != "auto":
        return f"moe_backend is {moe.moe_backend!r}, not 'auto'"
    if moe.has_bias and weight_format != PLAIN:
        return "quantised weights are served without biases"
    if moe.has_bias and moe.moe_parallel_config.use_batched_activation_format:
        return "the batched activation format is served without biases"
    try:
        activation = activation_of(moe)
    except ValueError as error:
        return str(error)
    if reason := slow_reason(moe, activation, numerics(), weight_format):
        return reason
    is_served, reason = experts.is_supported_config(experts, moe, None, None, experts.activation_format())
    return None if is_served else reason


_said: set[str] = set()


def say(layer_name: str, moe: Any, weights: str, reason: str | None) -> None:
    """Log once for each kind of layer whether it is taken, or why not.

    Args:
        layer_name: of the layer that is being made.
        moe: vLLM's ``FusedMoEConfig``.
        weights: what the weights are, behind a comma; empty of plain ones.
        reason: why the layer is not taken; None if it is.
    """
    num_experts, _, hidden_size, intermediate_size = sizes(moe)
    here = f"{num_experts} of {moe.num_experts} experts, {hidden_size} to {intermediate_size}, {moe.activation.value}"
    taken = "cupymoe computes" if reason is None else "cupymoe does not compute"
    message = f"{taken} {here}, {moe.in_dtype}{weights}" + ("" if reason is None else f": {reason}")
    if message not in _said:
        _said.add(message)
        logging.getLogger(LOGGER).info("%s, and every layer like it: %s", layer_name, message)
