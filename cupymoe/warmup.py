"""Compiling and loading ahead of the first call, so that neither a user nor a CUDA-graph capture waits for NVRTC."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cupymoe.config import Gemma4MoEConfig
from cupymoe.integrations import is_set_to_cupymoe
from cupymoe.modules import Gemma4Experts, Gemma4MoE, Gemma4Router

NUM_TOKENS = (1, 64, 256, 384, 1024, 4096)
"""One number of tokens of each regime, at Gemma 4's top 8."""


def warmup(
    target: nn.Module | Gemma4MoEConfig,
    num_tokens: Iterable[int] = NUM_TOKENS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> None:
    """Compile and load the kernels that calls of these numbers of tokens will use, by making such calls.

    Every pair of a call is masked, so no weight is read; layers of one shape are called once.

    Args:
        target: a module that holds ``Gemma4Router``, ``Gemma4Experts``, or transformers' experts with
            ``experts_implementation="cupymoe"``; or the sizes of a mixture whose weights are not there yet, for which
            uninitialised ones are allocated meanwhile (1.5 GB for Gemma 4 26B-A4B).
        num_tokens: each at least 1.
        dtype, device: of the future weights, where ``target`` gives sizes.

    Raises:
        TypeError, ValueError: ``target`` is neither, or holds no mixture; ``num_tokens`` has no positive number.
    """
    counts = sorted(set(num_tokens))
    if not counts or counts[0] < 1:
        raise ValueError(f"num_tokens must be positive numbers, got {counts}")
    if isinstance(target, Gemma4MoEConfig):
        with torch.device("meta"):
            target = Gemma4MoE(target).to(dtype)
        target = target.to_empty(device=device)
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module or a Gemma4MoEConfig, got {type(target).__name__}")
    found = {_kind(module): module for module in target.modules() if _is_mixture(module)}
    if not found:
        raise ValueError(
            f"target must hold a Gemma4Router, a Gemma4Experts or experts set to cupymoe; {type(target).__name__} "
            "holds none"
        )
    with torch.inference_mode():
        for module in found.values():
            for count in counts:
                _call(module, count)


def _is_mixture(module: nn.Module) -> bool:
    return isinstance(module, Gemma4Router | Gemma4Experts) or (is_set_to_cupymoe(module) and _has_experts(module))


def _has_experts(module: nn.Module) -> bool:
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(module, "gate_up_proj")


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """Modules of one kind need the same kernels."""
    parameters = ((name, p.shape, p.dtype, p.device) for name, p in module.named_parameters())
    return (type(module), *parameters)


def _call(module: Any, num_tokens: int) -> None:
    if isinstance(module, Gemma4Router):
        module.route(module.scale.new_zeros((num_tokens, module.config.hidden_size)))
        return
    num_experts, hidden_size, _ = module.down_proj.shape
    config = module.config
    top_k = config.top_k_experts if hasattr(config, "top_k_experts") else config.num_experts_per_tok
    hidden_states = module.down_proj.new_zeros((num_tokens, hidden_size))
    index = torch.full((num_tokens, top_k), num_experts, device=hidden_states.device)
    module(hidden_states, index, torch.zeros(index.shape, device=hidden_states.device))
