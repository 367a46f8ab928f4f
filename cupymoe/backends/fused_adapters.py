"""Low-rank adapters on the fused backend: what they add to the products of the tiles, and their own gradients. Those of
the weight stream are packed here too.

A projection adds ``(rows a^T) b^T`` to ``rows W^T``: ``lora_shrink`` makes the first, narrow product, and the tiles
take the second one into their own sums. The way back adds ``(grad b) a`` to ``grad W`` just so.
"""

from __future__ import annotations

import torch

from cupymoe.backends import ExpertsCall, ExpertsTensors
from cupymoe.backends.adapters import adapters_of, new_gradient, packed
from cupymoe.kernels.expert_tiles import AdapterStep
from cupymoe.kernels.lora_back import lora_back, tiling
from cupymoe.kernels.lora_outer import lora_outer
from cupymoe.kernels.lora_shrink import lora_shrink
from cupymoe.kernels.sort_by_expert import SortedPairs
from cupymoe.lora import Packed, padded_rank


def packed_adapters(
    call: ExpertsCall, tensors: ExpertsTensors, pairs: SortedPairs | None = None
) -> tuple[Packed | None, Packed | None]:
    """Those of gate_up_proj and down_proj, as the kernels take them.

    Args:
        call: what is computed.
        tensors: what it is computed with.
        pairs: what the launch before gives, if that is the sort: it may still run then, and holds what it works on.
    """
    if not call.adapter_rank:
        return None, None
    gate_up, down = packed(
        adapters_of(call, tensors), (tensors.gate_up_proj, tensors.down_proj), old_factors=pairs is not None
    )
    return gate_up, down


def ranks_of(call: ExpertsCall, tensors: ExpertsTensors) -> tuple[int, int]:
    """Of both weights' adapters, as they are padded; 0 where there is none."""
    if not call.adapter_rank:
        return 0, 0
    gate_up, down = (0 if a is None else padded_rank(a.shape[1]) for a in (tensors.gate_up_a, tensors.down_a))
    return gate_up, down


def step(
    adapter: Packed | None,
    rows: torch.Tensor,
    pairs: SortedPairs,
    low: torch.Tensor | None = None,
    *,
    gathered: bool,
) -> AdapterStep | None:
    """What the adapter adds to the products of these rows with its weight.

    Args:
        adapter: of the weight.
        rows: ``[T, in]`` where ``gathered``, else ``[T * K, in]`` in expert order.
        pairs: the sorted pairs.
        low: where the narrow product goes; None: new memory.
        gathered: whether rows are those of tokens.
    """
    if adapter is None:
        return None
    token_of_slot = pairs.token_of_slot if gathered else None
    return AdapterStep(lora_shrink(rows, adapter.a, pairs.expert_offsets, token_of_slot, low), adapter.b)


def step_back(
    adapter: Packed | None,
    low: torch.Tensor | None,
    grad: torch.Tensor,
    pairs: SortedPairs,
    *,
    gathered: bool,
    needs_b: bool,
) -> tuple[AdapterStep | None, torch.Tensor | None]:
    """What the adapter adds to the products of a gradient with the transposed weight, and the gradient of ``b`` as
    :func:`gradients_of` has it. Both come from the same rows, which ``lora_back`` reads once; where it can't, or only
    the first is needed, ``lora_shrink`` makes that, and the second is None.

    Args:
        adapter: of the weight.
        low: what was kept of the narrow product of the forward.
        grad: of the projection's output, ``[T, out]`` where ``gathered``, else ``[T * K, out]`` in expert order.
        pairs: the sorted pairs.
        gathered: whether rows are those of tokens.
        needs_b: whether ``b`` needs a gradient.
    """
    if adapter is None:
        return None, None
    back = adapter.transposed()
    its_tiling = None if low is None or not needs_b else tiling(grad.shape[1], low.shape[1])
    if low is None or its_tiling is None:
        return step(back, grad, pairs, gathered=gathered), None
    of_b = new_gradient(adapter.given.b)
    grad_low = lora_back(
        grad,
        back.a,
        low,
        pairs.expert_offsets,
        of_b.transpose(1, 2),
        its_tiling,
        pairs.token_of_slot if gathered else None,
        pairs.weight_of_slot if gathered else None,  # those of rows of slots are in them already
        adapter.given.scaling,
    )
    return AdapterStep(grad_low, back.b), of_b


def gradients_of(
    adapter: Packed,
    back: AdapterStep | None,
    of_b: torch.Tensor | None,
    rows: torch.Tensor,
    low: torch.Tensor | None,
    grad: torch.Tensor,
    pairs: SortedPairs,
    needed: tuple[bool, bool],
    *,
    rows_gathered: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``a`` and ``b`` as they were given, in their dtypes, stored as by ``new_gradient``; None where not
    needed.

    Args:
        adapter: of a projection. A product with its ``b`` is scaled, and one with its ``a`` is not.
        back: what :func:`step_back` gave of ``grad``; None where ``a`` needs no gradient.
        of_b: the gradient of ``b``, if :func:`step_back` made it.
        rows: what the projection was given, or where these are rows of slots, that times the slots' routing weights.
        low: what was kept of the narrow product of the forward; None: it is made again.
        grad: of its output; of it and ``rows`` one has a row for each token, and the other for each slot.
        pairs: the sorted pairs.
        needed: which of the two.
        rows_gathered: whether ``rows`` is the one for tokens.
    """
    of_a = None
    tokens_of_rows, tokens_of_grad = (pairs.token_of_slot, None) if rows_gathered else (None, pairs.token_of_slot)
    if needed[0] and back is not None:
        of_a = new_gradient(adapter.given.a)
        lora_outer(back.low, rows, pairs.expert_offsets, of_a, tokens_of_rows)
    if needed[1] and of_b is None:
        weights = None if rows_gathered else pairs.weight_of_slot  # of what was kept; those of rows are in them already
        if low is None:
            low, weights = lora_shrink(rows, adapter.a, pairs.expert_offsets, tokens_of_rows), None
        of_b = new_gradient(adapter.given.b)
        output, scaling = of_b.transpose(1, 2), adapter.given.scaling
        lora_outer(low, grad, pairs.expert_offsets, output, tokens_of_grad, weights, scaling)
    return of_a, of_b
