"""The public functions. Each checks its arguments before anything is launched, then calls its torch op."""

from __future__ import annotations

import torch

from cupymoe import ops
from cupymoe.activation import MoEActivation
from cupymoe.backends import BatchTensors
from cupymoe.calls import call_experts, member_of, taken_apart
from cupymoe.checks.batched import check_batch
from cupymoe.checks.experts import check_out
from cupymoe.checks.settings import check_numerics
from cupymoe.checks.tensors import (
    check_activation_input,
    check_same,
    check_served_by_kernel,
    check_shape,
    describe,
    overlap,
)
from cupymoe.kernels.route import MAX_EXPERTS
from cupymoe.lora import LowRank
from cupymoe.weights.quantized import Weight


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
    member = member_of(activation)
    check_activation_input(input, member)
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
    member = member_of(activation)
    given_input, given_output = check_activation_input(input, member), describe("output", output)
    check_shape("output", given_output, (*input.shape[:-1], member.output_size(input.shape[-1])))
    check_same("output", given_output, "input", given_input, dtype=True)
    if torch.is_grad_enabled() and (input.requires_grad or output.requires_grad):
        raise RuntimeError("apply_moe_activation writes in place and has no gradient: use moe_activation")
    if not torch.compiler.is_compiling() and overlap(output, input):
        in_place = not member.is_gated and output.is_set_to(input)
        if not in_place:
            raise ValueError(
                "output must not overlap input, each counting as all memory from its first to its last element (but "
                "an ungated activation may write onto input itself)"
            )
    torch.ops.cupymoe.apply_moe_activation(member.value, output, input)
    return output


