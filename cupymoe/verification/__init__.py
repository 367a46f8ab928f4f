"""What ``cupymoe verify`` checks: each module yields results, in the order in which a doubter would ask."""

from __future__ import annotations

from collections.abc import Iterator

from cupymoe.verification import activations, compilation, experts, routing, zero_copy
from cupymoe.verification.result import Result, Setting


def run(setting: Setting) -> Iterator[Result]:
    """Every check, one after the other."""
    for module in (activations, routing, experts, zero_copy, compilation):
        yield from module.checks(setting)
