"""experts_up and experts_down on CUDA with low-rank adapters, through whole calls by the weight stream."""

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.backends import ExpertsTensors
from cupymoe.backends.fused import FusedBackend, stream, takes_tiles
from cupymoe.ops import experts_call
from tests.helpers import (
    laid_out,
    max_error,
    no_host_sync,
    poison_free_memory,
    random_biases,
    random_experts,
    relative_error,
    rounded_experts,
)
from tests.kernels.test_experts_stream import ACTIVATIONS, BUILD, CASES, KINDS, odd_case
from tests.test_lora_fused import FACTORS, random_factors

pytestmark = pytest.mark.gpu

GELU_TANH = MoEActivation.GELU_TANH
SIZES = (6, 264, 200, 3)
TOKENS = (2, 7, 20, 45, 100)  # of each regime, at these sizes
ADAPTED = {"both": (True, True), "gate_up": (True, False), "down": (False, True)}


def call_of(case, activation, factors, biases):
    """What the backend is asked, and the tensors, their factors laid out as the weights."""
    given = [factors.get(name) for name in FACTORS]
    for place, weight in enumerate(case[1:3]):
        if not weight.is_contiguous():
            pair = slice(2 * place, 2 * place + 2)
            given[pair] = [None if factor is None else factor.mT.contiguous().mT for factor in given[pair]]
    biases = [biases.get(name) for name in ("gate_up_bias", "down_bias")]
    has_bias = any(bias is not None for bias in biases)
    call = experts_call(*case[:4], activation, given if factors else (), has_bias=has_bias)
    return call, ExpertsTensors(*case, *given, *biases)


def streamed(case, activation, factors, build=BUILD, **biases):
    """The call by the weight stream, whatever the backend would choose."""
    return stream(*call_of(case, activation, factors, biases), arch=build)


def merged(case, factors, dtype):
    """The case with its adapters in the weights, rounded to a dtype."""

    def weight(name):
        plain = getattr(case, f"{name}_proj").to(dtype)
        a, b = (factors.get(f"{name}_{factor}") for factor in "ab")
        return plain if a is None else plain + b.to(dtype) @ a.to(dtype)

    return case._replace(gate_up_proj=weight("gate_up"), down_proj=weight("down"))


def check(output, case, activation, factors, **biases):
    """Not further from float64 than a path that merges and rounds at every step; twice that in any element."""
    wide = merged(case, factors, torch.float64)
    truth = reference.experts(wide.hidden_states.double(), *wide[1:], activation, **biases)
    steps = rounded_experts(merged(case, factors, output.dtype), activation, **biases)
    assert output.isfinite().all()
    assert relative_error(output, truth) <= relative_error(steps, truth)
    assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6