def route(
    router_logits: torch.Tensor,
    top_k: int,
    *,
    per_expert_scale: torch.Tensor | None = None,
    renormalize: bool = True,
    numerics: str = "fast",
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
        numerics: ``"fast"``; or ``"invariant"``: the bits of a token's weights depend on its logits and the scales
            alone, as they do on CUDA anyway.

    Returns:
        ``(top_k_weights, top_k_index)``: float32 and int64, ``[T, top_k]``. The weights are differentiable with respect
        to ``router_logits`` and ``per_expert_scale``.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    logits = describe("router_logits", router_logits)
    check_shape("router_logits", logits, (None, None))
    check_served_by_kernel("router_logits", logits)
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
        scale = describe("per_expert_scale", per_expert_scale)
        check_shape("per_expert_scale", scale, (num_experts,))
        check_served_by_kernel("per_expert_scale", scale)
        check_same("per_expert_scale", scale, "router_logits", logits, dtype=False)
    check_numerics(numerics)
    settings = renormalize, numerics
    weights, index = ops.dispatch(torch.ops.cupymoe.route.default, router_logits, top_k, per_expert_scale, *settings)
    return weights, index


def fused_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    activation: MoEActivation | str,
    backend: str = "auto",
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    numerics: str = "fast",
    keep: str = "gate_up",
) -> torch.Tensor:
    """``output[t] = sum over k of w[t, k] * down[e] @ act(gate_up[e] @ x[t])`` with ``e = top_k_index[t, k]``.

    Either product may have a bias added.

    Args:
        hidden_states: ``[T, H]`` floating; copied once if it is not contiguous.
        gate_up_proj: ``[E, 2I, H]`` (``[E, I, H]`` if ungated), the first I rows the gate; SWIGLUOAI has row 2i the
            gate and row 2i + 1 the up of each i. Contiguous, or the ``transpose(1, 2)`` of a contiguous
            ``[E, H, 2I]``; it is never copied. Or a :class:`cupymoe.QuantizedWeight` of this shape.
        down_proj: ``[E, H, I]``, contiguous, or the ``transpose(1, 2)`` of a contiguous ``[E, I, H]``, whichever
            ``gate_up_proj`` is; or a :class:`cupymoe.QuantizedWeight`, whatever ``gate_up_proj`` is. A quantised
            weight is multiplied with hidden states of any dtype: exactly, but for ``grouped``, which rounds it to
            bfloat16 before, and the tiles of ``fused``, which round some formats to 16 bits (docs/quantised.md).
        top_k_index: ``[T, K]`` int32 or int64; copied once if it is not contiguous. An index outside ``[0, E)`` masks
            its pair: it contributes nothing and no weight is read for it (expert parallelism).
        top_k_weights: ``[T, K]`` floating, used in float32 (in float64 where hidden_states is); copied once if it is
            not contiguous or of another dtype.
        activation: a member of the contract, or a spelling that :meth:`MoEActivation.from_str` knows.
        backend: ``"auto"`` (the first that serves the call), ``"fused"``, ``"grouped"``, ``"simt"`` or ``"reference"``.
            The last two are slow. Where no other serves a call on CUDA, ``"auto"`` warns once with a
            :class:`cupymoe.SlowWarning` that says what to do; the environment variable ``CUPYMOE_ON_SLOW`` may be
            ``error`` or ``silent`` instead. The gradients are computed by the same backend, or if it has none by the
            first that does.
        gate_up_bias: ``[E, 2I]`` (``[E, I]`` if ungated), added to ``gate_up[e] @ x[t]`` and in the order of its rows;
            dtype and device of the weights, contiguous. None: no bias.
        down_bias: ``[E, H]``, added to ``down[e] @ act(...)``, before that is weighted; as ``gate_up_bias``.
        out: ``[T, H]``, dtype and device of ``hidden_states``, contiguous, its memory no input's: written and returned.
            None: a new tensor.
        expert_map: ``[global experts]`` int32 or int64: ``top_k_index`` then chooses from all experts, and this says
            which of those here each of them is; one outside ``[0, E)``, -1 say, is not here, which masks its pairs. The
            kernels of ``fused`` read it with the indices, without a launch of its own, so its values may change between
            the replays of a CUDA graph. Copied once if it is not contiguous. None: indices are of those here.
        global_num_experts: how many experts ``top_k_index`` chooses from where only E of them are here, and most pairs
            are masked; None: as many as ``expert_map`` has, or E. It changes no result, only what the kernels are
            chosen for.
        numerics: ``"fast"``; or ``"invariant"``: the bits of a token's output depend on its hidden state, its experts
            and their weights, and on nothing else, such as how many other tokens there are (docs/invariance.md).
            Gradients are computed as with ``"fast"``.
        keep: what a call that will be differentiated keeps for it beside its arguments: ``"gate_up"``, what the
            activation is applied to, ``[T * K, 2I]`` in the dtype of ``hidden_states``; or ``"input"``, nothing, and
            the backward computes gate_up again. Off CUDA, in other dtypes than bfloat16 and float16, where ``simt``
            or the reference computes the gradients, and by an exported graph nothing is kept. The output has the same
            bits.

    Returns:
        ``[T, H]``, dtype and device of ``hidden_states``; empty for T = 0. Differentiable with respect to
        ``hidden_states``, both weights and biases, and ``top_k_weights``; gradients of gradients are computed by the
        reference. The gradient of a weight is laid out as the weight; a quantised one has none.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed; or the backend and why it does
            not serve the call.
        RuntimeError: only a slow backend serves the call on CUDA, and ``CUPYMOE_ON_SLOW`` is ``error``.
    """
    return call_experts(
        hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, None, gate_up_bias, down_bias, out,
        expert_map, global_num_experts, activation, backend, numerics, keep,
    )  # fmt: skip


