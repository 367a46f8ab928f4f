"""The functions of the activation contract, each written once: its value, its slope, and its parameters.

The reference computes with them, the gradients differentiate with them, and the kernels are compiled with their
parameters (``cuda_src/common/activations.cuh`` words the functions themselves a second time, in CUDA).
``cupymoe/tools/verification/activations.py`` has another wording of each, to check this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

Values = Mapping[str, float]
"""The values of a function's parameters, by name."""


class Parameter(NamedTuple):
    """A parameter of a function: its value where none is asked for, and the least and the greatest that it may have."""

    default: float
    least: float
    greatest: float


ValueAndSlope = tuple[torch.Tensor, Callable[[], torch.Tensor]]
"""A factor of an activation at every element, and what computes its derivative there, for those who want it."""


class Function(NamedTuple):
    """One function of the contract: ``gate(g) * up(u)``, or ``gate(x)`` for an ungated member."""

    gate: Callable[[torch.Tensor, Values], ValueAndSlope]
    up: Callable[[torch.Tensor, Values], ValueAndSlope]
    parameters: Mapping[str, Parameter] = MappingProxyType({})
    """Those whose values ``gate`` and ``up`` are given."""


def _limit(default: float) -> Parameter:
    # Infinity clamps nothing. 0 is refused, because some configs mean "nothing" by it and others would clamp to it.
    return Parameter(default, 1e-6, math.inf)


def _alpha(default: float) -> Parameter:
    # Where the kernels keep their promise of 0.51 and 4 ulp.
    return Parameter(default, 0.125, 8.0)


# --- gate -------------------------------------------------------------------------------------------------------------
# Sigmoid and erfc forms, because 1 + tanh and 1 + erf cancel for negative gates, in float64 too.


def _silu(gate: torch.Tensor, values: Values) -> ValueAndSlope:
    """``g sigmoid(alpha g)`` of ``g = min(gate, limit)``."""
    limit, alpha = values["limit"], values["alpha"]
    clamped = gate if limit == math.inf else gate.clamp(max=limit)
    sigmoid = torch.sigmoid(alpha * clamped)
    value = clamped * sigmoid

    def slope() -> torch.Tensor:
        unclamped = sigmoid + value * (1 - sigmoid) * alpha
        return unclamped if limit == math.inf else unclamped * (gate <= limit)

    return value, slope


def _gelu(gate: torch.Tensor, _: Values) -> ValueAndSlope:
    """``gate Phi(gate)``."""
    erfc = torch.erfc(gate * -math.sqrt(0.5))

    def slope() -> torch.Tensor:
        density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
        return 0.5 * erfc + gate * density

    return gate * 0.5 * erfc, slope


def _gelu_tanh(gate: torch.Tensor, _: Values) -> ValueAndSlope:
    """``0.5 gate (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3)))``, Hendrycks and Gimpel, arXiv:1606.08415."""
    linear = 2 * math.sqrt(2 / math.pi)
    cubic = 0.044715 * linear
    sigmoid = torch.sigmoid(linear * gate + cubic * gate**3)
    value = gate * sigmoid
    return value, lambda: sigmoid + value * (1 - sigmoid) * (linear + 3 * cubic * gate.square())


def _relu2(gate: torch.Tensor, _: Values) -> ValueAndSlope:
    """``max(gate, 0)^2``."""
    positive = torch.relu(gate)
    return positive.square(), lambda: 2 * positive


def _silu_clamped_after(gate: torch.Tensor, values: Values) -> ValueAndSlope:
    """``min(gate sigmoid(gate), limit)``."""
    limit = values["limit"]
    value, slope = _silu(gate, {"limit": math.inf, "alpha": 1.0})
    return value.clamp(max=limit), lambda: slope() * (value <= limit)


def _situ(gate: torch.Tensor, values: Values) -> ValueAndSlope:
    """``beta tanh(gate / beta) sigmoid(gate)``, Kimi K3's."""
    squashed, squashed_slope = _squashed(gate, values["beta"])
    sigmoid = torch.sigmoid(gate)
    value = squashed * sigmoid
    return value, lambda: squashed_slope() * sigmoid + value * (1 - sigmoid)


# --- up ---------------------------------------------------------------------------------------------------------------


def _as_it_is(up: torch.Tensor, _: Values) -> ValueAndSlope:
    return up, lambda: torch.ones_like(up)


def _clamped(up: torch.Tensor, values: Values) -> ValueAndSlope:
    """``clamp(up, -limit, limit)``."""
    limit = values["limit"]
    if limit == math.inf:
        return _as_it_is(up, values)
    return up.clamp(-limit, limit), lambda: (up.abs() <= limit).to(up.dtype)


def _clamped_plus_one(up: torch.Tensor, values: Values) -> ValueAndSlope:
    """``clamp(up, -limit, limit) + 1``."""
    value, slope = _clamped(up, values)
    return value + 1, slope


def _squashed(x: torch.Tensor, bound: float) -> ValueAndSlope:
    """``bound tanh(x / bound)``."""
    if bound == math.inf:
        return x, lambda: torch.ones_like(x)
    tanh = torch.tanh(x / bound)
    return bound * tanh, lambda: 1 - tanh.square()


FUNCTIONS: Mapping[str, Function] = {
    "SILU": Function(_silu, _clamped, {"limit": _limit(math.inf), "alpha": _alpha(1.0)}),
    "GELU": Function(_gelu, _as_it_is),
    "GELU_TANH": Function(_gelu_tanh, _as_it_is),
    "RELU2": Function(_relu2, _as_it_is),
    "SWIGLUOAI": Function(_silu, _clamped_plus_one, {"limit": _limit(7.0), "alpha": _alpha(1.702)}),
    "SWIGLUSTEP": Function(_silu_clamped_after, _clamped, {"limit": _limit(7.0)}),
    "SITU": Function(
        _situ,
        lambda up, values: _squashed(up, values["linear_beta"]),
        {"beta": Parameter(1.0, 0.125, 1e4), "linear_beta": Parameter(math.inf, 0.125, math.inf)},
    ),
}
"""By the name that :attr:`cupymoe.MoEActivation.function` gives and the kernels are compiled with."""
