"""Gradients: by finite differences in float64, and against torch's autograd through the reference."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cupymoe import MoEActivation, fused_experts, gradients, moe_activation, reference, route
from cupymoe.gradients import experts_backward, route_backward, router_logits_backward
from tests.helpers import (
    WITH_PARAMETERS,
    Experts,
    max_error,
    random_experts,
    relative_error,
    rounded_experts,
)


def inputs_off_the_kinks(activation, rows=12, columns=5, dtype=torch.float64):
    """Random, both sides of the clamps reached, nothing within 1e-3 of a kink of the function.

    On a kink torch's own slope changed with 2.14.
    """
    input = 6 * torch.randn(rows, activation.input_size(columns), dtype=torch.float64).to(dtype)
    gates, _ = reference.split_gate_up(input, activation)
    limit = min(activation.parameters.get("limit", 7.0), 7.0)
    kinks = [0.0, limit, -limit]
    if activation.function == "SWIGLUSTEP" and limit < 7.0:
        kinks.append(0.7482)  # where silu is 0.5
    for kink in kinks:
        near = (input - kink).abs() < 1e-3
        input = torch.where(near, kink + 2**-5, input)  # a bfloat16
    assert (gates > limit).any()
    return input.requires_grad_()


@pytest.mark.parametrize("activation", [*MoEActivation, *WITH_PARAMETERS])
def test_activation(activation):
    assert torch.autograd.gradcheck(lambda input: moe_activation(activation, input), inputs_off_the_kinks(activation))


@pytest.mark.parametrize("activation", [*MoEActivation, *WITH_PARAMETERS])
def test_activation_keeps_dtype_and_rounds_once(activation):
    low = inputs_off_the_kinks(activation, dtype=torch.bfloat16)
    moe_activation(activation, low).sum().backward()
    truth = low.detach().double().requires_grad_()
    reference.activate(truth, activation).sum().backward()
    assert low.grad.dtype == torch.bfloat16
    # Half an ulp of bfloat16, at most 2^-8, and what float32 leaves where the two terms of a slope cancel.
    torch.testing.assert_close(low.grad.double(), truth.grad, rtol=2**-8, atol=1e-6)


def test_activation_of_a_strided_input():
    input = torch.randn(8, 6, dtype=torch.float64).T.requires_grad_()
    assert not input.is_contiguous()
    assert torch.autograd.gradcheck(lambda input: moe_activation("gelu_tanh", input), input)


def test_router_logits_backward_is_autograd_through_the_reference():
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 16), (16,), (7, 16))]
    logits = reference.router_logits(*tensors, 1e-3)
    grad = torch.randn_like(logits)
    expected = torch.autograd.grad(logits, tensors, grad)
    got = router_logits_backward(grad, *(tensor.detach() for tensor in tensors), 1e-3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_route_backward_is_autograd_through_the_reference(renormalize, scaled):
    logits = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(7, dtype=torch.float64, requires_grad=True) if scaled else None
    weights, index = reference.route(logits, 3, scale, renormalize)
    grad = torch.randn_like(weights)
    expected = torch.autograd.grad(weights, [logits, scale] if scaled else [logits], grad)
    got = route_backward(grad, logits.detach(), index, scale.detach() if scaled else None, renormalize)
    torch.testing.assert_close(got[: len(expected)], expected, rtol=1e-12, atol=1e-14)
    assert scaled or not got[1].any()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_route(device, renormalize, scaled):
    """The same through the public function, whose weights are float32."""
    logits = torch.randn(9, 7, device=device, requires_grad=True)
    scale = torch.randn(7, device=device, requires_grad=True) if scaled else None
    weights, index = route(logits, 3, per_expert_scale=scale, renormalize=renormalize)
    assert not index.requires_grad
    grad = torch.randn_like(weights)
    weights.backward(grad)
    truth = [tensor.detach().double().requires_grad_() for tensor in ((logits, scale) if scaled else (logits,))]
    reference.route(truth[0], 3, truth[1] if scaled else None, renormalize)[0].backward(grad.double())
    for ours, oracle in zip((logits, scale), truth, strict=False):
        torch.testing.assert_close(ours.grad.double(), oracle.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", [*MoEActivation, MoEActivation.SILU.with_parameters(limit=0.5, alpha=2)])
def test_experts(activation):
    case = random_experts(4, 4, 6, 5, 2, dtype=torch.float64, activation=activation)
    index = torch.tensor([[0, 1], [-1, 2], [1, 4], [2, 0]])  # two masked pairs; expert 3 has no tokens
    differentiable = [tensor.requires_grad_() for tensor in (*case[:3], case.top_k_weights.double())]

    def function(hidden_states, gate_up_proj, down_proj, weights):
        return fused_experts(hidden_states, gate_up_proj, down_proj, index, weights, activation=activation)

    assert torch.autograd.gradcheck(function, differentiable)
    function(*differentiable).sum().backward()
    hidden_grad, gate_up_grad, down_grad, weights_grad = (tensor.grad for tensor in differentiable)
    assert not gate_up_grad[3].any()
    assert not down_grad[3].any()
    assert weights_grad[1, 0] == 0
    assert weights_grad[2, 1] == 0
    assert hidden_grad.any()


INPUTS = ("hidden_states", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        (("hidden_states", "gate_up_proj", "down_proj", "top_k_weights"), 9),
        (("hidden_states", "top_k_weights"), 6),  # frozen weights
        (("hidden_states",), 5),
        (("gate_up_proj",), 5),
        (("down_proj",), 3),
        (("top_k_weights",), 3),
    ],
)
def test_experts_compute_the_gradients_that_are_asked_for(monkeypatch, wanted, products):
    """The others cost nothing, and these are the same bits. Products of ``[I, H]`` with a token; gate_up's are two."""
    case = random_experts(7, 4, 16, 8, 2, dtype=torch.float64)
    grad = torch.randn_like(case.hidden_states)
    asked = []

    def counted(*arguments):
        with FlopCounterMode(display=False) as counter:
            found = experts_backward(*arguments)
        asked.append(counter.get_total_flops() / (2 * 7 * 2 * 16 * 8))
        return found

    monkeypatch.setattr(gradients, "experts_backward", counted)

    def backward(names):
        leaves = {name: tensor.clone().requires_grad_(name in names) for name, tensor in zip(INPUTS, case, strict=True)}
        fused_experts(**leaves, activation="gelu_tanh").backward(grad)
        return {name: leaves[name].grad for name in wanted}

    alone, among_all = backward(wanted), backward({*INPUTS} - {"top_k_index"})
    assert asked == [products, 9]
    for name in wanted:
        assert alone[name].any()
        assert torch.equal(alone[name], among_all[name])


