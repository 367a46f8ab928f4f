"""Biases and transposed weights through torch.compile, torch.export and torch.vmap."""

from contextlib import nullcontext

import pytest
import torch

from cupymoe import MoEActivation, fused_experts, ops
from cupymoe.backends import select
from tests.bias_and_layout import random_case
from tests.helpers import laid_out, oracle, random_biases, skip_without_inductor, slow_on_cuda

pytestmark = slow_on_cuda


class Layer(torch.nn.Module):
    """Experts as GPT-OSS keeps them: transposed parameters, and biases."""

    def __init__(self, case, biases):
        super().__init__()
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(weight.mT.contiguous()) for weight in case[1:3])
        self.gate_up_bias, self.down_bias = map(torch.nn.Parameter, biases.values())

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return fused_experts(
            hidden_states,
            self.gate_up_proj.transpose(1, 2),
            self.down_proj.transpose(1, 2),
            top_k_index,
            top_k_weights,
            activation="swigluoai",
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )


@pytest.fixture
def layer(device):
    torch._dynamo.reset()
    case = random_case((False, False), True, device=device)
    biases = random_biases(case)
    transposed_case = laid_out(case, (True, True))
    return (
        Layer(case, biases),
        (case.hidden_states, *case[3:]),
        oracle(transposed_case, MoEActivation.SWIGLUOAI, **biases),
    )


def with_gradients(function, module, inputs):
    module.zero_grad()
    states = inputs[0].clone().requires_grad_()
    output = function(states, *inputs[1:])
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient.is_contiguous() for gradient in gradients)
    return [output.detach(), states.grad, *gradients]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, such as its advice on TF32
def test_compiled_without_a_graph_break(monkeypatch, layer, backend):
    """The weights arrive as transposed, not as copies, in both directions."""
    module, inputs, truth = layer
    asked = []
    monkeypatch.setattr(ops.experts, "select", lambda name, call, *way: asked.append(call) or select(name, call, *way))
    if backend == "inductor":
        skip_without_inductor()
    # A graph in torch's cache may have been compiled for other schemas of our ops.
    caches = torch._inductor.config.patch(force_disable_caches=True) if backend == "inductor" else nullcontext()
    with caches:
        ours = with_gradients(torch.compile(module, fullgraph=True, backend=backend), module, inputs)
    assert [(call.gate_up_transposed, call.down_transposed, call.has_bias) for call in asked] == [(True,) * 3] * 2
    torch.testing.assert_close(ours[0].double(), truth, rtol=1e-4, atol=1e-4)
    for got, expected in zip(ours, with_gradients(module, module, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_exported(layer):
    module, inputs, truth = layer
    program = torch.export.export(module, inputs)
    (node,) = (node for node in program.graph.nodes if "cupymoe" in str(node.target))
    assert [argument.meta["val"].stride() for argument in node.args[1:3]] == [(64 * 80, 1, 80), (40 * 64, 1, 64)]
    torch.testing.assert_close(program.module()(*inputs).double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["gate_up_bias", "down_bias", "gate_up_proj", "down_proj"])
def test_batched_gradients(device, wanted):
    """torch.vmap over the backward."""
    case = random_case((True, True), True, 4, (7, 8, 8, 2), device=device)
    tensors = {**case._asdict(), **random_biases(case)}

    def function(leaf):
        return fused_experts(**{**tensors, wanted: leaf}, activation="gelu_tanh")

    leaf = tensors[wanted].requires_grad_()
    output = function(leaf)
    grads = torch.randn(3, *output.shape, device=device)
    (batched,) = torch.autograd.grad(output, leaf, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, leaf, grad, retain_graph=True)[0] for grad in grads]
    assert each[0].any()
    torch.testing.assert_close(batched, torch.stack(each))


def test_vmap_over_biases():
    case = random_case((True, False), True)
    biases = {name: torch.stack([bias, bias + 1, -bias]) for name, bias in random_biases(case).items()}

    def experts(gate_up_bias, down_bias):
        return fused_experts(*case, activation="gelu_tanh", gate_up_bias=gate_up_bias, down_bias=down_bias)

    each = [experts(*both) for both in zip(*biases.values(), strict=True)]
    assert torch.equal(torch.vmap(experts)(*biases.values()), torch.stack(each))
