"""Biases and transposed weights against autograd and the reference: output, every gradient, and adapters."""

import itertools

import pytest
import torch

from cupymoe import LowRank, MoEActivation, fused_experts, lora_experts, reference
from cupymoe.backends import DIFFERENTIABLE, ExpertsTensors, expert_rows
from cupymoe.backends.row_products import LoopRows
from cupymoe.ops import experts_call
from tests.bias_and_layout import (
    ACTIVATIONS,
    EITHER,
    NAMES,
    OFF_THE_KINKS,
    either,
    gradients_of,
    in_plain_torch,
    on,
    random_case,
)
from tests.helpers import laid_out, oracle, random_biases, random_experts, relative_error, slow_on_cuda

pytestmark = slow_on_cuda


@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_reference_is_torch_s_linear(activation, biased):
    """Each pair by itself."""
    case = random_case((False, False), True, dtype=torch.float64, activation=activation)
    biases = random_biases(case, biased)
    up, down = (bias if bias is not None else torch.zeros(7, 1, dtype=torch.float64) for bias in biases.values())
    expected = torch.zeros_like(case.hidden_states)
    for token, k in itertools.product(*map(range, case.top_k_index.shape)):
        expert = int(case.top_k_index[token, k])
        if 0 <= expert < 7:
            gate_up = case.gate_up_proj[expert] @ case.hidden_states[token] + up[expert]
            rows = case.down_proj[expert] @ reference.activate(gate_up, activation) + down[expert]
            expected[token] += rows * case.top_k_weights[token, k]
    torch.testing.assert_close(oracle(case, activation, **biases), expected)