def test_experts_of_no_tokens():
    case = random_experts(0, dtype=torch.float64)
    weights = case.gate_up_proj.requires_grad_()
    fused_experts(*case, activation="gelu_tanh").sum().backward()
    assert weights.grad.shape == weights.shape
    assert not weights.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_keep_dtypes(dtype):
    """Autograd hands each input a gradient of its own dtype, also where top_k_weights come in float32."""
    case = random_experts(8, dtype=dtype)
    differentiable = [tensor.requires_grad_() for tensor in (*case[:3], case.top_k_weights)]
    fused_experts(*case, activation="gelu_tanh").sum().backward()
    assert [tensor.grad.dtype for tensor in differentiable] == [dtype, dtype, dtype, torch.float32]


def gradients_on_cuda(backend, activation, num_tokens=33):
    """Ours, float64's and those of plain torch in bfloat16; some pairs are masked, and expert 4 has no token."""
    case = random_experts(num_tokens, 7, 64, 40, 3, dtype=torch.bfloat16, device="cuda", activation=activation)
    case.top_k_index[::5, 0], case.top_k_index[1::5, 1] = -1, 7
    case.top_k_index[case.top_k_index == 4] = 3
    inputs, grad = (*case[:3], case.top_k_weights), torch.randn_like(case.hidden_states)

    def of(function, dtype=None):
        leaves = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in inputs]
        output = function(*leaves[:3], case.top_k_index, leaves[3])
        return torch.autograd.grad(output, leaves, grad.to(output.dtype))

    poison = torch.full((2**24,), torch.nan, dtype=torch.bfloat16, device="cuda")
    del poison  # what is allocated next holds NaN
    ours = of(lambda *tensors: fused_experts(*tensors, activation=activation, backend=backend))
    truth = of(lambda *tensors: reference.experts(*tensors, activation), torch.float64)
    return ours, truth, of(lambda *tensors: rounded_experts(Experts(*tensors), activation))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["simt", "reference"])
@pytest.mark.parametrize("activation", MoEActivation)
def test_experts_on_cuda_in_float32(activation, backend):
    """Computed in float32 (TF32 is off) and rounded once: at most 2^-8 for bfloat16."""
    ours, truth, _ = gradients_on_cuda(backend, activation)
    for gradient, oracle in zip(ours, truth, strict=True):
        rtol = 2**-8 if gradient.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(gradient.double(), oracle, rtol=rtol, atol=1e-5 * oracle.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "grouped"])
@pytest.mark.parametrize("num_tokens", [33, 700])
@pytest.mark.parametrize("activation", MoEActivation)
def test_experts_on_cuda_in_bfloat16(activation, num_tokens, backend):
    """Rounded after each product: no element is more than twice as far from float64 as plain torch's own worst."""
    ours, truth, rounded = gradients_on_cuda(backend, activation, num_tokens)
    for gradient, oracle, plain in zip(ours, truth, rounded, strict=True):
        assert relative_error(gradient, oracle) < 0.012
        assert max_error(gradient, oracle) <= 2 * max_error(plain, oracle)
    assert not ours[1][4].any()  # of an expert without tokens
    assert not ours[2][4].any()


@pytest.mark.parametrize("activation", MoEActivation)
def test_activation_in_float32(device, activation):
    input = inputs_off_the_kinks(activation).detach().float().to(device).requires_grad_()
    moe_activation(activation, input).sum().backward()
    truth = input.detach().double().requires_grad_()
    reference.activate(truth, activation).sum().backward()
    # Absolute: the two terms of a slope cancel near an extremum, times ups of up to 20.
    torch.testing.assert_close(input.grad.double(), truth.grad, rtol=1e-5, atol=1e-5)
