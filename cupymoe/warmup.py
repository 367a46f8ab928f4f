"""Compiling and loading ahead of the first call, so that neither a user nor a CUDA-graph capture waits for NVRTC."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from cupymoe.backends import INVARIANT
from cupymoe.backends.fused import plans_at_once, stream_reason, takes_tiles
from cupymoe.config import Gemma4MoEConfig
from cupymoe.customisation import hooks_of
from cupymoe.experts import MoEExperts, experts_per_token
from cupymoe.integrations import are_experts_set_to_cupymoe, dtype_of, keep_of, numerics_of, sizes_of
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.coded_tiles import coded_slots
from cupymoe.kernels.expert_tiles import cut, few_pairs
from cupymoe.kernels.load import Load
from cupymoe.kernels.plan_experts import pairs_per_lane
from cupymoe.kernels.sort_by_expert import FEW_PAIRS, block_of
from cupymoe.kernels.stream_regimes import regime
from cupymoe.kernels.unsorted_pairs import MAX_PAIRS
from cupymoe.modules import Gemma4MoE, Gemma4Router
from cupymoe.parameters import DTYPES
from cupymoe.weights.format import PLAIN, join_formats
from cupymoe.weights.quantized import QuantizedWeight

_MAX_TOKENS = 32768


def _way(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    training: bool,
    arch: Arch,
    weight_format: str,
    numerics: str,
    global_num_experts: int | None,
) -> tuple[Any, ...]:
    """What the fused backend's kernels are compiled for, as far as it depends on the number of tokens: without and with
    an adapter, and of gradients."""
    load = Load.of(num_tokens, top_k, num_experts, global_num_experts)
    sort = block_of(load.num_pairs, num_experts)
    is_invariant = numerics == INVARIANT
    few = few_pairs(load) if is_invariant else 0
    of_codes = coded_slots(load) if weight_format != PLAIN else 0
    by_tiles = *cut(load, intermediate_size), sort, few, load.num_pairs <= MAX_PAIRS, of_codes
    ways: list[tuple[Any, ...]]
    if takes_tiles(load, hidden_size, arch, weight_format, is_invariant=is_invariant):
        ways = [by_tiles]
    elif stream_reason(load, arch, weight_format) is not None or (is_invariant and arch.wgmma):
        ways = [(sort,)]  # another backend's, which sorts too
    else:
        planned: Any = pairs_per_lane(load.num_pairs) if plans_at_once(load, arch) else sort
        settings = {"has_codes": weight_format != PLAIN, "is_invariant": is_invariant}
        regime_of = partial(regime, load, intermediate_size, arch, **settings)
        regimes = regime_of(has_adapter=False), regime_of(has_adapter=True)
        ways = [(each, None if each.inline_pairs else planned) for each in regimes]
    if training:
        ways.append(by_tiles)  # however few the tokens are, gradients go by tiles
    return tuple(ways)


def one_of_each_way(
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    training: bool = False,
    arch: Arch = HOPPER,
    weight_format: str = PLAIN,
    numerics: str = "fast",
    global_num_experts: int | None = None,
) -> tuple[int, ...]:
    """The first number of tokens of every range that kernels are compiled for; with ``training`` those of gradients
    too. Where the ``num_experts`` are some of ``global_num_experts``, which tokens choose from, ranges are longer."""
    of_layer = num_experts, top_k, hidden_size, intermediate_size
    sizes = *of_layer, training, arch, weight_format, numerics, global_num_experts
    counts: list[int] = []

    def stretch(num_tokens: int) -> tuple[Any, ...]:
        # Beyond few pairs the sort's blocks are again what they were before: a way may come back once.
        return *_way(num_tokens, *sizes), num_tokens * top_k > FEW_PAIRS

    def is_past(num_tokens: int) -> bool:
        return stretch(counts[-1]) != stretch(num_tokens)

    ahead = range(1, _MAX_TOKENS + 1)
    while ahead:
        counts.append(ahead[0])
        ahead = ahead[bisect.bisect_left(ahead, True, key=is_past) :]
    first_of = {_way(count, *sizes): count for count in reversed(counts)}
    return tuple(sorted(first_of.values()))


_GEMMA_4 = Gemma4MoEConfig.gemma4_26b_a4b()
NUM_TOKENS = one_of_each_way(
    _GEMMA_4.num_experts, _GEMMA_4.top_k_experts, _GEMMA_4.hidden_size, _GEMMA_4.moe_intermediate_size
)
"""At the sizes of Gemma 4 26B-A4B."""


def warmup(
    target: nn.Module | Gemma4MoEConfig,
    num_tokens: Iterable[int] | None = None,
    *,
    training: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
) -> None:
    """Compile and load the kernels that calls of these numbers of tokens will use, by making such calls.

    With ``training`` the gradients of such calls are computed too, and dropped: those of hidden states and routing
    weights, and of the parameters that require one, PEFT's adapters among them. So a CUDA-graph capture of a whole
    training step compiles nothing either. It is an argument, because a model that is to be trained can't be told from
    one that was just made: both are in training mode, and all their parameters require gradients.

    Every pair of a call is masked, so no expert's weight is read; layers of one kind on one device are called once.
    Experts with PEFT's adapters are called through them. Weights that accelerate has offloaded are loaded by its hooks
    for each call, where the hooks say. Of experts that transformers has split (tensor or expert parallelism) each
    process calls its own shard, without the others. ``top_k_index`` is int64, as :func:`cupymoe.route` and transformers
    have it; calls with int32 compile kernels of their own. Nothing is compiled for modules on the CPU.

    Args:
        target: a module that holds ``Gemma4Router``, ``Gemma4Experts``, ``MoEExperts``, or transformers' experts with
            ``experts_implementation="cupymoe"``; or the sizes of a mixture whose weights are not there yet, for which
            uninitialised ones are allocated meanwhile (1.5 GB for Gemma 4 26B-A4B).
        num_tokens: each at least 1. None: one of every range that kernels are compiled for at the sizes of a layer,
            up to 32768.
        training: whether gradients will be asked for. Those of one layer at a time take memory meanwhile: 1.5 GB for
            Gemma 4 26B-A4B, unless its experts are frozen.
        dtype, device: of the future weights, where ``target`` gives sizes.

    Raises:
        TypeError, ValueError: ``target`` is neither, or holds no mixture; ``num_tokens`` has no positive integer, or
            something else; ``dtype`` is none of weights, or there is no such ``device``.
        ValueError: a ``MoEExperts`` has no ``top_k``.
        ValueError: a parameter of a router or of experts is on the meta device and no hook of accelerate loads it; or
            it is another DTensor, a shard of which is all that this process has, or empty, as ZeRO-3 leaves it.
    """
    counts = None if num_tokens is None else _checked(num_tokens)
    if isinstance(target, Gemma4MoEConfig):
        target = _uninitialised(target, dtype, device)
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a torch.nn.Module or a Gemma4MoEConfig, got {type(target).__name__}")
    found: dict[tuple[Any, ...], _Part] = {}
    for each in sorted(_parts(target), key=_is_offloaded):  # what is there need not be loaded for the calls
        _take_over_codes(each)
        found.setdefault(_kind(each), each)
    # Of hidden states beside experts that have quantised weights alone.
    dtype_beside = next((each.dtype for each in target.parameters() if each.dtype in DTYPES), torch.bfloat16)
    if not found:
        raise ValueError(
            "target must hold a Gemma4Router, a Gemma4Experts, a MoEExperts or experts set to cupymoe; "
            f"{type(target).__name__} holds none"
        )
    for each in found.values():
        with _shards_as_tensors(each.module):
            arch = Arch.of(each.device) if each.device.type == "cuda" else HOPPER
            sizes, weight_format = _sizes(each.module), _weight_format(each.module)
            numerics = _numerics(each.module)
            for count in counts or one_of_each_way(*sizes, training, arch, weight_format, numerics):
                _call(each, count, dtype_beside)
                if training:
                    _call(each, count, dtype_beside, differentiates=True)


def _take_over_codes(each: _Part) -> None:
    """Of transformers' FP8 experts the first call makes the weights quantised ones: of every layer here, also of those
    that are not called."""
    if isinstance(each.module, Gemma4Router | MoEExperts) or _is_offloaded(each):
        return
    from cupymoe.integrations import fp8

    with suppress(ValueError):  # the call says what can't be served, and where it is
        fp8.take_over(each.module, "gate_up_proj", "up_proj", "down_proj")


def _uninitialised(config: Gemma4MoEConfig, dtype: torch.dtype, device: torch.device | str) -> Gemma4MoE:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch sees, got {device}: it sees no CUDA device")
    with torch.device("meta"):
        moe = Gemma4MoE(config)
    for module in moe.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Not to_empty(): it begins with importing sympy, which takes longer than loading the kernels.
            module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device)))
    return moe


def _checked(num_tokens: Iterable[int]) -> list[int]:
    try:
        counts = sorted({operator.index(count) for count in num_tokens})
    except TypeError:
        raise TypeError(f"num_tokens must be an iterable of integers, (1, 64) say, got {num_tokens!r}") from None
    if not counts or counts[0] < 1:
        raise ValueError(f"num_tokens must be positive numbers, got {counts}")
    return counts


class _Part(NamedTuple):
    """A router or experts, and how calls reach them."""

    module: Any
    caller: Any
    """What calls go through: the outermost of PEFT's wrappers, or the module itself."""
    device: torch.device
    """Where a call runs."""
    loader: Any
    """The module around the caller whose hook loads the weights, or None if the caller's own hooks do or none need."""


