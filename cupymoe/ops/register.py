"""How an op gets into ``torch.ops.cupymoe``, and how the public functions call it.

Registered through ``torch.library.Library`` because its dispatch costs 2 us a call, ``custom_op``'s 11.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_library = torch.library.Library("cupymoe", "DEF")  # type: ignore[no-untyped-call]

_autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Define ``torch.ops.cupymoe.<name of schema>`` for every device."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cupymoe::{name}", fake, lib=_library)
    overload = getattr(torch.ops.cupymoe, name).default

    def without_autocast(*arguments: Any) -> Any:
        # The dtypes of the arguments are the contract; the torch code behind an op would be autocast step by step.
        with torch._C._ExcludeDispatchKeyGuard(_autocast):
            return overload(*arguments)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, without_autocast, key)  # type: ignore[no-untyped-call]
    if backward is not None:
        torch.library.register_autograd(f"cupymoe::{name}", backward, setup_context=setup_context, lib=_library)


def dispatch(overload: Any, *arguments: Any) -> Any:
    """Calls an op; under ``no_grad`` past autograd's kernel, which is Python, would do nothing, and costs 6 us."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return overload(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*arguments)


_as_is = nullcontext()


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes a CUDA tensor's device the current one, where it isn't."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _as_is
