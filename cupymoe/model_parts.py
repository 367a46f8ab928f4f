"""The routers and experts of a model, and how a call reaches them: through PEFT's wrappers, and with weights that
accelerate has offloaded or transformers has split among processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from cupymoe.experts import MoEExperts
from cupymoe.integrations import are_experts_set_to_cupymoe
from cupymoe.modules import Gemma4Router


class Part(NamedTuple):
    """A router or experts, and how calls reach them."""

    module: Any
    caller: Any
    """What calls go through: the outermost of PEFT's wrappers, or the module itself."""
    device: torch.device
    """Where a call runs."""
    loader: Any
    """The module around the caller whose hook loads the weights, or None if the caller's own hooks do or none need."""


def parts_of(target: nn.Module) -> list[Part]:
    """Every router and experts of the target, ready to be called."""
    modules = dict(target.named_modules())
    found: dict[nn.Module, Part] = {}
    module: Any
    for path, module in modules.items():  # from the outside in
        part = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if part in found:
            continue
        if isinstance(part, Gemma4Router | MoEExperts) or are_experts_set_to_cupymoe(part):
            names = path.split(".") if path else []
            around = [modules[".".join(names[:depth])] for depth in range(len(names))]
            found[part] = Part(part, module, *_place(path, part, module, around))
    return [*found.values()]


def _place(path: str, part: Any, caller: nn.Module, around: list[nn.Module]) -> tuple[torch.device, nn.Module | None]:
    """Where a call runs, and the module around the caller, if any, whose hook has to load the weights for it."""
    loader = None
    for owner_path, owner in caller.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            name = ".".join(filter(None, (path, owner_path, name)))
            if not parameter.numel():
                raise ValueError(
                    f"{name} must not be empty, as sharded parameters are between calls: call warmup before the module "
                    "is sharded, or give it a Gemma4MoEConfig, the sizes, instead of the module"
                )
            if hasattr(parameter, "device_mesh") and not is_called_with_shards(owner):
                raise ValueError(
                    f"{name} must not be a DTensor, of which this process has a shard: call warmup before the module "
                    "is sharded, or give it a Gemma4MoEConfig, the sizes, instead of the module"
                )
            if not parameter.is_meta or any(_loads(module, owner) for module in (owner, part, caller)):
                continue
            loader = next((module for module in reversed(around) if _loads(module, owner)), None)
            if loader is None:
                raise ValueError(
                    f"{name} must not be on the meta device unless a hook of accelerate loads it: call warmup when the "
                    "weights are loaded, or give it a Gemma4MoEConfig, the sizes, instead of the module"
                )
    # The innermost hook is the last to move the inputs.
    hooks = [*_hooks(loader), *_hooks(caller), *_hooks(part)]
    device = hooks[-1].execution_device if hooks else _device(part)
    return torch.empty(0, device=device).device, loader


def _device(part: Any) -> torch.device:
    device: torch.device = (part.scale if isinstance(part, Gemma4Router) else part.down_proj).device
    return device


def is_called_with_shards(module: Any) -> bool:
    """Whether transformers has split a module for tensor or expert parallelism: the forward that it has put around the
    module's own calls that with this process's shards as plain tensors, and speaks with the other processes."""
    return getattr(vars(module).get("forward"), "__module__", "").startswith("transformers.distributed.")


@contextmanager
def shards_as_tensors(module: Any) -> Iterator[None]:
    """A module's own parameters that are shards are plain tensors meanwhile: what this process has of them."""
    shards = {name: p for name, p in module.named_parameters(recurse=False) if hasattr(p, "device_mesh")}
    module._parameters.update(
        {name: p.to_local().detach().requires_grad_(p.requires_grad) for name, p in shards.items()}
    )
    try:
        yield
    finally:
        module._parameters.update(shards)


def _hooks(module: nn.Module | None) -> list[Any]:
    """accelerate's hooks on a module that say where its calls run, in the order in which they see the inputs."""

    def flat(hook: Any) -> list[Any]:
        if hasattr(hook, "hooks"):  # a SequentialHook, which may hold another
            return [each for inner in hook.hooks for each in flat(inner)]
        return [] if getattr(hook, "execution_device", None) is None else [hook]

    return [] if module is None else flat(vars(module).get("_hf_hook"))


def _loads(module: nn.Module, owner: nn.Module) -> bool:
    """Whether a hook on ``module`` loads the parameters that ``owner``, itself or a part of it, has of its own."""
    return any(
        getattr(hook, "offload", False) and (module is owner or hook.place_submodules) for hook in _hooks(module)
    )


def is_offloaded(each: Part) -> bool:
    """Whether a weight is not there between calls."""
    return any(parameter.is_meta for parameter in each.caller.parameters())


@contextmanager
def loaded(loader: Any) -> Iterator[None]:
    """The weights that the hook of a module around a part loads are there meanwhile."""
    if loader is None:
        yield
        return
    loader._hf_hook.pre_forward(loader)
    try:
        yield
    finally:
        loader._hf_hook.post_forward(loader, None)
