"""What ``cuda_src/common/activations.cuh`` is compiled with: the function and its parameters."""

from __future__ import annotations

import math

from cupymoe.activation import MoEActivation


def activation_defines(activation: MoEActivation) -> tuple[str, ...]:
    """``ACTIVATION``, and ``ACTIVATION_<PARAMETER>`` for each parameter that is not infinite: that is no limit."""
    values = {name: value for name, value in activation.parameters.items() if value != math.inf}
    return (
        f"ACTIVATION={activation.function}",
        *(f"ACTIVATION_{name.upper()}={value}" for name, value in values.items()),
    )
