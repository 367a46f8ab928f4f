"""The gradients of the fused backend: back through the down projection and the activation, then through gate_up.

    sort -> [gate_up again] -> experts_down_back -> the way back through gate_up -> combine    hidden_states
                                                 -> sum_parts                                  top_k_weights
                                                 -> experts_outer, twice                       the weights
                                                 -> lora_outer, twice [-> pack_adapter]        adapters

All products go by tiles. Where a weight has an adapter, ``pack_adapter`` comes after the sort, and before each product
with it ``lora_back``, which makes the gradient of ``b`` too; or else ``lora_shrink``, and ``lora_outer`` for ``b`` as
for ``a``. Biases' gradients are sums over gathered rows, by another backend's products. What is not asked for is not
computed, but that experts_down_back is made for any gradient behind the down projection.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from cupymoe.backends import DIFFERENTIABLE, ExpertsCall, ExpertsTensors, Kept
from cupymoe.backends.adapters import lay_out_gradients
from cupymoe.backends.expert_rows import dot_with_bias, in_local_experts
from cupymoe.backends.fused_adapters import gradients_of, packed_adapters, ranks_of, step, step_back
from cupymoe.backends.fused_codes import stored_weights
from cupymoe.backends.row_products import GroupedRows, KernelRows, SimtRows
from cupymoe.kernels.coded_tiles import SLOTS, coded_slots
from cupymoe.kernels.combine import combine
from cupymoe.kernels.expert_tiles import TileShape, cut, few_pairs, tile_shape_of
from cupymoe.kernels.experts_down_back_wgmma import experts_down_back_wgmma
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_outer_wgmma import experts_outer_wgmma
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.sort_by_expert import SortedPairs, sort_by_expert
from cupymoe.kernels.stored_weight import StoredWeight
from cupymoe.kernels.sum_parts import sum_parts
from cupymoe.kernels.unsorted_pairs import PairsKind

_THIRD_TICKET = 2
"""The ticket counter that the way back through gate_up takes; the two kernels before it take the others."""


def tile_shape(
    call: ExpertsCall, tensors: ExpertsTensors, *, keeps_gate_up: bool = False, unsorted: PairsKind | None = None
) -> TileShape:
    """What the tiles of a call are compiled for."""
    has_biases = tensors.gate_up_bias is not None, tensors.down_bias is not None
    stored = stored_weights(call, tensors)
    return _tile_shape(call, has_biases, keeps_gate_up, ranks_of(call, tensors), stored, unsorted)


@functools.lru_cache(maxsize=4096)
def _tile_shape(
    call: ExpertsCall,
    has_biases: tuple[bool, bool],
    keeps_gate_up: bool,
    ranks: tuple[int, int],
    stored: tuple[StoredWeight, ...],
    unsorted: PairsKind | None,
) -> TileShape:
    return tile_shape_of(
        *cut(call.load, call.intermediate_size),
        call.dtype,
        call.activation,
        call.num_experts,
        call.hidden_size,
        call.intermediate_size,
        call.gate_up_transposed,
        call.down_transposed,
        *has_biases,
        keeps_gate_up,
        *ranks,
        *stored,
        few_pairs=few_pairs(call.load) if call.is_invariant() else 0,
        coded_slots=coded_slots(call.load) if stored else SLOTS[-1],
        unsorted=unsorted,
    )


def new_kept(call: ExpertsCall, tensors: ExpertsTensors) -> Kept:
    """Memory for what a forward keeps, uninitialised."""
    rows, new_empty = call.num_tokens * call.top_k, tensors.hidden_states.new_empty
    lows = (new_empty((rows, rank)) if rank else None for rank in ranks_of(call, tensors))
    return Kept(new_empty((rows, call.activation.input_size(call.intermediate_size))), *lows)


def _outer_as_weight(
    pairs: SortedPairs,
    weight: torch.Tensor,
    of_slots: torch.Tensor,
    of_tokens: torch.Tensor,
    *,
    is_out_of_slots: bool,
) -> torch.Tensor:
    """The gradient of a weight ``[E, out, in]`` in the layout of the weight, from the gradient of its output and its
    input: one has a row for each slot, the other for each token. ``is_out_of_slots``: whether the first is the output.
    """
    slots_first = is_out_of_slots == weight.is_contiguous()
    left, right = (of_slots, of_tokens) if slots_first else (of_tokens, of_slots)
    outer = experts_outer_wgmma(left, right, pairs, len(weight), left_gathered=not slots_first)
    return outer if weight.is_contiguous() else outer.transpose(1, 2)


def backward(
    call: ExpertsCall,
    tensors: ExpertsTensors,
    kept: Kept | None,
    grad: torch.Tensor,
    needed: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """See :meth:`cupymoe.backends.Backend.backward`."""
    of_states, of_up, of_down, of_weights, of_up_a, of_up_b, of_down_a, of_down_b, of_up_bias, of_down_bias = needed
    if call.has_bias:  # whose gradients are computed by torch
        tensors = in_local_experts(tensors)
    pairs = sort_by_expert(tensors.top_k_index, call.num_experts, tensors.top_k_weights, tensors.expert_map)
    assert pairs.weight_of_slot is not None
    states, shape = tensors.hidden_states, tile_shape(call, tensors)
    grads: dict[str, torch.Tensor | None] = {}
    goes_back = any(needed[:-1])
    up_adapter, down_adapter = packed_adapters(call, tensors, pairs) if goes_back else (None, None)
    if of_down_bias:
        rows = _rows(call, tensors)
        grads["down_bias"] = rows.sums(rows.gather(grad), pairs.weight_of_slot[:, None], call.dtype)
    if not goes_back:
        return tuple(grads.get(name) for name in DIFFERENTIABLE)

    if kept is None:
        kept = new_kept(call, tensors)._replace(down_low=None)
        keeping = tile_shape(call, tensors, keeps_gate_up=True)
        again = step(up_adapter, states, pairs, kept.gate_up_low, gathered=True)
        experts_up_wgmma(states, tensors.gate_up_proj, pairs, keeping, tensors.gate_up_bias, kept.gate_up, again)
    down_step, grad_down_b = step_back(down_adapter, kept.down_low, grad, pairs, gathered=True, needs_b=of_down_b)
    grad_gate_up, weighted, dot_parts = experts_down_back_wgmma(
        grad,
        tensors.down_proj,
        kept.gate_up,
        pairs.weight_of_slot,
        pairs,
        shape,
        down_step,
        stores_weighted=of_down or of_down_a or of_down_b,
    )
    if of_weights:
        of_pairs = sum_parts(dot_parts, pairs.slot_of_pair)
        if tensors.down_bias is not None:
            of_pairs += dot_with_bias(pairs.slot_of_pair, grad.float(), tensors.down_bias, tensors.top_k_index)
        grads["top_k_weights"] = of_pairs
    if weighted is not None:
        if of_down:
            grads["down_proj"] = _outer_as_weight(pairs, tensors.down_proj, weighted, grad, is_out_of_slots=False)
        if down_adapter is not None:
            grads["down_a"], grads["down_b"] = gradients_of(
                down_adapter,
                down_step,
                grad_down_b,
                weighted,
                kept.down_low,
                grad,
                pairs,
                (of_down_a, of_down_b),
                rows_gathered=False,
            )
        del weighted  # before the largest allocation

    up_step = grad_up_b = None
    if of_states or of_up_a:
        up_step, grad_up_b = step_back(
            up_adapter, kept.gate_up_low, grad_gate_up, pairs, gathered=False, needs_b=of_up_b
        )
    if of_up:
        grads["gate_up_proj"] = _outer_as_weight(
            pairs, tensors.gate_up_proj, grad_gate_up, states, is_out_of_slots=True
        )
    if up_adapter is not None:
        grads["gate_up_a"], grads["gate_up_b"] = gradients_of(
            up_adapter,
            up_step,
            grad_up_b,
            states,
            kept.gate_up_low,
            grad_gate_up,
            pairs,
            (of_up_a, of_up_b),
            rows_gathered=True,
        )
    lay_out_gradients(grads, tensors)  # before the largest allocation, too
    if of_up_bias:
        ones = grad_gate_up.new_ones((len(grad_gate_up), 1))
        grads["gate_up_bias"] = _rows(call, tensors).sums(grad_gate_up, ones, call.dtype)
    if of_states:
        back_proj = tensors.gate_up_proj.transpose(1, 2)
        of_slots = experts_down_wgmma(
            grad_gate_up, back_proj, pairs, shape.up_back, adapter=up_step, ticket=_THIRD_TICKET
        )
        grads["hidden_states"] = combine(of_slots, pairs.slot_of_pair, None)
    return tuple(grads.get(name) for name in DIFFERENTIABLE)


def _rows(call: ExpertsCall, tensors: ExpertsTensors) -> KernelRows:
    """Whose sums over an expert's rows are the gradients of biases."""
    rows = GroupedRows if call.dtype == torch.bfloat16 else SimtRows
    return rows(tensors.top_k_index, call.num_experts)
