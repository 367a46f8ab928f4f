"""What ``cuda_src/common/activations.cuh`` is compiled with: the function and its parameters."""

from __future__ import annotations

import torch

from cupymoe.activation import MoEActivation


def activation_defines(activation: MoEActivation) -> tuple[str, ...]:
    """``ACTIVATION``, and ``ACTIVATION_<PARAMETER>`` for each parameter but a limit that no float32 exceeds."""
    values = {name: value for name, value in activation.parameters.items() if value <= torch.finfo(torch.float32).max}
    return (
        f"ACTIVATION={activation.function}",
        *(f"ACTIVATION_{name.upper()}={value}" for name, value in values.items()),
    )