@pytest.mark.parametrize(("sizes", "dtype", "tokens"), CASES)
@pytest.mark.parametrize(("layout", "biased"), KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_kind_of_experts(activation, layout, biased, sizes, dtype, tokens):
    """In every regime; what no kernel wrote is NaN."""
    for num_tokens in tokens:
        case = laid_out(odd_case(num_tokens, sizes, activation, dtype), layout)
        biases, factors = random_biases(case, biased), random_factors(case, 16)
        poison_free_memory()
        check(streamed(case, activation, factors, **biases), case, activation, factors, **biases)


@pytest.mark.parametrize("layout", [(False, False), (True, True)], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("rank", [16, 48, 64, 128])
def test_ranks_and_one_adapter_alone(rank, adapted, layout):
    for num_tokens in TOKENS:
        case = laid_out(odd_case(num_tokens, SIZES, GELU_TANH, torch.bfloat16), layout)
        factors = random_factors(case, rank, ADAPTED[adapted])
        poison_free_memory()
        check(streamed(case, GELU_TANH, factors), case, GELU_TANH, factors)


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 128, 512])
def test_gemma_4_s_sizes(num_tokens, adapted):
    """Where the backend streams; 16 times, so that a launch that does not wait for the one before it would show."""
    case = random_experts(num_tokens, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
    factors = random_factors(case, 16, ADAPTED[adapted])
    call, tensors = call_of(case, GELU_TANH, factors, {})
    assert takes_tiles(call.load, call.hidden_size) == (num_tokens == 512)
    poison_free_memory()
    with no_host_sync():
        output = stream(call, tensors)
    check(output, case, GELU_TANH, factors)
    for _ in range(16):
        poison_free_memory()
        assert torch.equal(stream(call, tensors), output)


@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_calls_in_a_row_do_not_see_each_other_s(num_tokens):
    """Different tokens, adapters and ranks, one call behind the other in the same memory."""
    cases = [random_experts(num_tokens, 128, 512, 224, 8, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    calls = [
        call_of(case, GELU_TANH, random_factors(case, rank), {})
        for case, rank in zip(cases, (16, 16, 32, 128), strict=True)
    ]
    expected = []
    for each in calls:
        torch.cuda.synchronize()
        expected.append(stream(*each))
        torch.cuda.synchronize()
    for _ in range(50):
        outputs = [stream(*each) for each in calls]
        assert all(torch.equal(output, one) for output, one in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [4, 60])
def test_no_pair_is_kept(num_tokens):
    case = random_experts(num_tokens, *SIZES, dtype=torch.bfloat16, device="cuda")
    case.top_k_index.fill_(-1)
    poison_free_memory()
    assert not streamed(case, GELU_TANH, random_factors(case, 16)).any()


@pytest.mark.parametrize("num_tokens", TOKENS[:-1])  # as the backend streams
def test_what_is_kept_changes_no_bit(num_tokens):
    """And gate_up and both narrow products are what they should be, of the kept pairs."""
    case = odd_case(num_tokens, SIZES, GELU_TANH, torch.bfloat16)
    factors = random_factors(case, 48)
    call, tensors = call_of(case, GELU_TANH, factors, {})
    assert not takes_tiles(call.load, call.hidden_size)
    poison_free_memory()
    output, kept = FusedBackend().forward_keeping(call, tensors)
    assert torch.equal(output, stream(call, tensors))
    flat = case.top_k_index.flatten()
    expert = torch.where((flat >= 0) & (flat < SIZES[0]), flat, SIZES[0])
    pairs = expert.argsort(stable=True)[: int((expert < SIZES[0]).sum())]
    expert, rows = expert[pairs], case.hidden_states[pairs // SIZES[3]].double()
    weights = merged(case, factors, torch.float64)
    low = torch.einsum("sk,srk->sr", rows, factors["gate_up_a"].double()[expert])
    gate_up = torch.einsum("sk,snk->sn", rows, weights.gate_up_proj[expert])
    down_low = torch.einsum("sk,srk->sr", reference.activate(gate_up, GELU_TANH), factors["down_a"].double()[expert])
    for found, truth in zip(kept, (gate_up, low, down_low), strict=True):
        assert relative_error(found[: len(pairs)], truth) < 0.005


@pytest.mark.parametrize("num_tokens", [2, 20, 45, 100])
def test_an_adapter_of_zeros_changes_no_bit(num_tokens):
    """Where down_proj's rows are not whole ones: of these the sums have another order without an adapter."""
    case = odd_case(num_tokens, SIZES, GELU_TANH, torch.bfloat16)
    factors = random_factors(case, 16)
    factors["gate_up_b"].zero_(), factors["down_b"].zero_()
    assert torch.equal(streamed(case, GELU_TANH, factors), streamed(case, GELU_TANH, {}))


@pytest.mark.parametrize(("few", "many"), [(2, 16), (17, 32), (33, 128)])
def test_a_token_does_not_depend_on_the_others_of_its_regime(few, many):
    case = random_experts(many, 32, 264, 200, 4, dtype=torch.bfloat16, device="cuda")
    factors = random_factors(case, 16)
    first = case._replace(
        hidden_states=case.hidden_states[:few],
        top_k_index=case.top_k_index[:few],
        top_k_weights=case.top_k_weights[:few],
    )
    assert torch.equal(streamed(first, GELU_TANH, factors), streamed(case, GELU_TANH, factors)[:few])


@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_replays_in_a_cuda_graph(num_tokens):
    case = random_experts(num_tokens, 128, 512, 224, 8, dtype=torch.bfloat16, device="cuda")
    factors = random_factors(case, 16)
    call, tensors = call_of(case, GELU_TANH, factors, {})
    stream(call, tensors)  # compiled before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [stream(call, tensors) for _ in range(3)]
    for _ in range(3):
        case.hidden_states.normal_()
        factors["gate_up_a"].normal_(std=512**-0.5)
        factors["down_a"].normal_(std=224**-0.5)
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        expected = stream(call, tensors)
        assert all(torch.equal(output, expected) for output in outputs)
        check(expected, case, GELU_TANH, factors)


def test_nan_stays_where_it_is():
    """In the rows of one token, whichever block computes it."""
    for num_tokens in (9, 60):
        case = random_experts(num_tokens, 6, 264, 200, 3, dtype=torch.bfloat16, device="cuda")
        case.hidden_states[5] = torch.nan
        output = streamed(case, GELU_TANH, random_factors(case, 16))
        bad = torch.zeros(num_tokens, dtype=torch.bool, device="cuda")
        bad[5] = True
        assert torch.equal(output.isnan().any(-1), bad)
