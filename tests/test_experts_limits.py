"""fused_experts on CUDA where memory ends, and where an index no longer fits 32 bits."""

import gc

import pytest
import torch

from cupymoe import MoEActivation, fused_experts, moe_activation, reference, route
from cupymoe.backends import registry
from cupymoe.ops import experts_call
from tests.helpers import Experts, assert_ulps, max_error, oracle, random_experts, random_routing, rounded_experts

pytestmark = pytest.mark.gpu

GB = 10**9


@pytest.fixture
def _limited_memory():
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def allow(num_bytes):
    """Let torch's allocator reserve so much more than it has now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + num_bytes) / total))


@pytest.mark.usefixtures("_limited_memory")
@pytest.mark.parametrize(
    ("backend", "num_tokens", "top_k", "least_failures"),
    [("fused", 8000, 8, 3), ("grouped", 20_000, 8, 5), ("simt", 8000, 8, 6)],
)
def test_out_of_memory_at_every_point_of_a_call(backend, num_tokens, top_k, least_failures):
    """With a little more memory each time, until it succeeds: torch's error, nothing kept, and the next call works.

    Allocations above 10 MB are segments of their own, so fused's three fail in turn, grouped's five and simt's six; but
    a segment of an earlier test, of which something is left, would serve them.
    """
    gc.collect()
    torch.cuda.empty_cache()
    case = random_experts(num_tokens, 16, 1024, 512, top_k, dtype=torch.bfloat16, device="cuda")

    def call():
        return fused_experts(*case, activation="gelu_tanh", backend=backend)

    expected = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated()
    failures, output = 0, None
    for megabytes in range(0, 4000, 16):
        allow(megabytes * 2**20)
        try:
            output = call()
            break
        except torch.OutOfMemoryError:
            failures += 1
        # Past the except clause, because the traceback keeps what the call had allocated.
        assert torch.cuda.memory_allocated() == kept
    assert failures >= least_failures
    assert torch.equal(output, expected)
    allow(0)
    with pytest.raises(torch.OutOfMemoryError):
        call()
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(call(), expected)


# --- more than 2^31 elements ------------------------------------------------------------------------------------------


def wants(num_bytes):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < num_bytes:
        pytest.skip(f"needs {num_bytes / GB:.0f} GB of free memory, has {free / GB:.0f}")


def random_weights(*shape):
    """Standard normal over the root of the last size, without a second copy."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=shape[-1] ** -0.5)


def check_tokens(output, case, tokens):
    """Elements of some tokens against float64; the others are too many for it."""
    some = Experts(case.hidden_states[tokens], *case[1:3], case.top_k_index[tokens], case.top_k_weights[tokens])
    truth = oracle(some)
    assert max_error(output[tokens], truth) <= 2 * max_error(rounded_experts(some), truth) + 1e-6


def long_case(num_tokens, num_experts, hidden, intermediate, top_k):
    weights, index = random_routing(num_tokens, num_experts, top_k, "cuda")
    return Experts(
        torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device="cuda").normal_(),
        random_weights(num_experts, 2 * intermediate, hidden),
        random_weights(num_experts, hidden, intermediate),
        index,
        weights,
    )


@pytest.mark.parametrize(
    ("backend", "num_tokens", "hidden", "top_k"),
    # The weight stream holds 8192 pairs, so that its rows must be long; no multiple of 16 is left to the tiles.
    [
        ("fused", 1024, 262_216, 8),
        ("fused", 1024, 262_208, 8),
        ("fused", 66_001, 4096, 8),
        ("grouped", 66_001, 4096, 8),
        ("simt", 66_001, 4096, 8),
    ],
)
def test_activations_of_more_than_2_31_elements(backend, num_tokens, hidden, top_k):
    wants(30 * GB)
    assert num_tokens * top_k * hidden > 2**31
    case = long_case(num_tokens, 8, hidden, 64, top_k)
    reason = registry()[backend].unsupported_reason(experts_call(*case[:4], MoEActivation.GELU_TANH))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    case.top_k_index[:, 0] = 7  # the last slots, past 2^31, are of all tokens
    output = fused_experts(*case, activation="gelu_tanh", backend=backend)
    assert output.isfinite().all()
    check_tokens(output, case, torch.tensor([0, 1, num_tokens // 2, num_tokens - 2, num_tokens - 1], device="cuda"))


@pytest.mark.parametrize(
    ("backend", "num_tokens"), [("fused", 5), ("fused", 100), ("fused", 900), ("grouped", 100), ("simt", 100)]
)
def test_weights_of_more_than_2_31_elements(backend, num_tokens):
    """Both projections, read at their ends."""
    wants(40 * GB)
    num_experts, hidden, intermediate = 240, 4096, 2304
    assert num_experts * hidden * intermediate > 2**31
    case = long_case(num_tokens, num_experts, hidden, intermediate, 2)
    case.top_k_index[:, 0] = num_experts - 1
    case.top_k_index[:, 1] = torch.arange(num_tokens, device="cuda") % 7
    output = fused_experts(*case, activation="gelu_tanh", backend=backend)
    check_tokens(output, case, torch.arange(min(num_tokens, 40), device="cuda"))


def test_an_activation_of_more_than_2_31_elements():
    wants(20 * GB)
    columns = 4096
    rows = 2**31 // columns + 3
    input = torch.empty(rows, 2 * columns, dtype=torch.bfloat16, device="cuda").normal_()
    output = moe_activation("gelu_tanh", input)
    for part in (slice(0, 2), slice(-3, None)):
        assert_ulps(output[part], reference.activate(input[part].double(), MoEActivation.GELU_TANH), 0.51)


def test_a_routing_of_more_than_2_31_logits():
    wants(30 * GB)
    num_tokens = 2**31 // 128 + 5
    logits = torch.empty(num_tokens, 128, dtype=torch.bfloat16, device="cuda").normal_()
    weights, index = route(logits, 8)
    for rows in (slice(0, 3), slice(-7, None)):
        truth, expected = reference.route(logits[rows].double(), 8)
        assert torch.equal(index[rows], expected)
        torch.testing.assert_close(weights[rows].double(), truth, rtol=1e-5, atol=0)
