"""The op of a batch of the experts, and the one that writes into given memory. They have no gradient: a call that will
be differentiated is one of :mod:`cupymoe.ops.experts`, whose rows each chose one expert.

Two ops, and not one with an optional output, because what torch makes functional is a mutating op that returns nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from cupymoe.backends import BatchTensors, select
from cupymoe.ops.activation import member_of
from cupymoe.ops.experts import experts_call
from cupymoe.ops.register import on_device_of, register

_TENSORS = ", ".join(
    f"Tensor{'?' if name in BatchTensors._field_defaults else ''} {name}" for name in BatchTensors._fields
)
_ARGUMENTS = f"{_TENSORS}, str activation, str weight_format"


def _compute(arguments: tuple[Any, ...], output: torch.Tensor, *, is_given: bool) -> None:
    """Write the rows of ``output``, ``[E, max_tokens, H]``, that count, and where it is given no others."""
    *tensors, activation, weight_format = arguments
    tensors[:2] = (tensor.contiguous() for tensor in tensors[:2])
    batch = BatchTensors._make(tensors)
    if output.numel() == 0:
        return
    if batch.down_proj.numel() == 0:  # without an intermediate there is nothing to sum
        output.masked_fill_(batch.counted.unsqueeze(2), 0)
        return
    rows = batch.rows
    call = experts_call(
        rows,
        batch.gate_up_proj,
        batch.down_proj,
        rows[:, :1],  # of the shape that the choice of one expert for each row has
        member_of(activation),
        out=output,
        weight_format=weight_format,
        of_quantised=tensors[4:],
    )
    chosen = select("auto", call)
    with on_device_of(output):
        chosen.forward_batch(call, batch, output, keeps_others=is_given)


def _batched_experts(*arguments: Any) -> torch.Tensor:
    output = torch.empty_like(arguments[0], memory_format=torch.contiguous_format)
    _compute(arguments, output, is_given=False)
    return output


def _batched_experts_fake(hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _batched_experts_out(*arguments: Any) -> None:
    _compute(arguments[:-1], arguments[-1], is_given=True)
    torch.autograd.graph.increment_version(arguments[-1])  # as of fused_experts_out


register(f"batched_experts({_ARGUMENTS}) -> Tensor", _batched_experts, _batched_experts_fake)
register(f"batched_experts_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _batched_experts_out, lambda *arguments: None)
