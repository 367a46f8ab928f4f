"""The public functions. Each checks its arguments before anything is launched, then calls its torch op."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensor

from cupymoe import ops
from cupymoe.activation import MoEActivation
from cupymoe.backends import check_name
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.route import MAX_EXPERTS
from cupymoe.lora import LowRank
from cupymoe.reference import work_dtype


class _Description(NamedTuple):
    """What most checks look at."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


_attributes = operator.attrgetter("shape", "dtype", "device")  # the same as a plain tuple, at half the cost


def _describe(name: str, tensor: torch.Tensor) -> _Description:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    return _Description(tensor.shape, tensor.dtype, tensor.device)


def _check_shape(name: str, given: _Description, shape: tuple[int | None, ...]) -> None:
    """Rank and the sizes that are not None."""
    if len(given.shape) != len(shape) or any(
        size is not None and size != actual for size, actual in zip(shape, given.shape, strict=True)
    ):
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{expected}], got {list(given.shape)}")


def _check_floating(name: str, given: _Description) -> None:
    if not given.dtype.is_floating_point or given.dtype.itemsize == 1:
        raise TypeError(f"{name} must be a floating-point tensor of at least 16 bits, got {given.dtype}")
    if given.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {given.device}")


def _check_served_by_kernel(name: str, given: _Description) -> None:
    _check_floating(name, given)
    if given.device.type == "cuda" and given.dtype not in SCALARS:
        raise TypeError(
            f"{name} must be bfloat16, float16 or float32 on CUDA, got {given.dtype} "
            "(cupymoe.reference computes any floating dtype)"
        )


def _check_same(name: str, given: _Description, other_name: str, other: _Description, *, dtype: bool) -> None:
    if given.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {given.device}")
    if dtype and given.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}, got {given.dtype}")


def _member(activation: MoEActivation | str) -> MoEActivation:
    return activation if isinstance(activation, MoEActivation) else MoEActivation.from_str(activation)


def _check_activation_input(input: torch.Tensor, activation: MoEActivation) -> _Description:
    given = _describe("input", input)
    _check_served_by_kernel("input", given)
    if not given.shape or (activation.is_gated and given.shape[-1] % 2):
        expected = "[..., 2N]" if activation.is_gated else "[..., N]"
        raise ValueError(f"input must have shape {expected} for {activation.name}, got {list(given.shape)}")
    return given


