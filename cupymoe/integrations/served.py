"""What transformers' experts compute, read from their module: the weights, where biases are, and the activation.

Layout is read from properties of the class, and the activation from ``act_fn`` or by calling the gating function. What
cupymoe does not compute is refused, with a reason.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import activations
from transformers.integrations.moe import use_experts_implementation

from cupymoe.activation import MoEActivation
from cupymoe.customisation import as_written, has_hooks, hooks_of, is_wrapper
from cupymoe.experts import as_out_in
from cupymoe.integrations import (
    EXPERTS_IMPLEMENTATION,
    fp8,
)
from cupymoe.integrations.gates import activation_of_gate, is_softcapped_swiglu, with_values
from cupymoe.parameters import DTYPES
from cupymoe.weights.quantized import QuantizedWeight, Weight

_GELU_TANH_CLASSES = (
    activations.GELUTanh,
    activations.NewGELUActivation,
    activations.FastGELUActivation,
    activations.AccurateGELUActivation,
)
# transformers' activation modules; several spell the same function.
_ACTIVATIONS: dict[type[nn.Module], MoEActivation] = {
    **dict.fromkeys(_GELU_TANH_CLASSES, MoEActivation.GELU_TANH),
    activations.GELUActivation: MoEActivation.GELU,
    activations.SiLUActivation: MoEActivation.SILU,
    nn.SiLU: MoEActivation.SILU,
    activations.ReLUSquaredActivation: MoEActivation.RELU2,
}
_GELU_METHODS = ("_gelu_tanh_python", "_gelu_python")
_FORWARDS = {cls: as_written(cls.__module__.partition(".")[0], cls, "forward")["forward"] for cls in _ACTIVATIONS}

# Some models have a function for one.
_FUNCTIONS = {nn.functional.silu: MoEActivation.SILU, nn.functional.gelu: MoEActivation.GELU}

# Properties of a class of experts, which transformers' decorator sets, that cupymoe serves at one value only: that
# value, and what the other one means.
_PROPERTIES = {"has_post_expert_norm": (False, "its experts' outputs are normalised")}
# Properties that it serves at either value.
_KINDS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def _properties(decorator: Callable[..., Any]) -> dict[str, tuple[bool, str]]:
    """``_PROPERTIES``, and every property that only a newer transformers has: served at its default, which experts that
    were written before it have."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(decorator).parameters.items()}
    newer = {
        name: (default, f"its {name} is {not default}, of which cupymoe knows nothing")
        for name, default in defaults.items()
        if isinstance(default, bool) and name not in (*_PROPERTIES, *_KINDS)
    }
    return {**_PROPERTIES, **newer}


_ALL_PROPERTIES = _properties(use_experts_implementation)

# What parameters are called, by has_gate and has_bias.
_NAMES = {
    (has_gate, has_bias): (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if has_bias else ()))
    for has_gate, up in ((True, "gate_up_proj"), (False, "up_proj"))
    for has_bias in (False, True)
}


class Served(NamedTuple):
    """What a call of experts is computed from."""

    gate_up_proj: Weight
    """``[E, 2I, H]``, or ``[E, I, H]`` of experts that are not gated; a view where transformers has it transposed."""
    down_proj: Weight
    """``[E, H, I]``, likewise"""
    gate_up_bias: torch.Tensor | None
    """``[E, 2I]`` or ``[E, I]``"""
    down_bias: torch.Tensor | None
    """``[E, H]``"""
    activation: MoEActivation


def act_fn_of(experts: Any) -> MoEActivation | None:
    """The member that an experts module's own ``act_fn`` is, None if it has none; the config's name for it is not read.

    Raises:
        ValueError: no member computes that function, or hooks or another forward make something else of it.
    """
    given = getattr(experts, "act_fn", None)
    if given is None:
        return None
    cls = type(given)
    member = _ACTIVATIONS.get(cls) if isinstance(given, nn.Module) else _FUNCTIONS.get(given)
    if member is None and (bounds := _softcaps(given)) is not None:
        return with_values(MoEActivation.SITU, ("beta", "linear_beta"), bounds)
    if member is None:
        shown = cls.__name__ if isinstance(given, nn.Module) else getattr(given, "__name__", repr(given))
        known = [*(known.__name__ for known in _ACTIVATIONS), *(function.__name__ for function in _FUNCTIONS)]
        if shown in known:
            shown = f"the {shown} of {cls.__module__}"
        raise ValueError(f"cupymoe has no activation like {shown} of {type(experts).__name__}; it has {known}")
    if isinstance(given, nn.Module) and (reason := _changed(given)) is not None:
        raise ValueError(
            f"{type(experts).__name__}.act_fn {reason}, which would be ignored, since cupymoe computes the "
            'activation inside its kernels: remove that, or set experts_implementation="grouped_mm"'
        )
    return member


