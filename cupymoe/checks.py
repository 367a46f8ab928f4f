"""What the public functions check of their arguments, before anything is launched.

Each error names the argument, what was given and what is allowed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor

from cupymoe.activation import MoEActivation
from cupymoe.backends import NUMERICS, check_name
from cupymoe.customisation import is_wrapper
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.lora import LowRank
from cupymoe.weights.quantized import QuantizedWeight, Weight


class Description(NamedTuple):
    """What most checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    kind: type


# The same as a plain tuple, at half the cost.
_attributes = operator.attrgetter("shape", "dtype", "device", "__class__")


class _AsPlain(NamedTuple):
    """A quantised weight as most checks see it: as one of the dtype that it is multiplied in."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def is_contiguous(self) -> bool:
        """Its codes always are."""
        return True


def describe(name: str, tensor: torch.Tensor | _AsPlain) -> Description:
    """A tensor's description, or the error of what is none."""
    if not isinstance(tensor, torch.Tensor | _AsPlain):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    kind = torch.Tensor if isinstance(tensor, _AsPlain) else type(tensor)  # torch.compile asks no other class of ours
    return Description(tensor.shape, tensor.dtype, tensor.device, kind)


def _check_plain(name: str, given: Description) -> None:
    if is_wrapper(given.kind):
        raise TypeError(
            f"{name} must be a plain tensor, got {given.kind.__name__}, which wraps another one: pass its local or "
            "dequantised tensor"
        )