def moe_activation(activation: MoEActivation | str, input: torch.Tensor) -> torch.Tensor:
    """``act(gate) * up`` in fp32 (in float64 on the CPU), rounded once to the dtype of ``input``.

    Args:
        activation: a member of the contract, or a spelling that :meth:`MoEActivation.from_str` knows.
        input: ``[..., 2N]`` holding ``[gate | up]`` (interleaved for SWIGLUOAI), or ``[..., N]`` for an ungated member;
            bfloat16, float16 or float32 (float64 too on the CPU). Copied once if it is not contiguous.

    Returns:
        ``[..., N]``, same dtype and device. Differentiable with respect to ``input``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    member = _member(activation)
    _check_activation_input(input, member)
    output: torch.Tensor
    if member is member.member:
        output = getattr(torch.ops.cupymoe, member.custom_op_name)(input)
    else:
        output = torch.ops.cupymoe.moe_activation(input, member.value)
    return output


def gelu_tanh_and_mul(input: torch.Tensor) -> torch.Tensor:
    """``gelu_tanh(gate) * up`` of ``[..., 2N]``: Gemma 4's expert activation.

    ``gelu_tanh(x) = 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``, Hendrycks and Gimpel, arXiv:1606.08415.
    Arguments, result and errors as :func:`moe_activation`.
    """
    return moe_activation(MoEActivation.GELU_TANH, input)


def apply_moe_activation(activation: MoEActivation | str, output: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """Write ``act(gate) * up`` of ``input`` into ``output`` and return it: vLLM's calling convention.

    Args:
        activation: as for :func:`moe_activation`.
        output: ``[..., N]``, dtype and device of ``input``; written through a copy if it is not contiguous.
            It may be ``input`` itself for an ungated member, and may not overlap it otherwise: what lies between its
            first and its last element counts, and ``torch.compile`` does not look.
        input: as for :func:`moe_activation`.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        RuntimeError: a gradient was asked for; :func:`moe_activation` is the differentiable form.
    """
    member = _member(activation)
    given_input, given_output = _check_activation_input(input, member), _describe("output", output)
    _check_shape("output", given_output, (*input.shape[:-1], member.output_size(input.shape[-1])))
    _check_same("output", given_output, "input", given_input, dtype=True)
    if torch.is_grad_enabled() and (input.requires_grad or output.requires_grad):
        raise RuntimeError("apply_moe_activation writes in place and has no gradient: use moe_activation")
    if not torch.compiler.is_compiling() and _overlap(output, input):
        in_place = not member.is_gated and output.is_set_to(input)
        if not in_place:
            raise ValueError(
                "output must not overlap input, from the first to the last element of each (an ungated activation may "
                "write onto input itself)"
            )
    torch.ops.cupymoe.apply_moe_activation(member.value, output, input)
    return output


def _memory_span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first element and past the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * (last + 1)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.device.type == "meta" or isinstance(a, FakeTensor) or not a.numel() or not b.numel():
        return False
    (a_first, a_end), (b_first, b_end) = _memory_span(a), _memory_span(b)
    return a_first < b_end and b_first < a_end


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    per_expert_scale: torch.Tensor | None = None,
    renormalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top k experts of each token and their weights, as transformers' ``Gemma4TextRouter``.

    ``p = softmax(router_logits)`` over all experts in fp32; the k largest, by falling logit, equal logits to the lower
    index; ``w = p / sum of the chosen p`` (``renormalize``); ``w *= per_expert_scale[expert]``.

    Args:
        router_logits: ``[T, E]``, bfloat16, float16 or float32 (float64 too on the CPU), E at most 1024 on CUDA.
            Copied once if it is not contiguous. A row with a NaN or +inf has NaN weights, and still k valid indices.
        top_k: 1 to E.
        per_expert_scale: ``[E]``, of a dtype that ``router_logits`` may have, same device, or None. Copied once if it
            is not contiguous.
        renormalize: whether the chosen weights are divided by their sum.

    Returns:
        ``(top_k_weights, top_k_index)``: float32 and int64, ``[T, top_k]``. The weights are differentiable with respect
        to ``router_logits`` and ``per_expert_scale``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    logits = _describe("router_logits", router_logits)
    _check_shape("router_logits", logits, (None, None))
    _check_served_by_kernel("router_logits", logits)
    num_experts = router_logits.shape[1]
    if not isinstance(top_k, int | torch.SymInt) or isinstance(top_k, bool):
        raise TypeError(f"top_k must be an integer, got {top_k!r}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be between 1 and the number of experts {num_experts}, got {top_k}")
    if not isinstance(renormalize, bool):
        raise TypeError(f"renormalize must be True or False, got {renormalize!r}")
    if logits.device.type == "cuda" and num_experts > MAX_EXPERTS:
        raise ValueError(f"router_logits must have at most {MAX_EXPERTS} experts on CUDA, got {num_experts}")
    if per_expert_scale is not None:
        scale = _describe("per_expert_scale", per_expert_scale)
        _check_shape("per_expert_scale", scale, (num_experts,))
        _check_served_by_kernel("per_expert_scale", scale)
        _check_same("per_expert_scale", scale, "router_logits", logits, dtype=False)
    weights, index = ops.dispatch(torch.ops.cupymoe.route.default, router_logits, top_k, per_expert_scale, renormalize)
    return weights, index


def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    activation: MoEActivation | str,
    backend: str = "auto",
) -> torch.Tensor:
    """``output[t] = sum over k of w[t, k] * down[e] @ act(gate_up[e] @ x[t])`` with ``e = top_k_index[t, k]``.

    Args:
        hidden_states: ``[T, H]`` floating; copied once if it is not contiguous.
        gate_up_proj: ``[E, 2I, H]``, the first I rows the gate (``[E, I, H]`` if ungated), contiguous.
        down_proj: ``[E, H, I]``, contiguous.
        top_k_index: ``[T, K]`` int32 or int64; copied once if it is not contiguous. An index outside ``[0, E)`` masks
            its pair: it contributes nothing and no weight is read for it (expert parallelism).
        top_k_weights: ``[T, K]`` floating, used in float32 (in float64 where hidden_states is); copied once if it is
            not contiguous or of another dtype.
        activation: a member of the contract, or a spelling that :meth:`MoEActivation.from_str` knows.
        backend: ``"auto"`` (the first that serves the call), ``"fused"``, ``"grouped"`` or ``"reference"``.

    Returns:
        ``[T, H]``, dtype and device of ``hidden_states``; empty for T = 0. Differentiable with respect to
        ``hidden_states``, both weights and ``top_k_weights``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; or the backend and why it does
            not serve the call.
    """
    member = _member(activation)
    _describe_and_check_experts(
        hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, activation=member, backend=backend
    )
    if top_k_weights.dtype != (work := work_dtype(hidden_states.dtype)):
        top_k_weights = top_k_weights.to(work)
    output: torch.Tensor = ops.dispatch(
        torch.ops.cupymoe.fused_experts.default,
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        member.value,
        backend,
    )
    return output


def lora_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_adapter: LowRank | None,
    down_adapter: LowRank | None,
    *,
    activation: MoEActivation | str,
) -> torch.Tensor:
    """:func:`fused_experts` on ``gate_up_proj + b @ a`` and ``down_proj + b @ a``, which are never formed.

    Args:
        gate_up_adapter: ``a`` ``[E, r, H]`` and ``b`` ``[E, 2I, r]`` of :class:`cupymoe.LowRank`, any rank and strides,
            dtype and device of ``hidden_states``; None: no adapter. A rank that is no multiple of 8 is padded to one
            in every call.
        down_adapter: the same for ``down_proj``: ``[E, r, I]`` and ``[E, H, r]``.

    Other arguments, result and errors are as of :func:`fused_experts`. Differentiable with respect to the adapters too,
    once; the gradients of the weights are computed only where they are asked for. On CUDA in bfloat16 the kernels of
    the ``grouped`` backend compute it, where it serves the call and the adapters start on 16 bytes; else plain torch,
    one expert after the other.

    Raises:
        TypeError, ValueError: as of :func:`fused_experts`, or naming the adapter.
        RuntimeError: a second derivative is asked for.
    """
    member = _member(activation)
    experts = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
    _describe_and_check_experts(*experts, activation=member, backend="auto")
    adapters: list[torch.Tensor | None] = []
    for name, adapter, weight in (
        ("gate_up_adapter", gate_up_adapter, gate_up_proj),
        ("down_adapter", down_adapter, down_proj),
    ):
        if adapter is not None:
            _check_adapter(name, adapter, weight)
        # Not +=: torch.compile of torch 2.11 does not add a NamedTuple to a list.
        adapters.extend((None, None) if adapter is None else adapter.prepared())
    weights = top_k_weights.to(work_dtype(hidden_states.dtype))
    output: torch.Tensor = torch.ops.cupymoe.lora_experts.default(*experts[:4], weights, *adapters, member.value)
    return output


def _check_adapter(name: str, adapter: LowRank, weight: torch.Tensor) -> None:
    if not isinstance(adapter, LowRank):
        raise TypeError(f"{name} must be a cupymoe.LowRank or None, got {type(adapter).__name__}")
    a, b, base = _describe(f"{name}.a", adapter.a), _describe(f"{name}.b", adapter.b), _describe("weight", weight)
    num_experts, out_size, in_size = weight.shape
    _check_shape(f"{name}.a", a, (num_experts, None, in_size))
    _check_shape(f"{name}.b", b, (num_experts, out_size, a.shape[1]))
    for part, given in (("a", a), ("b", b)):
        _check_same(f"{name}.{part}", given, "hidden_states", base, dtype=True)


def _describe_and_check_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    activation: MoEActivation,
    backend: str,
) -> None:
    if not _is_known(activation, backend, hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
        _check_experts(
            activation,
            backend,
            _describe("hidden_states", hidden_states),
            _describe("gate_up_proj", gate_up_proj),
            _describe("down_proj", down_proj),
            _describe("top_k_index", top_k_index),
            _describe("top_k_weights", top_k_weights),
        )
    if not (gate_up_proj.is_contiguous() and down_proj.is_contiguous()):
        name = "down_proj" if gate_up_proj.is_contiguous() else "gate_up_proj"
        raise ValueError(f"{name} must be contiguous: weights are never copied")


def _is_known(activation: MoEActivation, backend: str, *tensors: torch.Tensor) -> bool:
    """Whether a call of this kind has passed the checks, or does: they cost 20 us, the lookup 2."""
    if torch.compiler.is_compiling() or isinstance(tensors[0], FakeTensor):
        return False  # a traced size has no hash
    try:
        _check_kind(activation, backend, *map(_attributes, tensors))
    except (AttributeError, TypeError, ValueError):
        return False  # the checks say which is no tensor, or what else is wrong
    return True


@functools.lru_cache(maxsize=4096)
def _check_kind(activation: MoEActivation, backend: str, *attributes: tuple[Any, ...]) -> None:
    _check_experts(activation, backend, *(_Description(*each) for each in attributes))


def _check_experts(
    activation: MoEActivation,
    backend: str,
    hidden_states: _Description,
    gate_up_proj: _Description,
    down_proj: _Description,
    top_k_index: _Description,
    top_k_weights: _Description,
) -> None:
    _check_shape("hidden_states", hidden_states, (None, None))
    _check_floating("hidden_states", hidden_states)
    num_tokens, hidden_size = hidden_states.shape
    _check_shape("down_proj", down_proj, (None, hidden_size, None))
    num_experts, _, intermediate_size = down_proj.shape
    _check_shape("gate_up_proj", gate_up_proj, (num_experts, activation.input_size(intermediate_size), hidden_size))
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        _check_same(name, weight, "hidden_states", hidden_states, dtype=True)
    _check_shape("top_k_index", top_k_index, (num_tokens, None))
    if top_k_index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"top_k_index must be int32 or int64, got {top_k_index.dtype}")
    _check_same("top_k_index", top_k_index, "hidden_states", hidden_states, dtype=False)
    _check_shape("top_k_weights", top_k_weights, tuple(top_k_index.shape))
    _check_floating("top_k_weights", top_k_weights)
    _check_same("top_k_weights", top_k_weights, "hidden_states", hidden_states, dtype=False)
    check_name(backend)