def activation_of(experts: Any) -> MoEActivation:
    """What an experts module computes between its two projections.

    Raises:
        ValueError: no activation of the contract does.
    """
    act = act_fn_of(experts)
    if not getattr(experts, "has_gate", True):
        if act is None or act.without_mul().is_gated:
            known = "it has no act_fn" if act is None else f"cupymoe has {act.value} only with a gate"
            raise _refusal(experts, f"its experts are not gated, and {known}")
        return act.without_mul()
    try:
        activation = activation_of_gate(experts, act)
    except ValueError as error:
        raise _refusal(experts, error) from None
    if getattr(experts, "is_concatenated", None) is activation.is_interleaved:
        said = f"its is_concatenated is {experts.is_concatenated}, but its _apply_gate computes {activation.value}"
        raise _refusal(experts, said)
    return activation


def _refusal(experts: Any, reason: object) -> ValueError:
    name = type(experts).__name__
    return ValueError(f"experts_implementation={EXPERTS_IMPLEMENTATION!r} does not serve {name}: {reason}")


def _changed(activation: nn.Module) -> str | None:
    """What makes one of transformers' activation modules compute something else than its class."""
    if has_hooks(activation):
        return f"has hooks ({', '.join(hooks_of(activation))})"
    own, cls = vars(activation), type(activation)
    if "forward" in own or cls.forward is not _FORWARDS[cls]:
        return "has a forward of its own"
    # What GELUTanh and GELUActivation call: torch's function, or their own method that spells it in Python.
    act = own.get("act")
    if act is None or (act is nn.functional.gelu and cls is activations.GELUActivation):
        return None
    if isinstance(act, functools.partial):
        known = (
            act.func is nn.functional.gelu and cls is activations.GELUTanh and act.keywords == {"approximate": "tanh"}
        )
    else:
        method = getattr(act, "__func__", None)
        known = method is not None and method in [getattr(cls, name, None) for name in _GELU_METHODS]
    return None if known else f"has an act of its own, {act!r}"


def _softcaps(given: Any) -> tuple[float, float] | None:
    """The bounds of gate and up, where a module of transformers is SITU: Inkling 2's ``SoftcappedSwiGLU``."""
    if not hasattr(given, "gate_softcap") or not hasattr(given, "up_softcap"):
        return None
    gate, up = given.gate_softcap, given.up_softcap
    if any(not isinstance(part, nn.Module) or has_hooks(part) or "forward" in vars(part) for part in (given, gate, up)):
        return None
    if not is_softcapped_swiglu(type(given).forward, type(gate).forward, type(up).forward):
        return None
    return gate.softcap, up.softcap


def served(experts: Any) -> Served:
    """What a call of experts is computed from, if cupymoe computes it as transformers does.

    Raises:
        ValueError: it can't; the message says what stands in the way.
    """
    try:
        parameters = _parameters(experts)
    except ValueError as error:
        raise _refusal(experts, error) from None
    return Served(*parameters, activation_of(experts))


def _parameters(experts: Any) -> tuple[Weight, Weight, torch.Tensor | None, torch.Tensor | None]:
    """The weights and biases of experts as :class:`Served` has them.

    Raises:
        ValueError: cupymoe can't compute with them, or not only with them.
    """
    for name, (allowed, reason) in _ALL_PROPERTIES.items():
        if getattr(experts, name, allowed) != allowed:
            raise ValueError(reason)
    names = _NAMES[getattr(experts, "has_gate", True), getattr(experts, "has_bias", False)]
    parameters: list[Any] = [getattr(experts, name, None) for name in names]
    first = None  # of those that are plain
    for name, parameter in zip(names, parameters, strict=True):
        if parameter is None:
            raise ValueError(f"it has no {name}")
        if isinstance(parameter, QuantizedWeight):
            continue
        if parameter.dtype not in DTYPES:
            if fp8.take_over(experts, *names[:2]):
                return _parameters(experts)
            raise ValueError(f"its {name} is {parameter.dtype}, not one of {DTYPES}")
        if is_wrapper(type(parameter)):
            raise ValueError(f"its {name} is a {type(parameter).__name__}, not a plain tensor")
        first = parameter if first is None else first
        if parameter.dtype != first.dtype:
            first_name = next(each for each in names if getattr(experts, each) is first)
            raise ValueError(f"its {name} is {parameter.dtype}, but its {first_name} {first.dtype}")
    gate_up_proj, down_proj, *biases = parameters
    if getattr(experts, "is_transposed", False):
        gate_up_proj, down_proj = as_out_in(gate_up_proj), as_out_in(down_proj)
    gate_up_bias, down_bias = biases or (None, None)
    return gate_up_proj, down_proj, gate_up_bias, down_bias
