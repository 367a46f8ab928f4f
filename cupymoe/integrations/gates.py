"""Which activation of the contract a model's own gating function computes, found by calling it.

Experts of transformers gate by their method ``_apply_gate``: most have the one that transformers gives them, some write
their own, with a clamp or gate and up interleaved. Such a function is recognised by what it computes: once for each, it
is called on a stand-in for the experts, whose parameters have values chosen here, and compared with every activation.
So a version of transformers that writes another function under the same name is noticed, and one that writes a known
function for a new model is served. The user's module is neither called nor changed by that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.customisation import is_written_by

_PARAMETERS = {"limit": "limit", "swiglu_limit": "limit", "alpha": "alpha", "swiglu_alpha": "alpha"}
"""Attributes of experts that their gating function may read, and the parameters of an activation that they are."""

_OPTIONAL = (*_PARAMETERS, "gate_softcap", "up_softcap")
"""Attributes that experts of transformers may have as None, and gate in another way then."""

# Two of each, so that a function with one of them written into it is not taken for one that reads it.
_VALUES = ({"limit": 1.75, "alpha": 1.25}, {"limit": 5.5, "alpha": 0.75})

Names = tuple[str, ...]

Recognised = tuple[MoEActivation | None, Names, Names]
"""An activation, its parameters that experts give, and the attributes of theirs that they are."""


def activation_of_gate(experts: Any, act: MoEActivation | None) -> MoEActivation:
    """The activation that experts compute by their class's ``_apply_gate``, with the parameters that they have now.

    Args:
        experts: a module of transformers.
        act: what its ``act_fn`` is; None if it has none.

    Raises:
        ValueError: ``_apply_gate`` was not written in transformers or computes none of the contract's activations, or
            a parameter has a value that the activation can't have.
    """
    if "_apply_gate" in vars(experts):
        raise ValueError(
            "its _apply_gate was set on this module, and only one that transformers' own classes define is computed"
        )
    function = type(experts)._apply_gate
    activation, parameters, attributes = _found(function, act)
    if activation is None and (absent := [name for name in _OPTIONAL if getattr(experts, name, 0) is None]):
        activation, parameters, attributes = _found(function, act, *absent)
    if activation is None:
        name = f"{getattr(function, '__qualname__', function)} of {getattr(function, '__module__', None)}"
        raise ValueError(
            f"it gates in its own way: {name} is no function of transformers' that cupymoe has an activation for"
        )
    if not attributes:
        return activation
    return with_values(activation, parameters, tuple([getattr(experts, name) for name in attributes]))


def _found(gate: Callable[..., Any], act: MoEActivation | None, *absent: str) -> Recognised:
    if torch.compiler.is_compiling():
        spelling, parameters, attributes = _spelled(gate, None if act is None else act.value, *absent)
        return MoEActivation.from_str(spelling) if spelling else None, parameters, attributes
    return _recognised(gate, act, *absent)


def with_values(activation: MoEActivation, names: tuple[str, ...], values: tuple[Any, ...]) -> MoEActivation:
    """An activation with the parameters that a module has.

    Raises:
        ValueError: it can't have them.
    """
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
            raise ValueError(f"{name} of {activation.member.value} must be a number, got {value!r}")
    if torch.compiler.is_compiling():
        # Only spelled can an activation that is not there yet be made while torch.compile traces; and of a number that
        # has changed since the last trace, which is a symbol, only the integer ratio can be spelled.
        parameters = {**activation.parameters, **dict(zip(names, values, strict=True))}
        exact = {
            name: value if value == math.inf else value.as_integer_ratio()[0] / value.as_integer_ratio()[1]
            for name, value in parameters.items()
        }
        return MoEActivation.from_str(
            f"{activation.member.value}({','.join([f'{name}={value}' for name, value in exact.items()])})"
        )
    try:
        return _given(activation, names, values)
    except TypeError as error:
        raise ValueError(str(error)) from None


@functools.lru_cache(maxsize=4096)
def _given(activation: MoEActivation, names: tuple[str, ...], values: tuple[Any, ...]) -> MoEActivation:
    return activation.with_parameters(**dict(zip(names, values, strict=True)))


@functools.cache
def _recognised(gate: Callable[..., Any], act: MoEActivation | None, *absent: str) -> Recognised:
    found: Recognised = _alone(_recognise, gate, act, *absent)
    return found


# torch.compile calls these two instead of tracing them, and takes the result for a constant. Their arguments are
# strings and functions because only such can be constants there.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _spelled(gate: Callable[..., Any], act: str | None, *absent: str) -> tuple[str | None, Names, Names]:
    member = None if act is None else MoEActivation.from_str(act)
    activation, parameters, attributes = _recognised(gate, member, *absent)
    return None if activation is None else activation.value, parameters, attributes


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_softcapped_swiglu(forward: Callable[..., Any], gate_cap: Callable[..., Any], up_cap: Callable[..., Any]) -> bool:
    """Whether a module's ``forward(gate, up)`` is SITU, given its own and those of its ``gate_softcap`` and
    ``up_softcap``."""
    return _is_softcapped_swiglu_once(forward, gate_cap, up_cap)


@functools.cache
def _is_softcapped_swiglu_once(*forwards: Callable[..., Any]) -> bool:
    found: bool = _alone(_is_softcapped_swiglu, *forwards)
    return found


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own, in which none of the caller's modes of torch is on: its tensors are real
    ones where the caller's are fake."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


class _StandIn:
    """In place of experts: it has an ``act_fn`` and parameters, and remembers which of them were read. Those that are
    absent are None, as they are in the experts."""

    def __init__(self, act: MoEActivation | None, values: Mapping[str, float], absent: Names) -> None:
        self._values = values
        self._absent = absent
        self.read: dict[str, str] = {}
        if act is not None:
            self.act_fn = functools.partial(_act, act)

    def __getattr__(self, name: str) -> float | None:
        if name in self._absent:
            return None
        if name not in _PARAMETERS:
            raise AttributeError(name)
        self.read[name] = _PARAMETERS[name]
        return self._values[_PARAMETERS[name]]


def _act(act: MoEActivation, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    value = act.definition.gate(gate, act.parameters)[0]
    return value if up is None else value * act.definition.up(up, act.parameters)[0]


def _recognise(gate: Callable[..., Any], act: MoEActivation | None, *absent: str) -> Recognised:
    if not is_written_by("transformers", gate):
        return None, (), ()
    candidates = [*([] if act is None else [act]), *(member for member in MoEActivation if member.is_gated)]
    attributes: dict[str, str] = {}
    for values in _VALUES:
        stand_in = _StandIn(act, values, absent)
        output = _output(gate, stand_in, _input())
        attributes = stand_in.read
        read = {name: values[name] for name in attributes.values()}
        if output is None or len(read) < len(attributes):  # two attributes for one parameter
            return None, (), ()
        candidates = [
            candidate
            for candidate in candidates
            if read.keys() <= candidate.parameters.keys()
            and _are_close(output, reference.activate(_input(), candidate.with_parameters(**read)))
        ]
    return (candidates[0], (*attributes.values(),), (*attributes,)) if candidates else (None, (), ())


def _is_softcapped_swiglu(forward: Callable[..., Any], *caps: Callable[..., Any]) -> bool:
    """SITU with ``beta`` the ``softcap`` of the gate's module and ``linear_beta`` that of the up's."""
    if not all(is_written_by("transformers", function) for function in (forward, *caps)):
        return False
    situ = MoEActivation.SITU.with_parameters(beta=2.0, linear_beta=3.0)
    softcaps = [functools.partial(cap, SimpleNamespace(softcap=bound)) for cap, bound in zip(caps, (2, 3), strict=True)]
    stand_in = SimpleNamespace(gate_softcap=softcaps[0], up_softcap=softcaps[1])
    output = _output(forward, stand_in, *_input().chunk(2, dim=-1))
    return output is not None and _are_close(output, reference.activate(_input(), situ))


def _input() -> torch.Tensor:
    """``[640, 64]`` float64 on the CPU, of magnitudes from 2^-4 to 2^15, each a number of float32; always the same
    numbers, in a new tensor, which a function may write to."""
    normal = torch.randn(640, 64, generator=torch.Generator("cpu").manual_seed(0), device="cpu", dtype=torch.float32)
    scale = torch.exp2(torch.arange(-4.0, 16.0, device="cpu", dtype=torch.float32)).repeat_interleave(32)
    return (normal * scale[:, None]).double()


def _output(function: Callable[..., Any], *arguments: Any) -> torch.Tensor | None:
    try:
        output = function(*arguments)
    except Exception:
        return None  # it needs more than the stand-in has
    return output if isinstance(output, torch.Tensor) else None


def _are_close(output: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for a computation in float32; the activations that are most alike, GELU and GELU_TANH, differ by 5e-4."""
    return output.shape == expected.shape and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)
