"""What ``cupymoe verify`` checks: each module yields results, in the order in which a doubter would ask."""

from __future__ import annotations

from collections.abc import Iterator

from cupymoe.tools.verification import activations, batched, compilation, experts, routing, zero_copy
from cupymoe.tools.verification.checkpoint import run as checkpoint_layers
from cupymoe.tools.verification.result import Result, Setting


def run(setting: Setting, checkpoint: str | None = None) -> Iterator[Result]:
    """Every check, one after the other; or a checkpoint's layers on the setting's device, in its dtype."""
    if checkpoint is not None:
        yield from checkpoint_layers(checkpoint, setting.dtype, setting.seed, setting.device)
        return
    for module in (activations, routing, experts, batched, zero_copy, compilation):
        yield from module.checks(setting)
