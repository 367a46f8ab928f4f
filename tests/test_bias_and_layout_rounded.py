"""Biases and transposed weights on every backend, none further from float64 than plain torch that rounds alike."""

import pytest
import torch

from cupymoe import MoEActivation, fused_experts, reference
from cupymoe.backends import expert_rows, registry, row_products
from cupymoe.backends.row_products import GroupedRows, LoopRows
from cupymoe.ops import experts_call
from tests.bias_and_layout import (
    ACTIVATIONS,
    EITHER,
    OFF_THE_KINKS,
    either,
    gradients_of,
    in_plain_torch,
    on,
    plain,
    random_case,
)
from tests.helpers import (
    max_error,
    no_host_sync,
    oracle,
    poison_free_memory,
    random_biases,
    relative_error,
    rounded_experts,
    slow_on_cuda,
)

pytestmark = slow_on_cuda


# --- the grouped GEMM's algebra, on the CPU ---------------------------------------------------------------------------


class OnTheHost(GroupedRows):
    """Grouped's products and biases; what our kernels do is done by torch. The rows of masked pairs are NaN."""

    def __init__(self, top_k_index, num_experts):
        self.loop = LoopRows(top_k_index, num_experts)
        self.slot_of_pair = self.loop.slot_of_pair
        self.offsets = torch.tensor(self.loop.offsets, dtype=torch.int32)

    def poisoned(self, rows):
        rows[self.loop.offsets[-1] :] = torch.nan
        return rows

    def gather(self, states):
        return self.poisoned(self.loop.gather(states).to(states.dtype))

    def combine(self, rows, weights, out=None):
        return self.loop.combine(self.poisoned(rows).float(), weights, out)

    def linear(self, rows, weight, bias=None):
        return self.poisoned(super().linear(rows, weight, bias))

    def activate(self, gate_up, activation):
        return reference.activate(gate_up, activation).to(gate_up.dtype)


@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_grouped_products_on_the_cpu(monkeypatch, activation, biased, layout):
    """No further from float64 than plain torch that rounds where they round; a bias is added in steps of ten rows."""
    monkeypatch.setattr(row_products, "_BIASED_AT_ONCE", 10)
    backend = type("Host", (expert_rows.RowsBackend,), {"rows": OnTheHost})()
    monkeypatch.setattr(type(registry()["reference"]), "forward", lambda _, *arguments: backend.forward(*arguments))
    monkeypatch.setattr(type(registry()["reference"]), "backward", lambda _, *arguments: backend.backward(*arguments))
    case = random_case(layout, True, dtype=torch.bfloat16, activation=activation)
    assert_no_further_than_plain("reference", case, random_biases(case, biased), activation)


def assert_no_further_than_plain(backend, case, biases, activation):
    """In norm, and in any element of the output twice that of plain torch's worst.

    Of a gradient four times: its elements are products of three rounded factors, whose worst scatters more.
    """
    grad = torch.randn_like(case.hidden_states)
    if case.hidden_states.is_cuda:
        poison_free_memory()
    ours = gradients_of(on(backend), case, biases, grad, activation=activation)
    truth = gradients_of(in_plain_torch, case, biases, grad, torch.float64, activation)
    steps = gradients_of(plain, case, biases, grad, activation=activation)
    assert all(ours[name].stride() == getattr(case, name).stride() for name in ("gate_up_proj", "down_proj"))
    for name, expected in truth.items():
        times = 2 if name == "output" else 4
        assert max_error(ours[name], expected) <= times * max_error(steps[name], expected) + 1e-6, name
        limit = relative_error(steps[name], expected) if name == "output" else 0.012
        assert relative_error(ours[name], expected) <= limit, name
    assert not any(ours[name][4].any() for name in ours.keys() & {"gate_up_bias", "down_bias"})


# --- on CUDA ----------------------------------------------------------------------------------------------------------


def skip_unless_served(backend, case, activation, biases):
    has_bias = any(bias is not None for bias in biases.values())
    call = experts_call(*case[:4], activation, has_bias=has_bias)
    if (reason := registry()[backend].unsupported_reason(call)) is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "grouped", "simt"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_on_cuda_in_bfloat16(activation, biased, layout, masked, backend):
    case = random_case(layout, masked, 40, dtype=torch.bfloat16, device="cuda", activation=activation)
    biases = random_biases(case, biased)
    skip_unless_served(backend, case, activation, biases)
    assert_no_further_than_plain(backend, case, biases, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "grouped", "simt"])
