"""Compiling and loading ahead of the first call, so that neither a user nor a CUDA-graph capture waits for NVRTC."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from cupymoe.config import Gemma4MoEConfig
from cupymoe.customisation import hooks_of
from cupymoe.experts import MoEExperts, experts_per_token
from cupymoe.integrations import dtype_of, keep_of, numerics_of, sizes_of
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.model_parts import Part, is_called_with_shards, is_offloaded, loaded, parts_of, shards_as_tensors
from cupymoe.modules import Gemma4MoE, Gemma4Router
from cupymoe.parameters import DTYPES
from cupymoe.token_counts import one_of_each_way
from cupymoe.weights.format import join_formats
from cupymoe.weights.quantized import QuantizedWeight


def warmup(
    target: nn.Module | Gemma4MoEConfig,
    num_tokens: Iterable[int] | None = None,
    *,
    training: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> None:
    """Compile and load the kernels that calls of these numbers of tokens will use, by making such calls.

    With ``training`` the gradients of such calls are computed too, and dropped: those of hidden states and routing
    weights, and of the parameters that require one, PEFT's adapters among them. So a CUDA-graph capture of a whole
    training step compiles nothing either. It is an argument, because a model that is to be trained can't be told from
    one that was just made: both are in training mode, and all their parameters require gradients.

    Every pair of a call is masked, so no expert's weight is read; layers of one kind on one device are called once.
    Experts with PEFT's adapters are called through them. Weights that accelerate has offloaded are loaded by its hooks
    for each call, where the hooks say. Of experts that transformers has split (tensor or expert parallelism) each
    process calls its own shard, without the others. ``top_k_index`` is int64, as :func:`cupymoe.route` and transformers
    have it; calls with int32 compile kernels of their own. Nothing is compiled for modules on the CPU.

    Args:
        target: a module that holds ``Gemma4Router``, ``Gemma4Experts``, ``MoEExperts``, or transformers' experts with
            ``experts_implementation="cupymoe"``; or the sizes of a mixture whose weights are not there yet, for which
            uninitialised ones are allocated meanwhile (1.5 GB for Gemma 4 26B-A4B).
        num_tokens: each at least 1. None: one of every range that kernels are compiled for at the sizes of a layer,
            up to 32768.
        training: whether gradients will be asked for. Those of one layer at a time take memory meanwhile: 1.5 GB for
            Gemma 4 26B-A4B, unless its experts are frozen.
        dtype, device: of the future weights, where ``target`` gives sizes.

    Raises:
        TypeError, ValueError: ``target`` is neither, or holds no mixture; ``num_tokens`` has no positive integer, or
            something else; ``dtype`` is none of weights, or there is no such ``device``.
        ValueError: a ``MoEExperts`` has no ``top_k``.
        ValueError: a parameter of a router or of experts is on the meta device and no hook of accelerate loads it; or
            it is another DTensor, a shard of which is all that this process has, or empty, as ZeRO-3 leaves it.
    """
    counts = None if num_tokens is None else _checked(num_tokens)
    if isinstance(target, Gemma4MoEConfig):
        target = _uninitialised(target, dtype, device)
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module or a Gemma4MoEConfig, got {type(target).__name__}")
    found: dict[tuple[Any, ...], Part] = {}
    for each in sorted(parts_of(target), key=is_offloaded):  # what is there need not be loaded for the calls
        _take_over_codes(each)
        found.setdefault(_kind(each), each)
    # Of hidden states beside experts that have quantised weights alone.
    dtype_beside = next((each.dtype for each in target.parameters() if each.dtype in DTYPES), torch.bfloat16)
    if not found:
        raise ValueError(
            "target must hold a Gemma4Router, a Gemma4Experts, a MoEExperts or experts set to cupymoe; "
            f"{type(target).__name__} holds none"
        )
    for each in found.values():
        with shards_as_tensors(each.module):
            arch = Arch.of(each.device) if each.device.type == "cuda" else HOPPER
            sizes, weight_format = _sizes(each.module), _weight_format(each.module)
            numerics = _numerics(each.module)
            for count in counts or one_of_each_way(*sizes, training, arch, weight_format, numerics):
                _call(each, count, dtype_beside)
                if training:
                    _call(each, count, dtype_beside, differentiates=True)


def _take_over_codes(each: Part) -> None:
    """Of transformers' FP8 experts the first call makes the weights quantised ones: of every layer here, also of those
    that are not called."""
    if isinstance(each.module, Gemma4Router | MoEExperts) or is_offloaded(each):
        return
    from cupymoe.integrations import fp8

    with suppress(ValueError):  # the call says what can't be served, and where it is
        fp8.take_over(each.module, "gate_up_proj", "up_proj", "down_proj")


def _uninitialised(config: Gemma4MoEConfig, dtype: torch.dtype, device: torch.device | str) -> Gemma4MoE:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch sees, got {device}: it sees no CUDA device")
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


def _dtype(part: Any, beside: torch.dtype) -> torch.dtype:
    """Of the hidden states."""
    return part.scale.dtype if isinstance(part, Gemma4Router) else dtype_of(part, beside)


def _sizes(part: Any) -> tuple[int, int, int, int]:
    """Experts, experts of a token, hidden and intermediate size; of the parameters, which may have been pruned."""
    top_k = experts_per_token(part)
    if isinstance(part, Gemma4Router):
        return len(part.per_expert_scale), top_k, len(part.scale), part.config.moe_intermediate_size
    num_experts, hidden_size, intermediate_size = sizes_of(part)
    return num_experts, top_k, hidden_size, intermediate_size


def _weight_format(part: Any) -> str:
    """Of experts, as :class:`cupymoe.backends.ExpertsCall` has it."""
    weights = (getattr(part, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
    gate_up, down = (weight for weight in weights if weight is not None) if hasattr(part, "down_proj") else (None, None)
    return join_formats(
        gate_up.format if isinstance(gate_up, QuantizedWeight) else None,
        down.format if isinstance(down, QuantizedWeight) else None,
    )


def _numerics(part: Any) -> str:
    own: str | None = getattr(part, "numerics", None)
    return numerics_of(part) if own is None else own


def _kind(each: Part) -> tuple[Any, ...]:
    """Parts of one kind need the same kernels."""
    part, caller = each.module, each.caller
    if isinstance(part, Gemma4Router):
        settings: tuple[Any, ...] = (part._eps,)
    elif isinstance(part, MoEExperts):
        settings = part.activation, part.backend, part.is_transposed, part.keep
    else:
        from cupymoe.integrations.served import activation_of

        try:
            settings = activation_of(part), keep_of(part)
        except ValueError:
            settings = ()  # its call says where it is and what is in the way
    # A module with a hook may be called where one without is computed as part of something else.
    hooked = tuple(name for name, module in caller.named_modules() if hooks_of(module) or "forward" in vars(module))
    parameters = ((name, p.shape, p.dtype, p.requires_grad) for name, p in caller.named_parameters())
    weights = (
        (name, module.format, None if module.scales is None else module.scales.dtype)
        for name, module in caller.named_modules()
        if isinstance(module, QuantizedWeight)
    )
    return (
        *(type(part), type(caller), each.device, _sizes(part), _numerics(part), settings, hooked),
        *parameters,
        *weights,
    )


def _call(each: Part, num_tokens: int, dtype_beside: torch.dtype, *, differentiates: bool = False) -> None:
    num_experts, top_k, hidden_size, _ = _sizes(each.module)
    device, call = each.device, each.caller
    if is_called_with_shards(each.module):
        call = partial(type(each.module).forward, each.module)  # the other processes need not call warmup at once
    # Not inference mode, which would stay with the parameters that a hook of accelerate makes anew.
    with loaded(each.loader), torch.set_grad_enabled(differentiates):
        dtype = _dtype(each.module, dtype_beside)
        arguments = [torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device, requires_grad=differentiates)]
        if not isinstance(each.module, Gemma4Router):
            arguments.append(torch.full((num_tokens, top_k), num_experts, device=device))
            arguments.append(torch.zeros(num_tokens, top_k, device=device, requires_grad=differentiates))
        outputs = call(*arguments)
        if differentiates:
            _differentiate(outputs, [*arguments, *each.caller.parameters()])


def _differentiate(outputs: torch.Tensor | tuple[torch.Tensor, ...], tensors: list[torch.Tensor]) -> None:
    """Compute the gradients of those of the tensors that require one; they stay without."""
    found = [each for each in (outputs if isinstance(outputs, tuple) else (outputs,)) if each.requires_grad]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    torch.autograd.grad(found, wanted, [torch.zeros_like(each) for each in found], allow_unused=True)