def _parts(target: nn.Module) -> list[_Part]:
    """Every router and experts of the target, ready to be called."""
    modules = dict(target.named_modules())
    found: dict[nn.Module, _Part] = {}
    module: Any
    for path, module in modules.items():  # from the outside in
        part = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if part in found:
            continue
        if isinstance(part, Gemma4Router | MoEExperts) or are_experts_set_to_cupymoe(part):
            names = path.split(".") if path else []
            around = [modules[".".join(names[:depth])] for depth in range(len(names))]
            found[part] = _Part(part, module, *_place(path, part, module, around))
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
            if hasattr(parameter, "device_mesh") and not _is_called_with_shards(owner):
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


def _is_called_with_shards(module: Any) -> bool:
    """Whether transformers has split a module for tensor or expert parallelism: the forward that it has put around the
    module's own calls that with this process's shards as plain tensors, and speaks with the other processes."""
    return getattr(vars(module).get("forward"), "__module__", "").startswith("transformers.distributed.")


@contextmanager
def _shards_as_tensors(module: Any) -> Iterator[None]:
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


def _is_offloaded(each: _Part) -> bool:
    return any(parameter.is_meta for parameter in each.caller.parameters())


@contextmanager
def _loaded(loader: Any) -> Iterator[None]:
    """The weights that the hook of a module around a part loads are there meanwhile."""
    if loader is None:
        yield
        return
    loader._hf_hook.pre_forward(loader)
    try:
        yield
    finally:
        loader._hf_hook.post_forward(loader, None)


