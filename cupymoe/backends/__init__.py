"""The registry of backends: who can compute the experts, and who takes a call.

A backend says of every call whether it serves it. ``"auto"`` takes the first that does; a named one that can't raises
with its reason. Nothing falls back to another formula.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch

from cupymoe.activation import MoEActivation


class ExpertsCall(NamedTuple):
    """What a backend may know of a call before it runs."""

    device: torch.device
    dtype: torch.dtype
    activation: MoEActivation
    num_tokens: int
    top_k: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    aligned_hidden_states: bool
    """Whether hidden_states start on 16 bytes."""
    aligned_weights: bool
    """Whether both weights start on 16 bytes."""


class Backend(Protocol):
    """One way to compute the experts."""

    name: str
    is_slow: bool
    """Whether ``"auto"`` says so when it has to take this one on a CUDA device: see :mod:`cupymoe.backends.slow`."""

    def unsupported_reason(self, call: ExpertsCall) -> str | None:
        """Why this backend can't serve the call; None if it can."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        activation: MoEActivation,
    ) -> torch.Tensor:
        """``[T, H]`` in the dtype of ``hidden_states``; arguments are checked, contiguous, with at least one pair."""


def row_packs_reason(call: ExpertsCall) -> str | None:
    """Why rows can't be moved 16 bytes at a time; None if they can."""
    if call.hidden_size % 8 == 0 and call.intermediate_size % 8 == 0:
        return None
    return (
        "rows must be whole 16-byte packs: hidden and intermediate size multiples of 8, not "
        f"{call.hidden_size} and {call.intermediate_size}"
    )


@functools.cache
def registry() -> dict[str, Backend]:
    """Every backend by name, in the order in which ``"auto"`` asks them."""
    from cupymoe.backends.fused import FusedBackend
    from cupymoe.backends.grouped import GroupedBackend
    from cupymoe.backends.reference import ReferenceBackend
    from cupymoe.backends.simt import SimtBackend

    backends: tuple[Backend, ...] = (FusedBackend(), GroupedBackend(), SimtBackend(), ReferenceBackend())
    return {backend.name: backend for backend in backends}


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: ``name`` is neither ``"auto"`` nor a backend's.
    """
    if name != "auto" and name not in [*registry()]:  # a list: what was given may have no hash
        raise ValueError(f"backend must be one of {['auto', *registry()]}, got {name!r}")


def serving(call: ExpertsCall) -> Backend:
    """The first backend that serves a call; the last one serves every call."""
    return next(backend for backend in registry().values() if backend.unsupported_reason(call) is None)


@functools.lru_cache(maxsize=4096)
def select(name: str, call: ExpertsCall) -> Backend:
    """The backend that a call is computed by. Where ``"auto"`` finds but a slow one on a CUDA device, it says so.

    Raises:
        ValueError: the named backend is unknown or does not serve the call; the message says why. Or
            ``CUPYMOE_ON_SLOW`` is set to something unknown.
        RuntimeError: ``CUPYMOE_ON_SLOW`` is ``error`` and ``"auto"`` finds but a slow backend.
    """
    from cupymoe.backends import slow

    check_name(name)
    if name == "auto":
        chosen = serving(call)
        slow.check(call, chosen)
        return chosen
    reason = registry()[name].unsupported_reason(call)
    if reason is not None:
        raise ValueError(f"backend {name!r} does not serve this call: {reason}")
    return registry()[name]