def check_shape(name: str, given: Description, shape: tuple[int | None, ...]) -> None:
    """Rank and the sizes that are not None."""
    if len(given.shape) != len(shape) or any(
        size is not None and size != actual for size, actual in zip(shape, given.shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(given.shape)}")


def _check_floating(name: str, given: Description) -> None:
    if not given.dtype.is_floating_point or given.dtype.itemsize == 1:
        raise TypeError(f"{name} must be a floating-point tensor of at least 16 bits, got {given.dtype}")
    if given.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {given.device}")


def check_served_by_kernel(name: str, given: Description) -> None:
    """A dtype that the kernels take, where the tensor is on CUDA."""
    _check_floating(name, given)
    if given.device.type == "cuda" and given.dtype not in SCALARS:
        raise TypeError(
            f"{name} must be bfloat16, float16 or float32 on CUDA, got {given.dtype} "
            "(cupymoe.reference computes any floating dtype)"
        )


def check_same(name: str, given: Description, other_name: str, other: Description, *, dtype: bool) -> None:
    """The device of another argument, and its dtype if that is asked for."""
    if given.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {given.device}")
    if dtype and given.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {given.dtype}")


def check_activation_input(input: torch.Tensor, activation: MoEActivation) -> Description:
    """The input of an activation, which is described."""
    given = describe("input", input)
    check_served_by_kernel("input", given)
    if not given.shape or (activation.is_gated and given.shape[-1] % 2):
        expected = "[..., 2N]" if activation.is_gated else "[..., N]"
        raise ValueError(f"input must have shape {expected} for {activation.name}, got {list(given.shape)}")
    return given


def _memory_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first element and past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * (last + 1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors share memory, from the first to the last element of each."""
    if a.device.type == "meta" or isinstance(a, FakeTensor) or not a.numel() or not b.numel():
        return False
    (a_first, a_end), (b_first, b_end) = _memory_span(a), _memory_span(b)
    return a_first < b_end and b_first < a_end


def check_settings(numerics: str, keep: str) -> None:
    """What a call of the experts asks for is served, or refused by name."""
    if numerics == "fast" and (keep == "gate_up" or keep == "input"):
        return  # what most calls ask for, at a tenth of what the checks cost
    check_numerics(numerics)
    check_keep(keep)


def check_module(name: str, module: object) -> None:
    """It is a module of torch."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")


def check_numerics(numerics: object) -> None:
    """What is asked of the bits of an output is one of the two that can be."""
    if numerics not in NUMERICS:
        raise ValueError(f"numerics must be 'fast' or 'invariant', got {numerics!r}")


def check_keep(keep: object) -> None:
    """What a call that will be differentiated keeps is one of the two that it can."""
    if keep not in ("gate_up", "input"):
        raise ValueError(f"keep must be 'gate_up' or 'input', got {keep!r}")


def check_global_num_experts(given: int, num_experts: int) -> None:
    """No fewer than the experts that are here."""
    if not isinstance(given, int) or isinstance(given, bool):
        raise TypeError(f"global_num_experts must be an integer or None, got {given!r}")
    if given < num_experts:
        raise ValueError(
            f"global_num_experts must be at least {num_experts}, as many as weights are given, got {given}"
        )


def check_expert_map(
    expert_map: torch.Tensor | None,
    global_num_experts: int | None,
    num_experts: int,
    hidden_states: torch.Tensor,
) -> int | None:
    """How many experts there are in all, by ``global_num_experts`` or the map, which agree; None: neither is given."""
    if global_num_experts is not None:
        check_global_num_experts(global_num_experts, num_experts)
    if expert_map is None:
        return global_num_experts
    given = describe("expert_map", expert_map)
    _check_plain("expert_map", given)
    check_shape("expert_map", given, (global_num_experts,))
    if given.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expert_map must be int32 or int64, got {given.dtype}")
    check_same("expert_map", given, "hidden_states", describe("hidden_states", hidden_states), dtype=False)
    count = given.shape[0]
    if count < num_experts:
        raise ValueError(
            "expert_map must have an entry for each expert of the model, at least the "
            f"{num_experts} whose weights are given, got {count}"
        )
    return count


def check_out(out: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Memory that the output of the experts, whose tensors are ``inputs``, can be written into."""
    hidden_states = describe("hidden_states", inputs[0])
    given = describe("out", out)
    _check_plain("out", given)
    check_shape("out", given, tuple(inputs[0].shape))
    check_same("out", given, "hidden_states", hidden_states, dtype=True)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (out, *inputs)):
        raise ValueError("out must be None where a gradient is asked for: call under torch.no_grad(), or leave it out")
    if not torch.compiler.is_compiling() and any(overlap(out, tensor) for tensor in inputs):
        raise ValueError("out must not overlap an input: each counts as all memory from its first to its last element")


def check_adapter(name: str, adapter: LowRank, weight: Weight, hidden_states: torch.Tensor) -> None:
    """An adapter of ``weight``: a number, and plain tensors of its shapes, on the device of ``hidden_states`` and each
    of its dtype or float32.

    As of the call's other tensors, a kind that has passed is only looked up.
    """
    if not isinstance(adapter, LowRank):
        raise TypeError(f"{name} must be a cupymoe.LowRank or None, got {type(adapter).__name__}")
    shape = tuple(weight.shape)
    if not _passed(_check_kind_of_adapter, name, shape, tensors=(adapter.a, adapter.b, hidden_states)):
        a, b = describe(f"{name}.a", adapter.a), describe(f"{name}.b", adapter.b)
        _check_described_adapter(name, shape, a, b, describe("hidden_states", hidden_states))
    if not isinstance(adapter.scaling, int | float | torch.SymFloat) or isinstance(adapter.scaling, bool):
        raise TypeError(f"{name}.scaling must be a number, got {type(adapter.scaling).__name__}")


@functools.lru_cache(maxsize=4096)
def _check_kind_of_adapter(name: str, shape: tuple[int, ...], *attributes: tuple[Any, ...]) -> None:
    _check_described_adapter(name, shape, *(Description(*each) for each in attributes))


def _check_described_adapter(
    name: str, weight_shape: tuple[int, ...], a: Description, b: Description, base: Description
) -> None:
    num_experts, out_size, in_size = weight_shape
    check_shape(f"{name}.a", a, (num_experts, None, in_size))
    check_shape(f"{name}.b", b, (num_experts, out_size, a.shape[1]))
    for part, given in (("a", a), ("b", b)):
        _check_plain(f"{name}.{part}", given)
        check_same(f"{name}.{part}", given, "hidden_states", base, dtype=False)
        if given.dtype not in (base.dtype, torch.float32):
            raise ValueError(
                f"{name}.{part} must have hidden_states's dtype {base.dtype} or torch.float32, got {given.dtype}"
            )


def check_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: MoEActivation,
    backend: str,
) -> None:
    """The arguments of a call of the experts, quantised or not; a kind of call that has passed is only looked up."""
    gate_up: torch.Tensor | _AsPlain
    down: torch.Tensor | _AsPlain
    if isinstance(gate_up_proj, QuantizedWeight) or isinstance(down_proj, QuantizedWeight):
        dtype = describe("hidden_states", hidden_states).dtype
        gate_up, down = _as_plain("gate_up_proj", gate_up_proj, dtype), _as_plain("down_proj", down_proj, dtype)
    else:
        gate_up, down = gate_up_proj, down_proj
    biases = () if gate_up_bias is None and down_bias is None else (gate_up_bias, down_bias)
    tensors = (hidden_states, gate_up, down, top_k_index, top_k_weights, *biases)
    if not _passed(_check_kind, activation, backend, tensors=tensors):
        _check_described(
            activation,
            backend,
            describe("hidden_states", hidden_states),
            describe("gate_up_proj", gate_up),
            describe("down_proj", down),
            describe("top_k_index", top_k_index),
            describe("top_k_weights", top_k_weights),
            None if gate_up_bias is None else describe("gate_up_bias", gate_up_bias),
            None if down_bias is None else describe("down_bias", down_bias),
        )
    if biases:
        _check_bias_layout("gate_up_bias", gate_up_bias)
        _check_bias_layout("down_bias", down_bias)
    if not gate_up.is_contiguous():
        _check_transposed("gate_up_proj", gate_up)
    if not down.is_contiguous():
        _check_transposed("down_proj", down)


def check_batch(
    hidden_states: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    activation: MoEActivation,
) -> None:
    """The arguments of a call of the experts on a batch of rows for each; a kind that has passed is only looked up."""
    dtype = describe("hidden_states", hidden_states).dtype
    weights = _as_plain("gate_up_proj", gate_up_proj, dtype), _as_plain("down_proj", down_proj, dtype)
    tensors = (hidden_states, expert_num_tokens, *weights)
    if not _passed(_check_kind_of_batch, activation, tensors=tensors):
        names = ("hidden_states", "expert_num_tokens", "gate_up_proj", "down_proj")
        _check_described_batch(activation, *map(describe, names, tensors))
    for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True):
        if not weight.is_contiguous():
            _check_transposed(name, weight)


@functools.lru_cache(maxsize=4096)
def _check_kind_of_batch(activation: MoEActivation, *attributes: tuple[Any, ...]) -> None:
    _check_described_batch(activation, *(Description(*each) for each in attributes))


def _check_described_batch(
    activation: MoEActivation,
    hidden_states: Description,
    expert_num_tokens: Description,
    gate_up_proj: Description,
    down_proj: Description,
) -> None:
    for name, given in (
        ("hidden_states", hidden_states),
        ("expert_num_tokens", expert_num_tokens),
        ("gate_up_proj", gate_up_proj),
        ("down_proj", down_proj),
    ):
        _check_plain(name, given)
    check_shape("hidden_states", hidden_states, (None, None, None))
    _check_floating("hidden_states", hidden_states)
    num_experts, _, hidden_size = hidden_states.shape
    check_shape("expert_num_tokens", expert_num_tokens, (num_experts,))
    if expert_num_tokens.dtype != torch.int32:
        raise TypeError(f"expert_num_tokens must be int32, got {expert_num_tokens.dtype}")
    check_same("expert_num_tokens", expert_num_tokens, "hidden_states", hidden_states, dtype=False)
    _check_weights(activation, hidden_states, num_experts, hidden_size, gate_up_proj, down_proj)


def _check_weights(
    activation: MoEActivation,
    hidden_states: Description,
    num_experts: int | None,
    hidden_size: int,
    gate_up_proj: Description,
    down_proj: Description,
) -> None:
    """``[E, 2I, H]`` and ``[E, H, I]``, by ``down_proj`` where ``num_experts`` is None."""
    check_shape("down_proj", down_proj, (num_experts, hidden_size, None))
    num_experts, _, intermediate_size = down_proj.shape
    check_shape("gate_up_proj", gate_up_proj, (num_experts, activation.input_size(intermediate_size), hidden_size))
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_same(name, weight, "hidden_states", hidden_states, dtype=True)


def _as_plain(name: str, weight: Weight, dtype: torch.dtype) -> torch.Tensor | _AsPlain:
    if isinstance(weight, QuantizedWeight):
        weight.check(name)
        return _AsPlain(torch.Size(weight.shape), dtype, weight.device)
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a cupymoe.QuantizedWeight, got {type(weight).__name__}")
    return weight


def _check_transposed(name: str, weight: torch.Tensor | _AsPlain) -> None:
    assert isinstance(weight, torch.Tensor)
    _, rows, columns = weight.shape
    usual = weight.stride() == (rows * columns, 1, rows)  # asked first, because a view takes three times as long
    if not usual and not weight.transpose(1, 2).is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, or the transpose(1, 2) of a contiguous tensor, got strides {weight.stride()}: "
            "weights are never copied"
        )


def _check_bias_layout(name: str, bias: torch.Tensor | None) -> None:
    if bias is not None and not bias.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {bias.stride()}")


def _passed(check: Callable[..., None], *settings: object, tensors: Sequence[torch.Tensor | _AsPlain | None]) -> bool:
    """Whether a call of this kind has passed the cached ``check``, or does: a check costs 20 us, the lookup 2."""
    if torch.compiler.is_compiling() or isinstance(tensors[0], FakeTensor):
        return False  # a traced size has no hash
    try:
        check(*settings, *(None if tensor is None else _attributes(tensor) for tensor in tensors))
    except (AttributeError, TypeError, ValueError):
        return False  # the checks say which is no tensor, or what else is wrong
    return True


@functools.lru_cache(maxsize=4096)
def _check_kind(activation: MoEActivation, backend: str, *attributes: tuple[Any, ...] | None) -> None:
    described: list[Any] = [None if each is None else Description(*each) for each in attributes]
    _check_described(activation, backend, *described)


def _check_described(
    activation: MoEActivation,
    backend: str,
    hidden_states: Description,
    gate_up_proj: Description,
    down_proj: Description,
    top_k_index: Description,
    top_k_weights: Description,
    gate_up_bias: Description | None = None,
    down_bias: Description | None = None,
) -> None:
    for name, given in (
        ("hidden_states", hidden_states),
        ("gate_up_proj", gate_up_proj),
        ("down_proj", down_proj),
        ("top_k_index", top_k_index),
        ("top_k_weights", top_k_weights),
    ):
        _check_plain(name, given)
    check_shape("hidden_states", hidden_states, (None, None))
    _check_floating("hidden_states", hidden_states)
    num_tokens, hidden_size = hidden_states.shape
    _check_weights(activation, hidden_states, None, hidden_size, gate_up_proj, down_proj)
    for name, bias, weight_name, weight in (
        ("gate_up_bias", gate_up_bias, "gate_up_proj", gate_up_proj),
        ("down_bias", down_bias, "down_proj", down_proj),
    ):
        if bias is not None:
            _check_plain(name, bias)
            check_shape(name, bias, tuple(weight.shape[:2]))
            check_same(name, bias, weight_name, weight, dtype=True)
    check_shape("top_k_index", top_k_index, (num_tokens, None))
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"top_k_index must be int32 or int64, got {top_k_index.dtype}")
    check_same("top_k_index", top_k_index, "hidden_states", hidden_states, dtype=False)
    check_shape("top_k_weights", top_k_weights, tuple(top_k_index.shape))
    _check_floating("top_k_weights", top_k_weights)
    check_same("top_k_weights", top_k_weights, "hidden_states", hidden_states, dtype=False)
    check_name(backend)
