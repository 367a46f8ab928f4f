"""Checks of arguments that are no tensors."""

from __future__ import annotations

import torch

from cupymoe.backends import NUMERICS


def check_settings(numerics: str, keep: str) -> None:
    """What a call of the experts asks for is served, or refused by name."""
    if numerics == "fast" and (keep == "gate_up" or keep == "input"):
        return  # what most calls ask for, at a tenth of what the checks cost
    check_numerics(numerics)
    check_keep(keep)


def check_numerics(numerics: object) -> None:
    """What is asked of the bits of an output is one of the two that can be."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be 'fast' or 'invariant', got {numerics!r}")


def check_keep(keep: object) -> None:
    """What a call that will be differentiated keeps is one of the two that it can."""
    if keep not in ("gate_up", "input"):
        raise ValueError(f"keep must be 'gate_up' or 'input', got {keep!r}")


def check_module(name: str, module: object) -> None:
    """It is a module of torch."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
