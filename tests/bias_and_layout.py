"""Experts with biases and transposed weights, for the tests of that name, and how to get all gradients."""

import itertools

import torch

from cupymoe import MoEActivation, fused_experts, reference
from tests.helpers import Experts, laid_out, random_experts, rounded_experts

ACTIVATIONS = [
    MoEActivation.GELU_TANH,
    MoEActivation.SWIGLUOAI,  # interleaved
    MoEActivation.SWIGLUOAI.with_parameters(limit=0.5, alpha=1.25),
    MoEActivation.RELU2_NO_MUL,  # ungated
]
OFF_THE_KINKS = [activation for activation in ACTIVATIONS if activation.parameters.get("limit") != 0.5]
"""Those that unit-variance products do not clamp: on a kink a rounded input may have another slope altogether."""
EITHER = [*itertools.product([False, True], repeat=2)]
"""Of both projections."""
either = {"ids": lambda pair: "".join("ny"[value] for value in pair)}
NAMES = ("hidden_states", "gate_up_proj", "down_proj", "top_k_weights", "gate_up_bias", "down_bias")


def random_case(layout, masked, num_tokens=33, sizes=(7, 64, 40, 3), **kwargs):
    """Expert 4 has no token; where pairs are masked, token 0 has no expert."""
    case = laid_out(random_experts(num_tokens, *sizes, **kwargs), layout)
    case = case._replace(top_k_weights=case.top_k_weights.to(reference.work_dtype(case.hidden_states.dtype)))
    case.top_k_index[case.top_k_index == 4] = 3
    if masked:
        case.top_k_index[::5, 0], case.top_k_index[1::5, 1], case.top_k_index[0] = -1, 7, -1
    return case


def gradients_of(function, case, biases, grad, dtype=None, activation=MoEActivation.GELU_TANH):
    """The output of a function and its gradients with respect to NAMES; None of a bias that is not there."""
    tensors = {**case._asdict(), **biases}
    leaves = {  # detach() and to() keep the layout
        name: None if tensors[name] is None else tensors[name].detach().to(dtype).clone().requires_grad_()
        for name in NAMES
    }
    output = function(
        *Experts(**{name: leaves.get(name, case.top_k_index) for name in Experts._fields}),
        activation=activation,
        **{name: leaves[name] for name in biases},
    )
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(output, [*wanted.values()], grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def on(backend):
    return lambda *tensors, **kwargs: fused_experts(*tensors, backend=backend, **kwargs)


def in_plain_torch(*tensors, activation, **biases):
    return reference.experts(*tensors, activation, **biases)


def plain(*tensors, activation, **biases):
    return rounded_experts(Experts(*tensors), activation, **biases)
