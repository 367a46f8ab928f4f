"""What users do to a module beyond its class and its parameters: hooks, a forward of its own, parametrizations.

What computes from a module's parameters alone would pass over all that. So whoever replaces a module, or computes in
its place, asks here first, and honours what is found or refuses it by name.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize

_TRANSFORMERS_OWN = "transformers.utils.output_capturing"
"""Where the hooks come from that transformers leaves after a call that asked for hidden states; its classes alone have
them."""


def hooks_of(module: nn.Module) -> list[str]:
    """Which kinds of hooks a module has."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return [kind for kind in kinds if getattr(module, kind)]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of any kind; asked in each call, where :func:`hooks_of` would take longer."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_wrapper(tensor_class: type) -> bool:
    """Whether tensors of a class wrap others, as DTensor and torchao's quantised weights do: an address of one is no
    address of its elements."""
    return hasattr(tensor_class, "__tensor_flatten__")  # torch's own mark of such a class


def as_written(package: str, cls: type, *names: str) -> dict[str, Any]:
    """The methods of a class by name, as ``package`` wrote them; None for one that somebody has replaced already, which
    may have come before us."""
    methods = {name: getattr(cls, name, None) for name in names}
    return {name: method if is_written_by(package, method) else None for name, method in methods.items()}


def is_written_by(package: str, function: Any) -> bool:
    """Whether a function was written in a package; functools.wraps makes a wrapper look like what it wraps, but for its
    globals."""
    module: str = getattr(function, "__globals__", {}).get("__name__", "")
    return module.partition(".")[0] == package


def runs_as(module: nn.Module, cls: type[nn.Module], methods: Mapping[str, Any]) -> bool:
    """Whether a call of a module does what ``methods`` of ``cls`` do (:func:`as_written`), and nothing else."""
    own = vars(module)
    for name, method in methods.items():  # all() would take three times as long
        if name in own or getattr(cls, name) is not method:
            return False
    return (
        type(module) is cls
        and not has_hooks(module)
        and module._compiled_call_impl is None
        and not _has_any_global_hook()
    )


def has_code_of(function: Any, original: Callable[..., Any]) -> bool:
    """Whether a function is ``original`` or a copy of it: transformers' models are generated from each other."""
    ours, theirs = getattr(function, "__code__", None), original.__code__
    return ours is theirs or (
        ours is not None
        and (ours.co_code, ours.co_consts, ours.co_names) == (theirs.co_code, theirs.co_consts, theirs.co_names)
    )


def own_forward(module: nn.Module, *originals: Callable[..., Any] | None, called: Any = None) -> str | None:
    """The forward of a module, as messages name it, where it is none of ``originals``; else None.

    Args:
        module: whose ``forward`` is looked at.
        originals: the forwards that are known; None is none.
        called: what to look at in place of ``module.forward``, where that is a known wrapper around it.
    """
    called = module.forward if called is None else called
    function = getattr(called, "__func__", called)
    if any(original is not None and has_code_of(function, original) for original in originals):
        return None
    if not hasattr(function, "__qualname__"):
        return f"a {type(function).__name__}"
    name = f"{function.__qualname__} of {function.__module__}"
    if hasattr(function, "__wrapped__") and hasattr(function, "__code__"):  # it bears the name of what it wraps
        return f"{function.__code__.co_name} of {function.__globals__['__name__']} around {name}"
    return name


def check_replaceable(path: str, module: nn.Module, **originals: tuple[Callable[..., Any] | None, ...]) -> None:
    """See that a module is its parameters and the methods ``originals``, and nothing else.

    Args:
        path: what messages call the module.
        module: what is to be replaced.
        originals: for each method that a call runs, the functions that are known.

    Raises:
        ValueError: it has hooks, another forward, parametrizations, or parameters that are no plain tensors or are not
            there now; the message names it by ``path`` and says what to do.
    """
    parametrized: Any = module.parametrizations if parametrize.is_parametrized(module) else ()
    found: dict[str, str | None] = {
        **{
            f"no {name} of its own, which would be lost": own_forward(
                module, *known, called=getattr(module, name, None)
            )
            for name, known in originals.items()
        },
        "no hooks, which would be lost": _foreign_hooks(module),
        "no parametrizations, which would be lost": ", ".join(parametrized),
        "plain tensors as parameters": _wrapped_parameters(module),
    }
    for allowed, given in found.items():
        if given:
            raise ValueError(
                f"{path} must have {allowed}, got {given}: only its parameters are taken over. Change the module that "
                "takes its place instead, or leave this one where it is"
            )


def _foreign_hooks(module: nn.Module) -> str | None:
    hooks = [
        kind
        for kind in hooks_of(module)
        if any(getattr(hook, "__module__", None) != _TRANSFORMERS_OWN for hook in getattr(module, kind).values())
    ]
    return f"{', '.join(hooks)} of {type(module).__name__}" if hooks else None


def _wrapped_parameters(module: nn.Module) -> str | None:
    return ", ".join(
        f"{type(parameter).__name__ if parameter.numel() else 'an empty one'} for {name}"
        for name, parameter in module.named_parameters(recurse=False)
        if is_wrapper(type(parameter)) or not parameter.numel()  # ZeRO-3 empties them between the calls
    )


def let_compute_as(module: nn.Module, ours: Any) -> None:
    """Give a module the class ``ours``, which extends the one that it was made of, and keep what torch has put around
    that since: FSDP2's ``FSDPModule``, and parametrizations, which can still be removed."""
    given: Any = type(module)
    if not parametrize.is_parametrized(module):
        module.__class__ = _class_of_both(ours, given)
        return
    # Torch looks for a parametrization's property in the module's very class, and gives the module that class's base
    # when the last one is removed.
    bases: Any = tuple(_class_of_both(ours, base) for base in given.__bases__)
    module.__class__ = type(given.__name__, bases, dict(vars(given)))


@functools.cache
def _class_of_both(ours: Any, given: Any) -> Any:
    if issubclass(given, ours):
        return given
    return ours if given in ours.__mro__ else type(given.__name__, (ours, given), {})


def path_of(module: nn.Module) -> str:
    """Where a module lies in the largest module that holds it, and its class; for messages, since it looks at every
    object that is alive."""
    name = type(module).__name__
    if torch.compiler.is_compiling():
        return name
    paths = [
        path
        for root in gc.get_objects()
        if issubclass(type(root), nn.Module) and "_modules" in vars(root)
        for path, part in root.named_modules()
        if part is module
    ]
    longest = max(paths, key=len, default="")
    return f"{longest} ({name})" if longest else name
