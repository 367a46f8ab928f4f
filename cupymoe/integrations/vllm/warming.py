"""Kernels are compiled and loaded when a layer's weights are, because no capture of a CUDA graph may compile."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from cupymoe.integrations.vllm.served import sizes
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.expert_map import map_kind
from cupymoe.token_counts import one_of_each_way
from cupymoe.weights.format import join_formats
from cupymoe.weights.quantized import QuantizedWeight, Weight


def captured_counts(moe: Any, config: Any) -> list[int]:
    """The numbers of tokens of the CUDA graphs that vLLM will capture, by its ``VllmConfig``."""
    captured = config.compilation_config.cudagraph_capture_sizes or ()
    # Where ranks gather each other's tokens, a call has those of all.
    return sorted({count * ranks for count in captured for ranks in (1, moe.dp_size)})


_warmed: set[Any] = set()
"""Kinds of layers whose kernels are there."""


def warm(method: Any, w13: Weight, w2: Weight, expert_map: torch.Tensor | None) -> None:
    """Call a layer once for each of its kernels, without a token for any expert.

    As :func:`cupymoe.warmup`, but for vLLM's ids, numbers of tokens, and experts that are spread over ranks.

    Args:
        method: of ours; its kernel is there.
        w13, w2: the layer's weights.
        expert_map: the layer's.
    """
    moe, experts = method.moe, method.moe_kernel.fused_experts
    of_layer = *sizes(moe), moe.num_experts, moe.in_dtype, moe.has_bias
    kind = type(experts), experts.member, *of_layer, _kind_of(w13), _kind_of(w2), map_kind(expert_map), w2.device
    if kind in _warmed:
        return
    _warmed.add(kind)
    with torch.inference_mode():
        for hidden_states, ids, counts in _empty_calls(method, _format_of(w13, w2), w2.device):
            experts.apply(
                output=torch.empty_like(hidden_states),
                hidden_states=hidden_states,
                w1=w13,
                w2=w2,
                topk_weights=torch.zeros(ids.shape, device=w2.device),
                topk_ids=ids,
                global_num_experts=moe.num_experts,
                expert_map=expert_map,
                expert_tokens_meta=counts,
                apply_router_weight_on_input=False,
            )


def _kind_of(weight: Weight) -> Any:
    if not isinstance(weight, QuantizedWeight):
        return weight.dtype
    return weight.format.name, None if weight.scales is None else weight.scales.dtype


def _format_of(w13: Weight, w2: Weight) -> str:
    """Of both weights, as a call has it."""
    formats = (weight.format if isinstance(weight, QuantizedWeight) else None for weight in (w13, w2))
    return join_formats(*formats)


def _empty_calls(
    method: Any, weight_format: str, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Hidden states, ids and numbers of tokens by expert of calls like those to come, in which no expert has one."""
    moe, experts = method.moe, method.moe_kernel.fused_experts
    num_experts, top_k, hidden_size, intermediate_size = sizes(moe)

    def new_ids(count: int) -> torch.Tensor:
        return torch.full((count, top_k), -1, dtype=method.topk_indices_dtype or torch.int32, device=device)

    def new_rows(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, hidden_size, dtype=moe.in_dtype, device=device)

    if moe.moe_parallel_config.use_batched_activation_format:
        counts = torch.zeros(num_experts, dtype=torch.int32, device=device)
        rows = new_rows(num_experts, experts.max_num_tokens * experts.num_dispatchers)
        yield rows, new_ids(0), SimpleNamespace(expert_num_tokens=counts)
        return
    ways = one_of_each_way(
        num_experts,
        top_k,
        hidden_size,
        intermediate_size,
        arch=Arch.of(device) if device.type == "cuda" else HOPPER,
        weight_format=weight_format,
        numerics=experts.numerics,
        global_num_experts=moe.num_experts,
    )
    in_steps = [count for count in ways if count <= moe.max_num_tokens]
    for count in sorted({*method.cupymoe_captured, *in_steps}):
        yield new_rows(count), new_ids(count), None
