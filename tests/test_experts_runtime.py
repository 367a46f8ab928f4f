"""fused_experts on CUDA as a running model calls it: bits, graphs, streams, memory, no waiting."""

import pytest
import torch

from cupymoe import fused_experts
from cupymoe.backends import registry
from tests.helpers import Experts, no_host_sync, poison_free_memory, random_experts, random_routing

pytestmark = pytest.mark.gpu

BACKENDS = [name for name in registry() if name != "reference"]
REPLAYS = 1000
NUM_TOKENS = [1, 7, 64, 1000, 3001]  # 1000 tokens of 6 choices are more than one block of the sort; 3001 fill clusters


def random_case(num_tokens):
    return random_experts(num_tokens, 60, 256, 176, 6, dtype=torch.bfloat16, device="cuda")


def run(case, backend):
    return fused_experts(*case, activation="gelu_pytorch_tanh", backend=backend)


def capture(case, backend):
    """A CUDA graph of the call and its output, after a warm-up as torch's documentation wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(case, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run(case, backend)
    return graph, output


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_whatever_the_memory_held(backend, num_tokens):
    """Workspaces and the output come out of memory that is full of NaN, of zeros, and of large numbers."""
    case = random_case(num_tokens)
    case.top_k_index[::3, 0] = -1
    first = run(case, backend)
    assert first.isfinite().all()
    for byte in (0xFF, 0x00, 0x7F):
        poison_free_memory(byte)
        assert torch.equal(run(case, backend), first)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replay_is_eager_bit_for_bit(backend, num_tokens):
    """Also on inputs and a routing that came after the capture."""
    case = random_case(num_tokens)
    eager = run(case, backend)
    graph, output = capture(case, backend)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPLAYS):
        output.fill_(torch.nan)
        graph.replay()
        differing += (output != eager).sum()
    assert differing.item() == 0

    weights, index = random_routing(num_tokens, 60, 6, "cuda")
    index[::2, 1] = 60
    case.hidden_states.copy_(torch.randn_like(case.hidden_states))
    case.top_k_index.copy_(index)
    case.top_k_weights.copy_(weights)
    graph.replay()
    replayed = output.clone()
    assert torch.equal(replayed, run(case, backend))
    assert not torch.equal(replayed, eager)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_host_never_waits(backend, num_tokens):
    case = random_case(num_tokens)
    expected = run(case, backend)
    with no_host_sync():
        output = run(case, backend)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_on_the_current_stream(backend):
    """The inputs are ready only after the stream has slept; on another stream they would be read too early."""
    case = random_case(64)
    expected = run(case, backend)
    late = Experts(torch.zeros_like(case.hidden_states), *case[1:])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.hidden_states.copy_(case.hidden_states)
        output = run(late, backend)
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_do_not_share_workspaces(backend):
    """Two streams at once, many times; each gives its own result."""
    cases = [random_case(64) for _ in range(2)]
    expected = [run(case, backend) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outputs = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[i].append(run(cases[i], backend))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(output, expected[i]) for output in outputs[i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_no_weight(backend):
    """The peak of a small call is far below the weights; at Gemma 4's ratio of hidden to intermediate size."""
    case = random_experts(4, 64, 1408, 352, 8, dtype=torch.bfloat16, device="cuda")
    run(case, backend)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = run(case, backend)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert output.isfinite().all()
    assert peak < case.down_proj.nbytes / 4, f"{peak} bytes at the peak; down_proj has {case.down_proj.nbytes}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    case = random_case(64)
    before = [tensor.clone() for tensor in case]
    run(case, backend)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(case, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_s_bits_do_not_depend_on_its_masked_pairs_weights(backend):
    case = random_case(7)
    index = case.top_k_index.clone()
    index[:, 2] = -1
    weights = case.top_k_weights.clone()
    expected = run(case._replace(top_k_index=index, top_k_weights=weights), backend)
    weights[:, 2] = torch.nan
    assert torch.equal(run(case._replace(top_k_index=index, top_k_weights=weights), backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_device_as_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = random_case(64)
    expected = run(case, backend)
    with torch.cuda.device(1):
        assert torch.equal(run(case, backend), expected)
        assert torch.cuda.current_device() == 1