@pytest.mark.parametrize("num_tokens", [1, 40, 1000])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_output_on_cuda(activation, biased, layout, num_tokens, backend):
    """Every regime of the kernels, and gates and ups that reach the clamps."""
    case = random_case(layout, num_tokens > 1, num_tokens, (7, 128, 96, 3), dtype=torch.bfloat16, device="cuda",
                       activation=activation)  # fmt: skip
    case, biases = case._replace(hidden_states=case.hidden_states * 4), random_biases(case, biased)
    skip_unless_served(backend, case, activation, biases)
    poison_free_memory()
    output = fused_experts(*case, activation=activation, backend=backend, **biases)
    truth, steps = oracle(case, activation, **biases), rounded_experts(case, activation, **biases)
    if num_tokens > 1:  # the error of one token scatters
        assert relative_error(output, truth) <= relative_error(steps, truth)
    assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["simt", "reference"])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_on_cuda_in_float32(activation, dtype, layout, backend):
    """Computed in float32 (TF32 is off) and rounded once; sizes that fill no pack."""
    case = random_case(layout, True, 33, (7, 51, 29, 3), dtype=dtype, device="cuda", activation=activation)
    biases, grad = random_biases(case), torch.randn_like(case.hidden_states)
    ours = gradients_of(on(backend), case, biases, grad, activation=activation)
    truth = gradients_of(in_plain_torch, case, biases, grad, torch.float64, activation)
    for name, expected in truth.items():
        rounding = torch.finfo(ours[name].dtype).eps / 2
        allowed = {"rtol": max(1.01 * rounding, 1e-5), "atol": 1e-5 * expected.abs().max().item()}
        torch.testing.assert_close(ours[name].double(), expected, **allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "simt"])
@pytest.mark.parametrize("num_tokens", [3, 9000])
def test_the_host_does_not_wait(backend, num_tokens):
    """Forward and backward, the same bits each time; 9000 tokens of 3 choices get their biases in several steps."""
    case = random_case((True, True), True, num_tokens, dtype=torch.bfloat16, device="cuda")
    biases, grad = random_biases(case), torch.randn_like(case.hidden_states)
    expected = gradients_of(on(backend), case, biases, grad)
    with no_host_sync():
        again = gradients_of(on(backend), case, biases, grad)
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
    assert relative_error(expected["output"], oracle(case, **biases)) < 0.006


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "simt"])
def test_replays_in_a_cuda_graph(backend):
    case = random_case((True, True), True, 40, dtype=torch.bfloat16, device="cuda")
    biases = random_biases(case)
    settings = {"activation": "swigluoai", "backend": backend, **biases}
    eager = fused_experts(*case, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused_experts(*case, **settings)
    output.fill_(torch.nan)
    graph.replay()
    assert torch.equal(output, eager)
    biases["down_bias"].add_(1)
    graph.replay()
    assert torch.equal(output, fused_experts(*case, **settings))
    assert not torch.equal(output, eager)


@pytest.mark.gpu
def test_a_bias_takes_little_memory():
    """At most what 8192 of the 32,768 rows take."""
    case = random_case((True, True), False, 16384, (8, 512, 512, 2), dtype=torch.bfloat16, device="cuda")

    def peak(**biases):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_experts(*case, activation="gelu_tanh", backend="grouped", **biases)
        return torch.cuda.max_memory_allocated() - before

    biases = random_biases(case)
    peak(**biases)  # whatever is allocated once
    rows, slots = 8192 * 1024 * 2, 3 * 32768 * 4
    assert peak(**biases) - peak() <= rows + slots + 2**20


@pytest.mark.gpu
def test_biased_experts_of_gpt_oss_s_sizes():
    """20b: 32 experts of 2880, transposed and interleaved, both with bias."""
    activation = MoEActivation.SWIGLUOAI
    case = random_case(
        (True, True), False, 64, (32, 2880, 2880, 4), dtype=torch.bfloat16, device="cuda", activation=activation
    )
    biases = random_biases(case)
    truth, steps = oracle(case, activation, **biases), rounded_experts(case, activation, **biases)
    for backend in ("auto", "grouped"):
        output = fused_experts(*case, activation=activation, backend=backend, **biases)
        assert relative_error(output, truth) <= relative_error(steps, truth)
        assert max_error(output, truth) <= 2 * max_error(steps, truth)