def _device(part: Any) -> torch.device:
    device: torch.device = (part.scale if isinstance(part, Gemma4Router) else part.down_proj).device
    return device


def _dtype(part: Any, beside: torch.dtype) -> torch.dtype:
    """Of the hidden states."""
    return part.scale.dtype if isinstance(part, Gemma4Router) else dtype_of(part, beside)


def _sizes(part: Any) -> tuple[int, int, int, int]:
    """Experts, experts of a token, hidden and intermediate size; of the parameters, which may have been pruned."""
    top_k = experts_per_token(part)
    if isinstance(part, Gemma4Router):
        return len(part.per_expert_scale), top_k, len(part.scale), part.config.moe_intermediate_size
    num_experts, hidden_size, intermediate_size = sizes_of(part)
    return num_experts, top_k, hidden_size, intermediate_size


def _weight_format(part: Any) -> str:
    """Of experts, as :class:`cupymoe.backends.ExpertsCall` has it."""
    weights = (getattr(part, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
    gate_up, down = (weight for weight in weights if weight is not None) if hasattr(part, "down_proj") else (None, None)
    return join_formats(
        gate_up.format if isinstance(gate_up, QuantizedWeight) else None,
        down.format if isinstance(down, QuantizedWeight) else None,
    )


def _numerics(part: Any) -> str:
    own: str | None = getattr(part, "numerics", None)
    return numerics_of(part) if own is None else own


def _kind(each: _Part) -> tuple[Any, ...]:
    """Parts of one kind need the same kernels."""
    part, caller = each.module, each.caller
    if isinstance(part, Gemma4Router):
        settings: tuple[Any, ...] = (part._eps,)
    elif isinstance(part, MoEExperts):
        settings = part.activation, part.backend, part.is_transposed, part.keep
    else:
        from cupymoe.integrations.served import activation_of

        try:
            settings = activation_of(part), keep_of(part)
        except ValueError:
            settings = ()  # its call says where it is and what is in the way
    # A module with a hook may be called where one without is computed as part of something else.
    hooked = tuple(name for name, module in caller.named_modules() if hooks_of(module) or "forward" in vars(module))
    parameters = ((name, p.shape, p.dtype, p.requires_grad) for name, p in caller.named_parameters())
    weights = (
        (name, module.format, None if module.scales is None else module.scales.dtype)
        for name, module in caller.named_modules()
        if isinstance(module, QuantizedWeight)
    )
    return (
        *(type(part), type(caller), each.device, _sizes(part), _numerics(part), settings, hooked),
        *parameters,
        *weights,
    )


def _call(each: _Part, num_tokens: int, dtype_beside: torch.dtype, *, differentiates: bool = False) -> None:
    num_experts, top_k, hidden_size, _ = _sizes(each.module)
    device, call = each.device, each.caller
    if _is_called_with_shards(each.module):
        call = partial(type(each.module).forward, each.module)  # the other processes need not call warmup at once
    # Not inference mode, which would stay with the parameters that a hook of accelerate makes anew.
    with _loaded(each.loader), torch.set_grad_enabled(differentiates):
        dtype = _dtype(each.module, dtype_beside)
        arguments = [torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device, requires_grad=differentiates)]
        if not isinstance(each.module, Gemma4Router):
            arguments.append(torch.full((num_tokens, top_k), num_experts, device=device))
            arguments.append(torch.zeros(num_tokens, top_k, device=device, requires_grad=differentiates))
        outputs = call(*arguments)
        if differentiates:
            _differentiate(outputs, [*arguments, *each.caller.parameters()])


def _differentiate(outputs: torch.Tensor | tuple[torch.Tensor, ...], tensors: list[torch.Tensor]) -> None:
    """Compute the gradients of those of the tensors that require one; they stay without."""
    found = [each for each in (outputs if isinstance(outputs, tuple) else (outputs,)) if each.requires_grad]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    torch.autograd.grad(found, wanted, [torch.zeros_like(each) for each in found], allow_unused=True)
