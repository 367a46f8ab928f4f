"""The gradients of the fused backend, and what a forward keeps for them."""

import pytest
import torch

from cupymoe import MoEActivation, fused_experts, reference
from tests.helpers import (
    Experts,
    max_error,
    no_host_sync,
    oracle,
    poison_free_memory,
    random_experts,
    relative_error,
    rounded_experts,
    transposed,
)

GELU_TANH = MoEActivation.GELU_TANH
NAMES = ("hidden_states", "gate_up_proj", "down_proj", "top_k_weights")
KEEP = ("gate_up", "input")


def gradients(function, case, grad, dtype=None, wanted=NAMES):
    """The output, and gradients by name."""
    leaves = {name: getattr(case, name).detach().to(dtype).clone() for name in NAMES}
    for name in wanted:
        leaves[name].requires_grad_()
    output = function(*Experts(**leaves, top_k_index=case.top_k_index))
    found = torch.autograd.grad(output, [leaves[name] for name in wanted], grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, found, strict=True))}


def ours(activation=GELU_TANH, **settings):
    settings = {"backend": "fused", **settings}
    return lambda *tensors: fused_experts(*tensors, activation=activation, **settings)


def with_slots(counts, top_k=1, **kwargs):
    """A case whose experts have so many slots."""
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    case = random_experts(len(index) // top_k, len(counts), top_k=top_k, dtype=torch.bfloat16, device="cuda", **kwargs)
    shuffled = index[torch.randperm(len(index))].view(-1, top_k)
    return case._replace(top_k_index=shuffled.cuda())


def assert_close_to_float64(found, case, grad, activation=GELU_TANH):
    """In norm, and elementwise against plain torch that rounds each product."""
    truth = gradients(lambda *tensors: reference.experts(*tensors, activation), case, grad, torch.float64)
    plain = gradients(lambda *tensors: rounded_experts(Experts(*tensors), activation), case, grad)
    for name, expected in truth.items():
        assert relative_error(found[name], expected) <= 0.0045, name
        assert max_error(found[name], expected) <= 2 * max_error(plain[name], expected) + 1e-6, name


# Slots of an expert about 64, the rows of a product, and 128; about 256, where one tile becomes two; and none.
COUNTS = (0, 1, 63, 64, 65, 127, 128, 129, 0, 255, 256, 257, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(272, 72), (64, 256), (2816, 704)], ids=str)
@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
def test_experts_of_any_number_of_slots(activation, sizes):
    case = with_slots(COUNTS, hidden=sizes[0], intermediate=sizes[1], activation=activation)
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    found = gradients(ours(activation), case, grad)
    assert_close_to_float64(found, case, grad, activation)
    for expert in (0, 8, 12):
        assert not found["gate_up_proj"][expert].any()
        assert not found["down_proj"][expert].any()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 100, 400, 1500])