@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_autograd_s_through_the_reference(device, activation, biased, layout):
    case = random_case(layout, True, dtype=torch.float64, device=device, activation=activation)
    biases, grad = random_biases(case, biased), torch.randn_like(case.hidden_states)
    ours = gradients_of(on("auto"), case, biases, grad, activation=activation)
    truth = gradients_of(in_plain_torch, case, biases, grad, activation=activation)
    assert ours.keys() == truth.keys()
    assert all(ours[name].stride() == getattr(case, name).stride() for name in ("gate_up_proj", "down_proj"))
    for name, expected in truth.items():
        assert expected.any(), name
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name in ours.keys() & {"gate_up_bias", "down_bias"}:
        assert not ours[name][4].any()  # of an expert without tokens


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_by_finite_differences(activation):
    case = random_case((True, True), True, 5, (7, 6, 5, 2), dtype=torch.float64, activation=activation)
    leaves = [*case[:3], case.top_k_weights.double(), *random_biases(case).values()]

    def function(states, gate_up, down, weights, gate_up_bias, down_bias):
        tensors = states, gate_up, down, case.top_k_index, weights
        return fused_experts(*tensors, activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias)

    assert torch.autograd.gradcheck(function, [leaf.detach().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("adapted", [False, True])
def test_each_gradient_alone_is_the_same(wanted, adapted):
    """On both ways of the reference: with adapters it computes rows in expert order."""
    case = random_case((True, False), True, dtype=torch.float64)
    biases = random_biases(case)
    adapters = [LowRank(torch.randn(7, 8, 64).double(), torch.randn(7, 80, 8).double()), None] if adapted else None

    def function(*tensors, **kwargs):
        return lora_experts(*tensors, *adapters, **kwargs) if adapted else fused_experts(*tensors, **kwargs)

    grad = torch.randn_like(case.hidden_states)
    among_all = gradients_of(function, case, biases, grad)[wanted]
    tensors = {**case._asdict(), **biases}
    leaf = tensors[wanted].detach().clone().requires_grad_()
    tensors[wanted] = leaf
    function(
        *(tensors[name] for name in case._fields), activation="gelu_tanh", **{n: tensors[n] for n in biases}
    ).backward(grad)
    assert torch.equal(leaf.grad, among_all)


def test_the_gradient_of_the_down_bias_alone_costs_no_product_with_a_weight(monkeypatch):
    case = random_case((False, False), True, dtype=torch.float64)
    biases = random_biases(case)
    rows = LoopRows(case.top_k_index, case.down_proj.shape[0])
    tensors, call = ExpertsTensors(*case, **biases), experts_call(*case[:4], MoEActivation.GELU_TANH, has_bias=True)
    grad = torch.randn_like(case.hidden_states)
    needed = [[name == "down_bias" for name in DIFFERENTIABLE], [True] * len(DIFFERENTIABLE)]
    *_, expected = expert_rows.backward(rows, call, tensors, None, grad, needed[1])
    monkeypatch.setattr(LoopRows, "linear", None)
    *others, found = expert_rows.backward(rows, call, tensors, None, grad, needed[0])
    assert torch.equal(found, expected)
    assert others == [None] * len(others)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivatives(device):
    case = random_case((True, True), True, 9, (7, 16, 8, 2), dtype=torch.float64, device=device)
    biases = random_biases(case)

    def twice(function):
        leaves = [
            tensor.detach().clone().requires_grad_()
            for tensor in (*case[:3], case.top_k_weights.double(), *biases.values())
        ]
        output = function(*leaves[:3], case.top_k_index, leaves[3], leaves[4], leaves[5])
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in grads), leaves)

    ours = twice(
        lambda *tensors: fused_experts(*tensors[:5], activation="silu", gate_up_bias=tensors[5], down_bias=tensors[6])
    )
    truth = twice(lambda *tensors: reference.experts(*tensors[:5], MoEActivation.SILU, *tensors[5:]))
    for name, got, expected in zip(NAMES, ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_the_gradient_of_a_transposed_parameter_is_not_copied():
    """GPT-OSS's parameters are [E, H, 2I] and [E, I, H]: autograd keeps what the op returns."""
    case = random_experts(9)
    parameters = [torch.nn.Parameter(weight.mT.contiguous()) for weight in case[1:3]]
    seen = []
    for parameter in parameters:
        parameter.register_hook(lambda grad: seen.append(grad.data_ptr()))
    output = fused_experts(
        case.hidden_states, *(parameter.transpose(1, 2) for parameter in parameters), *case[3:], activation="silu"
    )
    output.sum().backward()
    assert all(parameter.grad.is_contiguous() for parameter in parameters)
    assert sorted(seen) == sorted(parameter.grad.data_ptr() for parameter in parameters)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_experts_that_no_token_chose(device, num_tokens):
    case = random_case((True, False), False, num_tokens, device=device)
    case = case._replace(top_k_index=torch.full_like(case.top_k_index, -1))
    found = gradients_of(on("auto"), case, random_biases(case), torch.ones_like(case.hidden_states))
    assert [*found] == ["output", *NAMES]
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_a_single_expert_s_stride_does_not_matter(device, dtype, limit):
    case = laid_out(random_experts(5, 1, 64, 40, 1, dtype=dtype, device=device), (True, True))
    case = case._replace(gate_up_proj=case.gate_up_proj[0].unsqueeze(0))
    assert case.gate_up_proj.stride() == (80, 1, 80)
    biases, grad = random_biases(case), torch.randn_like(case.hidden_states)
    ours = gradients_of(on("auto"), case, biases, grad)
    for name, expected in gradients_of(in_plain_torch, case, biases, grad, torch.float64).items():
        assert relative_error(ours[name], expected) <= limit, name


def test_a_masked_expert_s_biases_are_not_read(device):
    case = random_case((False, False), False, device=device, dtype=torch.bfloat16)
    biases = random_biases(case)
    grad = torch.randn_like(case.hidden_states)
    expected = gradients_of(on("auto"), case, biases, grad)
    for bias in biases.values():
        bias[4] = torch.nan
    for name, got in gradients_of(on("auto"), case, biases, grad).items():
        assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_lora_is_the_experts_on_merged_weights(device, activation, layout, dtype):
    """Adapters are [out, in] as ever, whichever way the weights lie."""
    case = random_case(layout, True, dtype=dtype, device=device, activation=activation)
    biases = random_biases(case)
    adapters = [
        LowRank(*(torch.randn(7, *shape, device=device).to(dtype) / 8 for shape in ((8, size[1]), (size[0], 8))))
        for size in (case.gate_up_proj.shape[1:], case.down_proj.shape[1:])
    ]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*case[:3], *biases.values(), *adapters[0][:2])]
    states, gate_up, down, gate_up_bias, down_bias, a, b = leaves
    output = lora_experts(
        states, gate_up, down, *case[3:], LowRank(a, b), adapters[1],
        activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip
    wide = [leaf.double() for leaf in leaves]
    merged = wide[1] + wide[6] @ wide[5], wide[2] + adapters[1].b.double() @ adapters[1].a.double()
    truth = reference.experts(wide[0], *merged, *case[3:], activation, *wide[3:5])
    grad = torch.randn_like(output)
    ours, expected = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(truth, leaves, grad.double())
    limit = 1e-12 if dtype == torch.float64 else 2e-2 if device.type == "cuda" else 4e-3
    for got, wanted in zip((output, *ours), (truth, *expected), strict=True):
        # expected is rounded to the leaves' dtype by the cast that it went through.
        assert relative_error(got, wanted.double()) < limit + (2**-8 if dtype == torch.bfloat16 else 0)
