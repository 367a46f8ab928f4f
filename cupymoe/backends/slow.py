"""What cupymoe says where it computes on a GPU, but not by its fast kernels. ``CUPYMOE_ON_SLOW`` sets how.

``warn`` (the default) warns once for each cause and size of experts, ``error`` raises every time, and ``silent`` says
nothing. A kind of call is judged when it is first seen, so the variable is to be set before the first call.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import torch

from cupymoe.backends import Backend, Direction, ExpertsCall, of_format, registry, serving

VARIABLE = "CUPYMOE_ON_SLOW"
POLICIES = ("warn", "error", "silent")

_lock = threading.Lock()
_reported: set[tuple[str, str]] = set()


class SlowWarning(UserWarning):
    """A call is right, and far slower than it could be."""


def policy() -> str:
    """What ``CUPYMOE_ON_SLOW`` asks for.

    Raises:
        ValueError: it is set to something else than one of :data:`POLICIES`.
    """
    value = os.environ.get(VARIABLE, POLICIES[0])
    if value not in POLICIES:
        raise ValueError(f"the environment variable {VARIABLE} must be one of {', '.join(POLICIES)}, got {value!r}")
    return value


def report(what: str, why: str, remedy: str) -> None:
    """Say that something is computed slowly, as ``CUPYMOE_ON_SLOW`` asks for.

    Args:
        what: what is computed, and by what; without the number of tokens, as it is warned of once.
        why: why nothing faster computes it.
        remedy: a sentence on what to do. It too is a part of what is warned of once; ``why`` is not.

    Raises:
        RuntimeError: ``CUPYMOE_ON_SLOW`` is ``error``.
        ValueError: it is set to something unknown.
    """
    on_slow = policy()
    text = f"cupymoe computes {what}: {why}. {remedy} {VARIABLE}=error makes this an error, =silent hushes it."
    if on_slow == "error":
        raise RuntimeError(text)
    if on_slow == "warn":
        with _lock:
            if (what, remedy) not in _reported:
                warnings.warn(text, SlowWarning, stacklevel=2)
                # After it, so that a filter which makes an error of the warning does so every time.
                _reported.add((what, remedy))


def check(call: ExpertsCall, chosen: Backend, direction: Direction = "forward") -> None:
    """Report a direction of a call on a CUDA device that only a slow backend serves.

    Raises:
        RuntimeError, ValueError: as :func:`report`. An unknown ``CUPYMOE_ON_SLOW`` is refused for fast calls too, so
            that it is seen before a slow one comes.
    """
    if call.device.type != "cuda":
        return
    policy()
    if chosen.is_slow and call.num_tokens:
        fast = {name: backend for name, backend in registry().items() if not backend.is_slow}
        report(
            f"{'' if direction == 'forward' else 'gradients of '}{call.num_experts} experts of hidden size "
            f"{call.hidden_size} and intermediate size {call.intermediate_size} in {call.dtype}{of_format(call)} "
            f"on CUDA by the slow backend {chosen.name!r}",
            "; ".join(f"{name}: {backend.unsupported_reason(call, direction)}" for name, backend in fast.items()),
            remedy(call, direction),
        )


class _Change(NamedTuple):
    """Something that a user can do about a call."""

    to_do: str
    fields: Callable[[ExpertsCall], dict[str, Any]]
    """Which of the call's fields it changes."""


_CHANGES = (
    _Change(
        "start both weights on 16 bytes (an allocation of its own for each, or a flat buffer whose parts are padded)",
        lambda call: {"aligned_weights": True},
    ),
    _Change("start hidden_states on 16 bytes", lambda call: {"aligned_hidden_states": True}),
    _Change("cast hidden_states and both weights to torch.bfloat16", lambda call: {"dtype": torch.bfloat16}),
    _Change(
        "fill the hidden size up with zeros to a multiple of 16 and the intermediate size to one of 8",
        lambda call: {
            "hidden_size": -(-call.hidden_size // 16) * 16,
            "intermediate_size": -(-call.intermediate_size // 8) * 8,
        },
    ),
    _Change("ask for numerics='fast'", lambda call: {"numerics": "fast"}),
)
_IN_VAIN = "No change of dtype, alignment or padding would make a fast backend serve it."


def remedy(call: ExpertsCall, direction: Direction = "forward") -> str:
    """The fewest changes with which a fast backend serves a call, as a sentence."""
    for count in range(1, len(_CHANGES) + 1):
        for changes in combinations(_CHANGES, count):
            fields = {name: value for change in changes for name, value in change.fields(call).items()}
            if not serving(call._replace(**fields), direction).is_slow:
                return f"To have it fast, {', and '.join(change.to_do for change in changes)}."
    return _IN_VAIN
