"""Who computes the layers of a model, in which way, and why nobody faster does; without computing anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from cupymoe.backends import DIRECTIONS, Direction, ExpertsCall, registry, serving
from cupymoe.experts import MoEExperts, experts_per_token
from cupymoe.integrations import are_experts_set_to_cupymoe, dtype_of, numerics_of, sizes_of
from cupymoe.weights.format import join_formats
from cupymoe.weights.quantized import QuantizedWeight, Weight


class Explanation(NamedTuple):
    """Of one direction of the calls of one number of tokens."""

    path: str
    """Where the experts lie in the model; empty for the model itself."""
    tokens: int
    direction: Direction
    backend: str | None
    """Who computes it; None: nobody, since the experts are refused."""
    way: str
    """How that backend does it."""
    weight_format: str
    """``"plain"``: as they are in the parameters; or both formats of quantised ones, ``"int4_g32,int4_g32"``."""
    reasons: dict[str, str]
    """Why the backends before that one don't, by name; or under ``"cupymoe"`` why it computes none of it."""

    def __str__(self) -> str:
        taken = "not computed" if self.backend is None else f"{self.backend} ({self.way}), {self.weight_format} weights"
        reasons = "".join(f"; not {name}: {reason}" for name, reason in self.reasons.items())
        return f"{self.path or '(itself)'}, {self.tokens} tokens, {self.direction}: {taken}{reasons}"


def explain(target: nn.Module, tokens: int | Iterable[int] = (1, 64, 1024)) -> list[Explanation]:
    """Who computes the experts of a model or module, for each of them, number of tokens and direction.

    ``print(*cupymoe.explain(model), sep="\\n")`` shows all. The logger ``cupymoe`` says the same of each kind of call
    when it is first made, at level INFO.

    Args:
        target: a module that holds ``Gemma4Experts``, ``MoEExperts``, or transformers' experts with
            ``experts_implementation="cupymoe"``; with PEFT's adapters or without. As their first call would,
            transformers' ``FP8Experts`` get a :class:`cupymoe.QuantizedWeight` in the place of each parameter.
        tokens: each at least 1.

    Raises:
        TypeError, ValueError: ``target`` is no module or holds no such experts; ``tokens`` are no positive integers.
        ValueError: a ``MoEExperts`` has no ``top_k``.
    """
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module, got {type(target).__name__}")
    counts = [tokens] if isinstance(tokens, int) else [*tokens]
    if not counts or any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in counts):
        raise ValueError(f"tokens must be positive integers, got {tokens!r}")
    found: list[Explanation] = []
    seen: set[nn.Module] = set()
    for path, module in target.named_modules():  # from the outside in: a wrapper comes before what it wraps
        experts = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if experts not in seen and (isinstance(experts, MoEExperts) or are_experts_set_to_cupymoe(experts)):
            seen.add(experts)
            top_k = experts_per_token(experts)
            for count in counts:
                found += [_explain(path, experts, module, count, top_k, direction) for direction in DIRECTIONS]
    if not found:
        raise ValueError(
            "target must hold a Gemma4Experts, a MoEExperts or experts set to cupymoe; "
            f"{type(target).__name__} holds none"
        )
    return found


def _explain(path: str, experts: Any, caller: nn.Module, tokens: int, top_k: int, direction: Direction) -> Explanation:
    try:
        name, call = _call_of(experts, caller, tokens, top_k)
    except ValueError as error:
        return Explanation(path, tokens, direction, None, "", "plain", {"cupymoe": str(error)})
    backends = registry()
    named = name != "auto" and backends[name].unsupported_reason(call, direction) is None
    if name != "auto" and not named and direction == "forward":
        reason = backends[name].unsupported_reason(call, direction)
        return Explanation(path, tokens, direction, None, "", call.weight_format, {name: str(reason)})
    taken = backends[name] if named else serving(call, direction)
    reasons: dict[str, str] = {}
    for other, backend in backends.items():
        if backend is taken:
            break
        reason = backend.unsupported_reason(call, direction)
        if reason is None:
            reason = f"backend={name!r} was asked for" if named else f"{taken.name} was faster at such a load"
        reasons[other] = reason
    return Explanation(path, tokens, direction, taken.name, taken.way(call, direction), call.weight_format, reasons)


def _call_of(experts: Any, caller: nn.Module, tokens: int, top_k: int) -> tuple[str, ExpertsCall]:
    """The backend that is asked for, and what the backends are asked about."""
    if isinstance(experts, MoEExperts):
        gate_up_proj, down_proj, gate_up_bias, _ = experts.projections()
        name, activation, numerics = experts.backend, experts.activation, experts.numerics
    else:
        from cupymoe.integrations.served import served

        gate_up_proj, down_proj, gate_up_bias, _, activation = served(experts)
        name, numerics = "auto", numerics_of(experts)
    num_experts, hidden_size, intermediate_size = sizes_of(experts)
    weights = gate_up_proj, down_proj
    gate_up_format, down_format = (each.format if isinstance(each, QuantizedWeight) else None for each in weights)
    return name, ExpertsCall(
        device=gate_up_proj.device,
        dtype=dtype_of(experts),
        activation=activation,
        num_tokens=tokens,
        top_k=top_k,
        num_experts=num_experts,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        aligned_hidden_states=True,
        aligned_weights=all(_is_aligned(weight) for weight in weights),
        adapter_rank=0 if caller is experts else _low_rank(caller),
        gate_up_transposed=_is_transposed(gate_up_proj),
        down_transposed=_is_transposed(down_proj),
        has_bias=gate_up_bias is not None,
        weight_format=join_formats(gate_up_format, down_format),
        numerics=numerics,
    )


def _is_aligned(weight: Weight) -> bool:
    tensors = weight.tensors() if isinstance(weight, QuantizedWeight) else (weight,)
    return all(tensor is None or tensor.is_meta or tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _is_transposed(weight: Weight) -> bool:
    return isinstance(weight, torch.Tensor) and not weight.is_contiguous()


def _low_rank(caller: nn.Module) -> int:
    """The largest rank of the adapters that a wrapper of PEFT computes unmerged; 0 if it merges them."""
    try:
        from cupymoe.integrations.peft import ParamWrapper
    except ImportError:
        return 0
    return caller.largest_rank() if isinstance(caller, ParamWrapper) else 0