def batched_experts(
    hidden_states: torch.Tensor,
    expert_num_tokens: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    *,
    activation: MoEActivation | str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``output[e, j] = down[e] @ act(gate_up[e] @ x[e, j])`` of the first ``expert_num_tokens[e]`` rows of each expert.

    The rows lie by expert already, as some exchanges between devices leave them (DeepEP's low latency): nothing is
    gathered, weighted or summed. Nothing waits for the GPU to say how many rows there are, and the numbers may change
    between the replays of a CUDA graph. Other rows are neither read nor written.

    Args:
        hidden_states: ``[E, max_tokens, H]`` floating; copied once, all rows, if it is not contiguous. What the kernels
            are chosen for is that all of them count.
        expert_num_tokens: ``[E]`` int32, on the same device; taken as 0 where negative, and as ``max_tokens`` where
            more. Copied once if it is not contiguous.
        gate_up_proj: as of :func:`fused_experts`, quantised or not.
        down_proj: the same.
        activation: a member of the contract, or a spelling that :meth:`MoEActivation.from_str` knows.
        out: ``[E, max_tokens, H]``, dtype and device of ``hidden_states``, contiguous, its memory no input's: written
            and returned, its other rows left as they are. None: a new tensor, whose other rows are undefined.

    Returns:
        ``[E, max_tokens, H]``, dtype and device of ``hidden_states``. Differentiable with respect to ``hidden_states``
        and both weights: a call that will be differentiated is one of :func:`fused_experts`, whose rows each chose one
        expert, and gradients of other rows are zeros, whatever theirs of the output are.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        RuntimeError: only a slow backend serves the call on CUDA, and ``CUPYMOE_ON_SLOW`` is ``error``.
    """
    member = member_of(activation)
    check_batch(hidden_states, expert_num_tokens, gate_up_proj, down_proj, member)
    gate_up, down, of_quantised, weight_format = taken_apart(gate_up_proj, down_proj)
    batch = BatchTensors(hidden_states, expert_num_tokens, gate_up, down, *of_quantised)
    if out is not None:
        check_out(out, *(each for each in batch if each is not None))
        torch.ops.cupymoe.batched_experts_out(*batch, member.value, weight_format, out)
        return out
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden_states, gate_up, down)):
        rows, _, _, index, weights, *_ = batch.as_routed()
        output = fused_experts(rows, gate_up_proj, down_proj, index, weights, activation=member)
        return output.view(hidden_states.shape)
    computed: torch.Tensor = ops.dispatch(
        torch.ops.cupymoe.batched_experts.default, *batch, member.value, weight_format
    )
    return computed


def lora_experts(
    hidden_states: torch.Tensor,
    gate_up_proj: Weight,
    down_proj: Weight,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_adapter: LowRank | None,
    down_adapter: LowRank | None,
    *,
    activation: MoEActivation | str,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    global_num_experts: int | None = None,
    numerics: str = "fast",
    keep: str = "gate_up",
) -> torch.Tensor:
    """:func:`fused_experts` on weights with ``scaling * b @ a`` added to each, which are never formed.

    The weights may be quantised (QLoRA).

    Args:
        gate_up_adapter: ``a`` ``[E, r, H]``, ``b`` ``[E, 2I, r]`` and ``scaling`` of :class:`cupymoe.LowRank`; None: no
            adapter. Both factors of any rank and strides, on the device of ``hidden_states``, and each of its dtype or
            of float32. Every call copies them, rounded to the dtype of ``hidden_states``, and so does its backward,
            unless they are as the kernels take them already; autograd keeps only the factors themselves.
        down_adapter: the same for ``down_proj``: ``[E, r, I]`` and ``[E, H, r]``.

    Other arguments, result and errors are as of :func:`fused_experts` with ``backend="auto"``; ``fused`` has adapters
    of ranks up to 128. Differentiable with respect to the factors too, whose gradients have their dtypes, and strides
    as ``torch.empty_like``; the gradients of the weights are computed only where they are asked for.

    Raises:
        TypeError, ValueError, RuntimeError: as of :func:`fused_experts`, or naming the adapter.
    """
    return call_experts(
        hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, (gate_up_adapter, down_adapter),
        gate_up_bias, down_bias, None, expert_map, global_num_experts, activation, "auto", numerics, keep,
    )  # fmt: skip
