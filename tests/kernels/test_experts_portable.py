"""The weight stream as cards other than Hopper's run it: each of arch.BUILDS, compiled to PTX, on this card.

``CUPYMOE_TEST_BUILD`` has the tests of test_experts_stream.py run one of them too.
"""

import pytest
import torch

from cupymoe import Gemma4MoEConfig, MoEActivation
from cupymoe.backends import ExpertsTensors, Kept
from cupymoe.backends.fused import FusedBackend, plans_at_once
from cupymoe.kernels import experts_down, experts_up
from cupymoe.kernels.arch import BUILDS
from cupymoe.kernels.cupy_import import import_cupy
from cupymoe.kernels.expert_stream import shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from cupymoe.ops import experts_call
from tests.helpers import laid_out, poison_free_memory, random_biases
from tests.kernels import test_experts_stream_adapters as adapters
from tests.kernels.test_experts_stream import check, odd_case, streamed
from tests.test_lora_fused import random_factors

# (experts, hidden, intermediate, top_k), which fit no tile and no stage.
SIZES = (64, 264, 200, 4)
# A number of tokens for each regime; the last has more pairs than are planned at once.
TOKENS = (1, 16, 40, 128, 400, 1024, 2100)

each_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@each_build
def test_the_numbers_of_tokens_reach_every_regime(build):
    loads = [Load.of(tokens, SIZES[3], SIZES[0]) for tokens in TOKENS]
    every = {regime(Load.of(pairs, 1, experts), SIZES[2], build) for experts in (1, 64) for pairs in range(1, 5000)}
    assert {regime(load, SIZES[2], build) for load in loads} == every
    assert [plans_at_once(load, build) for load in loads] == [True] * 6 + [False]


@pytest.mark.gpu
@each_build
@pytest.mark.parametrize("tokens", [1, 64, 128, 512, 1024])
def test_a_multiprocessor_has_room_for_no_more_blocks_than_the_card_s(tokens, build):
    """Of Gemma 4's regimes, whose rings fill the card's multiprocessor."""
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    chosen = regime(Load.of(tokens, 8, 128), config.moe_intermediate_size, build)
    shape = shape_of(chosen, torch.bfloat16, torch.int64, config.activation, 128, 2816, 704, 8, arch=build)
    for source, tile in ((experts_up, shape.up), (experts_down, shape.down)):
        kernel, _, threads = source._prepared(shape, torch.cuda.current_device())
        shared_bytes = kernel.shared_bytes
        assert shared_bytes > tile.shared_bytes(chosen.tokens)
        driver = import_cupy().cuda.driver
        blocks = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.function, threads, shared_bytes)
        assert blocks == tile.blocks_per_sm


@pytest.mark.gpu
@each_build
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_regime(tokens, dtype, build):
    case = odd_case(tokens, SIZES, MoEActivation.GELU_TANH, dtype)
    poison_free_memory()
    check(streamed(case, MoEActivation.GELU_TANH, build=build), case, MoEActivation.GELU_TANH)


@pytest.mark.gpu
@each_build
@pytest.mark.parametrize("tokens", [1, 16, 128, 1024])
def test_gemma_4(tokens, build):
    case = odd_case(tokens, (128, 2816, 704, 8), MoEActivation.GELU_TANH, torch.bfloat16)
    poison_free_memory()
    check(streamed(case, MoEActivation.GELU_TANH, build=build), case, MoEActivation.GELU_TANH)


@pytest.mark.gpu
@each_build
@pytest.mark.parametrize("tokens", TOKENS)
def test_transposed_interleaved_and_biased(tokens, build):
    activation = MoEActivation.SWIGLUOAI
    case = laid_out(odd_case(tokens, SIZES, activation, torch.bfloat16), (True, True))
    biases = random_biases(case)
    poison_free_memory()
    check(streamed(case, activation, **biases, build=build), case, activation, **biases)


@pytest.mark.gpu
@each_build
def test_sorted_pairs_give_the_bits_of_planned_ones(build):
    """One regime, whoever makes the plan; what is kept for gradients is in the same order."""
    activation = MoEActivation.SILU
    case = odd_case(2100, SIZES, activation, torch.bfloat16)
    first = {name: getattr(case, name)[:2040] for name in ("hidden_states", "top_k_index", "top_k_weights")}
    few = case._replace(**first)
    assert torch.equal(streamed(case, activation, build=build)[:2040], streamed(few, activation, build=build))
    gate_up = case.hidden_states.new_full((2100 * SIZES[3], 2 * SIZES[2]), torch.nan)
    streamed(case, activation, build=build, kept=Kept(gate_up))
    index = case.top_k_index.flatten()
    pairs = torch.where((index >= 0) & (index < SIZES[0]), index, SIZES[0]).sort(stable=True)
    kept = int((pairs.values < SIZES[0]).sum())
    rows = case.hidden_states[pairs.indices[:kept] // SIZES[3]].double()
    counts = torch.bincount(pairs.values[:kept], minlength=SIZES[0]).tolist()
    weights = case.gate_up_proj.double()
    expected = torch.cat([part @ weight.T for part, weight in zip(rows.split(counts), weights, strict=True)])
    found = gate_up[: len(expected)].double()
    assert (found - expected).norm() <= 0.004 * expected.norm()
    assert gate_up[len(expected) :].isnan().all()


@pytest.mark.gpu
@each_build
@pytest.mark.parametrize("tokens", [2, 40, 1200])
def test_as_a_backend(tokens, build):
    """Experts without tokens, and more experts than one block's counters of a small card have room for."""
    sizes = (1024, 136, 72, 6)
    case = odd_case(tokens, sizes, MoEActivation.SILU, torch.bfloat16)
    case.top_k_index[0, 0], case.top_k_index[0, 1] = 0, sizes[0] - 1
    backend, call = FusedBackend(build), experts_call(*case[:4], MoEActivation.SILU)
    assert backend.unsupported_reason(call) is None
    out = torch.full_like(case.hidden_states, torch.nan)
    assert backend.forward(call, ExpertsTensors(*case), out) is out
    check(out, case, MoEActivation.SILU)


@pytest.mark.gpu
@each_build
@pytest.mark.parametrize("layout", [(False, False), (True, True)], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_adapters(tokens, layout, build):
    case = laid_out(odd_case(tokens, SIZES, MoEActivation.GELU_TANH, torch.bfloat16), layout)
    factors = random_factors(case, 16)
    poison_free_memory()
    output = adapters.streamed(case, MoEActivation.GELU_TANH, factors, build)
    adapters.check(output, case, MoEActivation.GELU_TANH, factors)


@pytest.mark.gpu
@each_build
def test_captured_in_a_graph(build):
    case = odd_case(40, SIZES, MoEActivation.SILU, torch.bfloat16)
    expected = streamed(case, MoEActivation.SILU, build=build)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = streamed(case, MoEActivation.SILU, build=build)
    output.fill_(torch.nan)
    graph.replay()
    assert torch.equal(output, expected)
