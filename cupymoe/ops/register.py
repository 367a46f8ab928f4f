"""How an op gets into ``torch.ops.cupymoe``, and how the public functions call it.

Registered through ``torch.library.Library`` because its dispatch costs 2 us a call, ``custom_op``'s 11.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

_library = torch.library.Library("cupymoe", "DEF")

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
    _library.define(schema)
    _library.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cupymoe::{name}", fake, lib=_library)
    overload = getattr(torch.ops.cupymoe, name).default

    def without_autocast(*arguments: Any) -> Any:
        # The dtypes of the arguments are the contract; the torch code behind an op would be autocast step by step.
        with torch._C._ExcludeDispatchKeyGuard(_autocast):
            return overload(*arguments)

    for key in ("AutocastCPU", "AutocastCUDA"):
        _library.impl(name, without_autocast, key)
    if backward is not None and setup_context is not None:
        _library.impl(name, _with_autograd(overload, backward, setup_context), "Autograd", with_keyset=True)


def _with_autograd(
    overload: Any, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> Callable[..., Any]:
    """The kernel of autograd that ``torch.library.register_autograd`` would make, but for the defaults of arguments.

    Torch fills these in by a loop whose time grows with the square of the number of arguments, 80 us in each
    differentiable call of the experts. Our schemas have no defaults and no keyword-only arguments.
    """

    def below_autograd(*arguments: Any) -> Any:
        *given, keyset = arguments
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *given)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = below_autograd(*arguments)
            setup_context(ctx, arguments[:-1], output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            gradients = backward(ctx, *grads)
            return *(gradients if isinstance(gradients, tuple) else (gradients,)), None

    def with_autograd(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(overload, arguments)
        # The keyset comes last, so that an argument has the same place in ctx.needs_input_grad.
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return Function.apply(*arguments, keyset)  # type: ignore[no-untyped-call]
        return below_autograd(*arguments, keyset)

    return with_autograd


def _refuse_tangents(overload: Any, arguments: tuple[Any, ...]) -> None:
    """Forward-mode differentiation would take what an op returns for a constant, and give zeros without a word."""
    for each in arguments:
        if isinstance(each, torch.Tensor) and forward_ad.unpack_dual(each).tangent is not None:
            raise NotImplementedError(
                f"{overload} has no forward-mode derivative (jvp, jacfwd, make_dual): differentiate in reverse mode, "
                "or call cupymoe.reference, which is plain torch"
            )


def dispatch(overload: Any, *arguments: Any) -> Any:
    """Calls an op; under ``no_grad`` past autograd's kernel, which is Python, would do nothing, and costs 6 us.

    Raises:
        NotImplementedError: an argument has a tangent.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        _refuse_tangents(overload, arguments)
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


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, and from 16 bytes on, as the kernels read it; a copy where it is not, as a slice may not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
