"""Compiling and loading ahead of the first call, so that neither a user nor a CUDA-graph capture waits for NVRTC."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cupymoe.backends.fused import stream_reason, takes_tiles
from cupymoe.config import Gemma4MoEConfig
from cupymoe.integrations import is_set_to_cupymoe
from cupymoe.kernels.expert_stream import regime
from cupymoe.kernels.expert_tiles import cut
from cupymoe.kernels.plan_experts import pairs_per_lane
from cupymoe.kernels.sort_by_expert import FEW_PAIRS, block_of
from cupymoe.modules import Gemma4Experts, Gemma4MoE, Gemma4Router

_MAX_TOKENS = 32768


def _way(num_tokens: int, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int) -> tuple[Any, ...]:
    """What the fused backend's kernels are compiled for, as far as it depends on the number of tokens."""
    num_pairs = num_tokens * top_k
    if takes_tiles(num_pairs, num_experts, hidden_size):
        return *cut(num_pairs, num_experts), block_of(num_pairs, num_experts)
    if stream_reason(num_pairs, num_experts) is not None:
        return ()  # another backend's
    chosen = regime(num_tokens, top_k, intermediate_size)
    return chosen, None if chosen.inline_pairs else pairs_per_lane(num_pairs)


def one_of_each_way(num_experts: int, top_k: int, hidden_size: int, intermediate_size: int) -> tuple[int, ...]:
    """The first number of tokens of every range that kernels are compiled for."""
    sizes = num_experts, top_k, hidden_size, intermediate_size
    counts: list[int] = []

    def stretch(num_tokens: int) -> tuple[Any, ...]:
        # Beyond few pairs the sort's blocks are again what they were before: a way may come back once.
        return *_way(num_tokens, *sizes), num_tokens * top_k > FEW_PAIRS

    def is_past(num_tokens: int) -> bool:
        return stretch(counts[-1]) != stretch(num_tokens)

    ahead = range(1, _MAX_TOKENS + 1)
    while ahead:
        counts.append(ahead[0])
        ahead = ahead[bisect.bisect_left(ahead, True, key=is_past) :]
    first_of = {_way(count, *sizes): count for count in reversed(counts)}
    return tuple(sorted(first_of.values()))


_GEMMA_4 = Gemma4MoEConfig.gemma4_26b_a4b()
NUM_TOKENS = one_of_each_way(
    _GEMMA_4.num_experts, _GEMMA_4.top_k_experts, _GEMMA_4.hidden_size, _GEMMA_4.moe_intermediate_size
)
"""At the sizes of Gemma 4 26B-A4B."""


def warmup(
    target: nn.Module | Gemma4MoEConfig,
    num_tokens: Iterable[int] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> None:
    """Compile and load the kernels that calls of these numbers of tokens will use, by making such calls.

    Every pair of a call is masked, so no expert's weight is read; layers of one kind are called once. Experts with
    PEFT's adapters are called through them. ``top_k_index`` is int64, as :func:`cupymoe.route` and transformers have
    it; calls with int32 compile kernels of their own. Nothing is compiled for modules on the CPU.

    Args:
        target: a module that holds ``Gemma4Router``, ``Gemma4Experts``, or transformers' experts with
            ``experts_implementation="cupymoe"``; or the sizes of a mixture whose weights are not there yet, for which
            uninitialised ones are allocated meanwhile (1.5 GB for Gemma 4 26B-A4B).
        num_tokens: each at least 1. None: one of every range that kernels are compiled for at the sizes of a layer,
            up to 32768.
        dtype, device: of the future weights, where ``target`` gives sizes.

    Raises:
        TypeError, ValueError: ``target`` is neither, or holds no mixture; ``num_tokens`` has no positive integer, or
            something else; ``dtype`` is none of weights, or there is no such ``device``.
    """
    counts = None if num_tokens is None else _checked(num_tokens)
    if isinstance(target, Gemma4MoEConfig):
        target = _uninitialised(target, dtype, device)
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module or a Gemma4MoEConfig, got {type(target).__name__}")
    found = {_kind(part, caller): (part, caller) for part, caller in _parts(target).items()}
    if not found:
        raise ValueError(
            f"target must hold a Gemma4Router, a Gemma4Experts or experts set to cupymoe; {type(target).__name__} "
            "holds none"
        )
    with torch.inference_mode():
        for part, caller in found.values():
            for count in counts or one_of_each_way(*_sizes(part)):
                _call(part, caller, count)


def _uninitialised(config: Gemma4MoEConfig, dtype: torch.dtype, device: torch.device | str) -> Gemma4MoE:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be there, got {device}: torch sees no CUDA device")
    with torch.device("meta"):
        moe = Gemma4MoE(config)
    for module in moe.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Not to_empty(): it begins with importing sympy, which takes longer than loading the kernels.
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))
    return moe


def _checked(num_tokens: Iterable[int]) -> list[int]:
    try:
        counts = sorted({operator.index(count) for count in num_tokens})
    except TypeError:
        raise TypeError(f"num_tokens must be an iterable of integers, (1, 64) say, got {num_tokens!r}") from None
    if not counts or counts[0] < 1:
        raise ValueError(f"num_tokens must be positive numbers, got {counts}")
    return counts


def _parts(target: nn.Module) -> dict[nn.Module, Any]:
    """Routers and experts, each with what calls of it go through: the outermost of PEFT's wrappers, or itself."""
    found: dict[nn.Module, Any] = {}
    module: Any
    for module in target.modules():  # from the outside in
        part = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if isinstance(part, Gemma4Router | Gemma4Experts) or (is_set_to_cupymoe(part) and _has_experts(part)):
            found.setdefault(part, module)
    return found


def _has_experts(module: nn.Module) -> bool:
    return isinstance(getattr(module, "down_proj", None), nn.Parameter) and hasattr(module, "gate_up_proj")


def _sizes(part: Any) -> tuple[int, int, int, int]:
    """Experts, experts of a token, hidden and intermediate size."""
    config = part.config
    if isinstance(part, Gemma4Router):
        return config.num_experts, config.top_k_experts, config.hidden_size, config.moe_intermediate_size
    num_experts, hidden_size, intermediate_size = part.down_proj.shape
    top_k = config.top_k_experts if hasattr(config, "top_k_experts") else config.num_experts_per_tok
    return num_experts, top_k, hidden_size, intermediate_size


def _kind(part: Any, caller: nn.Module) -> tuple[Any, ...]:
    """Parts of one kind need the same kernels."""
    if isinstance(part, Gemma4Router):
        settings: tuple[Any, ...] = (part.config,)
    elif isinstance(part, Gemma4Experts):
        settings = part.config, part.activation, part.backend
    else:
        from cupymoe.integrations.transformers import activation_of

        settings = _sizes(part), activation_of(part)
    parameters = ((name, p.shape, p.dtype, p.device) for name, p in caller.named_parameters())
    return (type(caller), settings, *parameters)


def _call(part: Any, caller: Any, num_tokens: int) -> None:
    if isinstance(part, Gemma4Router):
        part.route(part.scale.new_zeros((num_tokens, part.config.hidden_size)))
        return
    num_experts, top_k, hidden_size, _ = _sizes(part)
    hidden_states = part.down_proj.new_zeros((num_tokens, hidden_size))
    index = torch.full((num_tokens, top_k), num_experts, device=hidden_states.device)
    caller(hidden_states, index, torch.zeros(index.shape, device=hidden_states.device))
