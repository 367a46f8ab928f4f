"""The slow backend on CUDA: what it serves that no other kernel does, without waiting, and that auto says so, once."""

import warnings

import pytest
import torch

from cupymoe import MoEActivation, SlowWarning, fused_experts
from cupymoe.backends import select, slow
from tests.helpers import (
    DTYPES,
    Experts,
    max_error,
    no_host_sync,
    oracle,
    random_experts,
    random_routing,
    relative_error,
    rounded_experts,
)

pytestmark = pytest.mark.gpu

SIZES = (64, 1024, 512, 8)  # experts, hidden and intermediate size, choices
RELATIVE_ERROR = 0.0018  # of one rounding to bfloat16


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(slow, "_reported", set())
    monkeypatch.delenv(slow.VARIABLE, raising=False)
    select.cache_clear()
    yield
    select.cache_clear()


def in_a_flat_buffer(case):
    """The case with both weights as views of one buffer, two bytes past a multiple of 16."""
    weights = case[1:3]
    buffer = torch.cat((weights[0].new_zeros(1), *(weight.flatten() for weight in weights)))
    _, *flat = buffer.split([1, *(weight.numel() for weight in weights)])
    gate_up, down = (part.view(weight.shape) for part, weight in zip(flat, weights, strict=True))
    assert gate_up.data_ptr() % 16 == down.data_ptr() % 16 == 2
    return case._replace(gate_up_proj=gate_up, down_proj=down)


def unaligned_case(num_tokens):
    return in_a_flat_buffer(random_experts(num_tokens, *SIZES, dtype=torch.bfloat16, device="cuda"))


def on_simt(case, activation="gelu_tanh"):
    return fused_experts(*case, activation=activation, backend="simt")


def auto(case):
    return fused_experts(*case, activation="gelu_tanh")


def check(output, case, activation=MoEActivation.GELU_TANH):
    truth = oracle(case, activation)
    assert output.dtype == case.hidden_states.dtype
    # Sums in another order may differ by eight float32 epsilons of the largest element.
    rounding = 2.0**-20 * truth.abs().max().item()
    assert max_error(output, truth) <= 2 * max_error(rounded_experts(case, activation), truth) + rounding


def test_weights_off_16_bytes_are_right_and_said_once():
    case = unaligned_case(4)
    with pytest.warns(SlowWarning) as caught:
        output = auto(case)
    (text,) = (str(warning.message) for warning in caught)
    assert "fused: hidden_states and both weights must start on 16 bytes; grouped: both weights must start" in text
    assert "To have it fast, start both weights on 16 bytes" in text
    for num_tokens in (4, 1, 9):  # a second warning, for another call of these experts, would be an error here
        weights, index = random_routing(num_tokens, SIZES[0], SIZES[3], "cuda")
        states = torch.randn(num_tokens, SIZES[1], device="cuda", dtype=torch.bfloat16)
        other = Experts(states, *case[1:3], index, weights)
        check(auto(other), other)
    check(output, case)
    assert relative_error(output, oracle(case)) <= RELATIVE_ERROR
    by_reference = fused_experts(*case, activation="gelu_tanh", backend="reference")
    # Both round once, so that they differ where float32 sums in another order round to the other neighbour.
    torch.testing.assert_close(output, by_reference, rtol=2**-7, atol=1e-5)
    assert (output != by_reference).float().mean() < 0.01


def test_alignment_changes_no_bit():
    case = random_experts(40, *SIZES, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(on_simt(in_a_flat_buffer(case)), on_simt(case))


def test_weights_off_16_bytes_in_a_cuda_graph():
    case = unaligned_case(4)
    with pytest.warns(SlowWarning):
        eager = auto(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a second warning would be an error here
        output = auto(case)
    output.fill_(torch.nan)
    graph.replay()
    assert torch.equal(output, eager)
    case.hidden_states.copy_(torch.randn_like(case.hidden_states))
    case.top_k_index.copy_(random_routing(4, SIZES[0], SIZES[3], "cuda")[1])
    graph.replay()
    assert not torch.equal(output, eager)
    assert torch.equal(output, on_simt(case))


def test_the_host_does_not_wait():
    case = unaligned_case(300)
    expected = on_simt(case)
    with no_host_sync():
        output = on_simt(case)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("policy", ["error", "silent"])
def test_what_the_environment_asks_for(monkeypatch, policy):
    monkeypatch.setenv(slow.VARIABLE, policy)
    case = unaligned_case(4)
    for _ in range(2):
        if policy == "error":
            with pytest.raises(RuntimeError, match=r"64 experts of hidden size 1024.* by the slow backend 'simt'"):
                auto(case)
        else:
            with warnings.catch_warnings(record=True) as caught:
                assert torch.equal(auto(case), on_simt(case))
            assert not caught


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", MoEActivation)
def test_any_dtype_and_sizes_of_every_activation(activation, dtype):
    """Hidden and intermediate sizes that fill no pack; masked pairs, and an expert without tokens."""
    for num_tokens in (1, 9, 400):
        case = random_experts(num_tokens, 7, 51, 29, 3, dtype=dtype, device="cuda", activation=activation)
        case.top_k_index[::5, 0] = -1
        case.top_k_index[1::5, 1] = 7
        case = case._replace(top_k_index=case.top_k_index.where(case.top_k_index != 4, 2))
        # Gates and ups that reach the clamps of the SWIGLU members.
        case = case._replace(hidden_states=case.hidden_states * 4)
        check(on_simt(case, activation), case, activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_s_bits_are_its_own(dtype):
    """For every number of tokens beside it."""
    case = random_experts(500, 12, 96, 40, 3, dtype=dtype, device="cuda")
    expected = on_simt(case)
    for count in (1, 17, 100):
        few = Experts(case.hidden_states[:count], *case[1:3], case.top_k_index[:count], case.top_k_weights[:count])
        assert torch.equal(on_simt(few), expected[:count])
