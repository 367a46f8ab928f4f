"""The ops of activations: one of each member's own name, one that writes in place, and their backward."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cupymoe import gradients, reference
from cupymoe.activation import MoEActivation
from cupymoe.ops.register import on_device_of, register

member_of = functools.cache(MoEActivation.from_str)
"""What an op's string means; a program that was exported elsewhere may bring parameters that are new here."""


def _activate_into(input: torch.Tensor, output: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    if input.device.type != "cuda":
        # In float64: float32's sigmoid is 0 where bfloat16 still has subnormals.
        return output.copy_(reference.activate(input.double(), activation))
    from cupymoe.kernels.gated_activation import gated_activation

    with on_device_of(input):
        if output.is_contiguous():
            return gated_activation(input.contiguous(), output, activation)
        contiguous = torch.empty_like(output, memory_format=torch.contiguous_format)
        return output.copy_(gated_activation(input.contiguous(), contiguous, activation))


def _new_output(input: torch.Tensor, activation: MoEActivation) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], activation.output_size(input.shape[-1])))


def _moe_activation(input: torch.Tensor, activation: str) -> torch.Tensor:
    member = member_of(activation)
    return _activate_into(input, _new_output(input, member), member)


def _moe_activation_fake(input: torch.Tensor, activation: str) -> torch.Tensor:
    return _new_output(input, member_of(activation))


def _moe_activation_setup(ctx: Any, inputs: tuple[torch.Tensor, str], output: torch.Tensor) -> None:
    input, ctx.activation = inputs
    ctx.save_for_backward(input)


def _moe_activation_grad(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return torch.ops.cupymoe.activation_backward(grad, ctx.saved_tensors[0], ctx.activation), None


register(
    "moe_activation(Tensor input, str activation) -> Tensor",
    _moe_activation,
    _moe_activation_fake,
    _moe_activation_grad,
    _moe_activation_setup,
)


def _register_activation(activation: MoEActivation) -> None:
    def forward(input: torch.Tensor) -> torch.Tensor:
        return _activate_into(input, _new_output(input, activation), activation)

    def fake(input: torch.Tensor) -> torch.Tensor:
        return _new_output(input, activation)

    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        gradient: torch.Tensor = torch.ops.cupymoe.activation_backward(grad, ctx.saved_tensors[0], activation.value)
        return gradient

    register(f"{activation.custom_op_name}(Tensor input) -> Tensor", forward, fake, backward, setup_context)


for _activation in MoEActivation:
    _register_activation(_activation)


def _activation_backward(grad: torch.Tensor, input: torch.Tensor, activation: str) -> torch.Tensor:
    return gradients.activation_backward(grad, input, member_of(activation))


def _activation_backward_fake(grad: torch.Tensor, input: torch.Tensor, activation: str) -> torch.Tensor:
    return input.new_empty(input.shape)


register(
    "activation_backward(Tensor grad, Tensor input, str activation) -> Tensor",
    _activation_backward,
    _activation_backward_fake,
)


def _apply_moe_activation(activation: str, output: torch.Tensor, input: torch.Tensor) -> None:
    _activate_into(input, output, member_of(activation))
    # A kernel writes behind autograd's back, which would use an overwritten tensor that it has saved.
    torch.autograd.graph.increment_version(output)


register(
    "apply_moe_activation(str activation, Tensor(a!) output, Tensor input) -> ()",
    _apply_moe_activation,
    lambda activation, output, input: None,
)