@pytest.mark.parametrize("layout", [(False, False), (True, True)])
def test_the_training_forward_has_the_bits_of_inference(layout, num_tokens):
    """In every regime, whatever is kept; and the kept gate_up gives the gradients that one computed again does."""
    case = random_experts(num_tokens, 16, 192, 88, 4, dtype=torch.bfloat16, device="cuda")
    case.top_k_index[::3, 1] = -1
    case = case._replace(
        **{
            name: transposed(getattr(case, name)) if each else getattr(case, name)
            for name, each in zip(("gate_up_proj", "down_proj"), layout, strict=True)
        }
    )
    grad = torch.randn_like(case.hidden_states)
    plain = fused_experts(*case, activation="gelu_tanh", backend="fused")
    kept, again = (gradients(ours(keep=keep), case, grad) for keep in KEEP)
    assert torch.equal(kept["output"], plain)
    assert torch.equal(again["output"], plain)
    for name in NAMES:
        assert relative_error(kept[name], again[name].double()) < 0.002, name
    assert_close_to_float64(kept, case, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", KEEP)
def test_bits_do_not_change(keep):
    """Over runs, on another stream, and in a CUDA graph of a whole step."""
    case = random_experts(700, 16, 192, 88, 4, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case.hidden_states)
    expected = gradients(ours(keep=keep), case, grad)
    poison_free_memory()
    with no_host_sync():
        again = gradients(ours(keep=keep), case, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = gradients(ours(keep=keep), case, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = gradients(ours(keep=keep), case, grad)
    for tensor in replayed.values():
        tensor.fill_(torch.nan)
    graph.replay()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
        assert torch.equal(elsewhere[name], tensor), name
        assert torch.equal(replayed[name], tensor), name


@pytest.mark.gpu
def test_a_gradient_off_16_bytes():
    """Of a slice, say; and one that is not contiguous."""
    case = random_experts(100, 16, 192, 88, 4, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case.hidden_states)
    expected = gradients(ours(), case, grad)
    off = torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(grad.shape)
    assert off.data_ptr() % 16
    for given in (off, grad.T.contiguous().T):
        found = gradients(ours(), case, given)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.gpu
def test_nan_stays_where_it_is():
    """In the rows and the gradients of one token and of one expert."""
    case = with_slots((40, 70, 90), hidden=192, intermediate=88)
    case.hidden_states[7] = torch.nan
    grad = torch.randn_like(case.hidden_states)
    found = gradients(ours(), case, grad)
    bad_token = torch.zeros(200, dtype=torch.bool, device="cuda")
    bad_token[7] = True
    assert torch.equal(found["hidden_states"].isnan().any(-1), bad_token)
    assert torch.equal(found["top_k_weights"].isnan().any(-1), bad_token)
    bad_expert = torch.arange(3, device="cuda") == case.top_k_index[7]
    for name in ("gate_up_proj", "down_proj"):
        assert torch.equal(found[name].flatten(1).isnan().any(-1), bad_expert), name


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", NAMES)
def test_what_is_not_asked_for_is_not_computed(wanted, monkeypatch):
    """A gradient alone is the same, and no other is computed on its way."""
    from cupymoe.backends import fused_backward

    case = random_experts(100, 16, 192, 88, 4, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case.hidden_states)
    expected = gradients(ours(), case, grad)
    unneeded = {
        "hidden_states": ("sum_parts", "experts_outer_wgmma"),
        "top_k_weights": ("experts_down_wgmma", "combine", "experts_outer_wgmma"),
        "gate_up_proj": ("experts_down_wgmma", "combine", "sum_parts"),
        "down_proj": ("experts_down_wgmma", "combine", "sum_parts"),
    }
    for name in unneeded[wanted]:
        monkeypatch.setattr(fused_backward, name, None)
    assert torch.equal(gradients(ours(), case, grad, wanted=(wanted,))[wanted], expected[wanted])


@pytest.mark.gpu
def test_what_is_kept():
    """Beside the arguments and the output gate_up, or nothing."""
    case = random_experts(512, 16, 256, 128, 4, dtype=torch.bfloat16, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (case.hidden_states, *case[1:3], case.top_k_weights)]

    def kept(keep):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        output = ours(keep=keep)(*leaves[:3], case.top_k_index, leaves[3])
        return torch.cuda.memory_allocated() - before - output.nbytes

    kept("input")  # whatever is allocated once
    assert kept("input") == 0
    assert kept("gate_up") == 512 * 4 * 256 * 2


@pytest.mark.gpu
def test_fp16():
    case = random_experts(300, 16, 192, 88, 4, dtype=torch.float16, device="cuda")
    grad = torch.randn_like(case.hidden_states)
    found = gradients(ours(), case, grad)
    truth = gradients(lambda *tensors: reference.experts(*tensors, GELU_TANH), case, grad, torch.float64)
    for name, expected in truth.items():
        assert relative_error(found[name], expected) <= 0.0006, name


@pytest.mark.gpu
def test_gemma_4_s_sizes():
    """The errors that training promises, on the tokens of two experts."""
    case = random_experts(1500, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    found = gradients(ours(), case, grad)
    assert relative_error(found["output"], oracle(case)) <= 0.0030
    truth = gradients(lambda *tensors: reference.experts(*tensors, GELU_TANH), case, grad, torch.float64)
    for name in NAMES:
        assert relative_error(found[name], truth[name]) <= 0.0035, name


@pytest.mark.gpu
def test_compiled_whole():
    case = random_experts(300, 16, 192, 88, 4, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(case.hidden_states)
    expected = gradients(ours(backend="auto"), case, grad)
    found = gradients(torch.compile(ours(backend="auto"), fullgraph=True), case, grad)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
