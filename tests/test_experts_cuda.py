"""fused_experts on CUDA against float64: norms and elements, at Gemma 4's sizes, vLLM's and the awkward ones."""

import pytest
import torch

from cupymoe import Gemma4MoEConfig, MoEActivation, fused_experts
from cupymoe.backends import registry
from cupymoe.ops import experts_call
from tests.helpers import (
    WITH_PARAMETERS,
    Experts,
    max_error,
    oracle,
    random_experts,
    random_routing,
    relative_error,
    rounded_experts,
    transformers_config,
    transformers_gemma4,
)

pytestmark = pytest.mark.gpu

SILU = MoEActivation.SILU
GEMMA = Gemma4MoEConfig.gemma4_26b_a4b()
# At Gemma 4's sizes: the intermediate is rounded once, or twice, or not at all.
BOUND = {"fused": 0.0029, "grouped": 0.0042, "simt": 0.0018}
TRANSFORMERS_ERROR = 0.0042  # of transformers and SGLang at Gemma 4's sizes, in Frobenius norms


@pytest.fixture(params=[name for name in registry() if name != "reference"])
def run(request):
    """fused_experts on one backend; skips what that backend says it does not serve."""

    def call(case, activation=MoEActivation.GELU_TANH):
        reason = registry()[request.param].unsupported_reason(experts_call(*case[:4], activation))
        if reason is not None:
            pytest.skip(f"{request.param}: {reason}")
        return fused_experts(*case, activation=activation, backend=request.param)

    call.backend = request.param
    return call


def calls(case, num_tokens):
    """The calls of num_tokens each that a case is made of."""
    for rows in map(slice, range(0, len(case.hidden_states), num_tokens), range(num_tokens, 10**6, num_tokens)):
        yield Experts(case.hidden_states[rows], *case[1:3], case.top_k_index[rows], case.top_k_weights[rows])


def in_calls_of(run, case, num_tokens, activation=MoEActivation.GELU_TANH):
    return torch.cat([run(call, activation) for call in calls(case, num_tokens)])


def check(run, case, activation=MoEActivation.GELU_TANH):
    """Not further from float64 than a path that rounds at every step: as a whole, and twice that in any element."""
    output, truth = run(case, activation), oracle(case, activation)
    steps = rounded_experts(case, activation)
    assert output.isfinite().all()
    assert relative_error(output, truth) <= relative_error(steps, truth)
    assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6
    return relative_error(output, truth)


@pytest.fixture(scope="module")
def gemma_weights():
    """One layer of Gemma 4 26B-A4B, 1.5 GB."""
    torch.manual_seed(0)
    case = random_experts(
        1,
        GEMMA.num_experts,
        GEMMA.hidden_size,
        GEMMA.moe_intermediate_size,
        GEMMA.top_k_experts,
        dtype=torch.bfloat16,
        device="cuda",
    )
    return case.gate_up_proj, case.down_proj


def gemma_case(weights, num_tokens):
    hidden_states = torch.randn(num_tokens, GEMMA.hidden_size, device="cuda", dtype=torch.bfloat16)
    top_k_weights, index = random_routing(num_tokens, GEMMA.num_experts, GEMMA.top_k_experts, "cuda")
    return Experts(hidden_states, *weights, index, top_k_weights)


@pytest.fixture(scope="module")
def gemma_peers(gemma_weights):
    """transformers' experts on the same parameters, by implementation."""
    peers = {}
    for implementation in ("eager", "grouped_mm"):
        config = transformers_config(
            implementation,
            hidden_size=GEMMA.hidden_size,
            moe_intermediate_size=GEMMA.moe_intermediate_size,
            num_experts=GEMMA.num_experts,
            top_k_experts=GEMMA.top_k_experts,
        )
        with torch.device("meta"):
            peers[implementation] = transformers_gemma4().Gemma4TextExperts(config)
        for name, weight in zip(("gate_up_proj", "down_proj"), gemma_weights, strict=True):
            setattr(peers[implementation], name, torch.nn.Parameter(weight, requires_grad=False))
    return peers


@pytest.mark.parametrize(
    "num_tokens",
    [
        1,
        2,
        3,
        7,
        8,
        9,
        15,
        16,
        17,
        31,
        33,
        63,
        64,
        65,
        127,
        129,
        255,
        257,
        700,
        1000,
        1024,
        2049,
        3071,
        3073,
        4096,
        4999,
    ],
)
def test_gemma_4_is_at_least_as_right_as_transformers(run, gemma_weights, gemma_peers, num_tokens, capsys):
    # The error of a single token scatters by a tenth: 64 tokens at least, in calls of num_tokens, are judged together.
    case = gemma_case(gemma_weights, num_tokens * max(1, 64 // num_tokens))
    output, truth = in_calls_of(run, case, num_tokens), oracle(case)
    error = relative_error(output, truth)
    theirs = {
        name: torch.cat([peer(call.hidden_states, *call[3:]) for call in calls(case, num_tokens)])
        for name, peer in gemma_peers.items()
    }
    errors = {name: relative_error(their_output, truth) for name, their_output in theirs.items()}
    with capsys.disabled():
        print(
            f"\nT={num_tokens}: {run.backend} {error:.5f}, "
            + ", ".join(f"{name} {e:.5f}" for name, e in errors.items())
        )
    assert error <= min(errors.values())
    assert error <= BOUND[run.backend]
    # An element may be further off than theirs, by chance, but not by more than twice.
    assert (
        max_error(output, truth) <= 2 * max(max_error(their_output, truth) for their_output in theirs.values()) + 1e-6
    )


def test_auto_is_as_right_at_gemma_4_s_sizes(gemma_weights):
    """Whichever backend it takes."""
    case = gemma_case(gemma_weights, 33)
    output = fused_experts(*case, activation="gelu_pytorch_tanh")
    assert relative_error(output, oracle(case)) <= TRANSFORMERS_ERROR


@pytest.mark.parametrize("top_k", [2, 6])
@pytest.mark.parametrize("num_experts", [8, 64, 192])
@pytest.mark.parametrize(
    ("num_tokens", "intermediate", "hidden"), [(1, 128, 128), (1, 2048, 128), (33, 2048, 128), (222, 1024, 1024)]
)
def test_vllm_s_cases(run, num_tokens, intermediate, hidden, num_experts, top_k):
    # One token of 128 columns has an error that scatters by a third: many, computed one at a time, are judged together.
    case = random_experts(
        max(num_tokens, 33),
        num_experts,
        hidden,
        intermediate,
        top_k,
        dtype=torch.bfloat16,
        device="cuda",
        activation=SILU,
    )
    output, truth = in_calls_of(run, case, num_tokens, SILU), oracle(case, SILU)
    assert relative_error(output, truth) <= TRANSFORMERS_ERROR
    assert max_error(output, truth) <= 2 * max_error(rounded_experts(case, SILU), truth) + 1e-6

    # Half of the experts are on another rank.
    masked = case._replace(top_k_index=case.top_k_index.where(case.top_k_index % 2 == 0, -1))
    output, truth = in_calls_of(run, masked, num_tokens, SILU), oracle(masked, SILU)
    assert max_error(output, truth) <= 2 * max_error(rounded_experts(masked, SILU), truth) + 1e-6
    assert torch.equal(output.any(-1), truth.any(-1))


@pytest.mark.parametrize("intermediate", [704, 352, 176, 88])
def test_intermediate_sizes_of_tensor_parallel_gemma_4(run, intermediate):
    """704 over 1, 2, 4 and 8 ranks; 60 experts are no multiple of 32."""
    case = random_experts(100, 60, 512, intermediate, 6, dtype=torch.bfloat16, device="cuda")
    assert check(run, case) <= TRANSFORMERS_ERROR


@pytest.mark.parametrize("activation", [*MoEActivation, *WITH_PARAMETERS])
def test_every_activation(run, activation):
    case = random_experts(130, 16, 256, 176, 4, dtype=torch.bfloat16, device="cuda", activation=activation)
    # Gates and ups that reach the clamps of the SWIGLU members.
    check(run, case._replace(hidden_states=case.hidden_states * 4), activation)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_masked_ids(run, index_dtype):
    case = random_experts(200, 60, 256, 88, 6, dtype=torch.bfloat16, device="cuda")
    index = case.top_k_index.to(index_dtype)
    index[torch.rand(index.shape, device="cuda") < 0.3] = -1
    index[torch.rand(index.shape, device="cuda") < 0.3] = 60
    index[::10] = -1
    check(run, case._replace(top_k_index=index))


def test_every_pair_masked(run):
    case = random_experts(20, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    output = run(case._replace(top_k_index=torch.full_like(case.top_k_index, -1)))
    assert torch.equal(output, torch.zeros_like(case.hidden_states))


@pytest.mark.parametrize("num_tokens", [33, 64, 2100])
@pytest.mark.parametrize("expert", [0, 59])
def test_all_tokens_to_one_expert_and_the_rest_empty(run, expert, num_tokens):
    """2100 tokens of 2 choices are more than one block of the sort."""
    case = random_experts(num_tokens, 60, 128, 88, 2, dtype=torch.bfloat16, device="cuda")
    case = case._replace(top_k_index=torch.full_like(case.top_k_index, expert))
    check(run, case)


def test_top_k_of_all_experts(run):
    check(run, random_experts(64, 8, 128, 64, 8, dtype=torch.bfloat16, device="cuda"))


def test_misaligned_hidden_states(run):
    case = random_experts(9, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    shifted = torch.cat((case.hidden_states.new_zeros(1), case.hidden_states.flatten()))[1:].view(9, 128)
    assert shifted.data_ptr() % 16
    shifted = case._replace(hidden_states=shifted)
    assert max_error(run(shifted), oracle(shifted)) <= 2 * max_error(rounded_experts(case), oracle(case)) + 1e-6


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_misaligned_weights_are_refused(backend):
    case = random_experts(9, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    down_proj = case.down_proj
    shifted = torch.cat((down_proj.new_zeros(1), down_proj.flatten()))[1:].view(down_proj.shape)
    with pytest.raises(ValueError, match="both weights must start on 16 bytes"):
        fused_experts(*case._replace(down_proj=shifted), activation="gelu_tanh", backend=backend)


def reroute(case, kind):
    """The case with another routing: skewed, masked or empty."""
    index = case.top_k_index.clone()
    num_experts, top_k = case.down_proj.shape[0], index.shape[1]
    if kind == "hot":  # one expert gets a quarter of all pairs, some tokens twice
        index[:, : max(1, top_k // 4)] = 3
    elif kind == "same":
        index[:] = index[0].clone()
    elif kind == "masked":
        index = index.where(torch.rand(index.shape, device="cuda") < 0.5, -1)
        index[-1] = num_experts + 5
    return case._replace(top_k_index=index)


@pytest.mark.parametrize("kind", ["hot", "same", "masked"])
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 17, 65, 129, 300, 600, 1024, 3100])
def test_skewed_and_masked_routing_of_gemma_4(run, gemma_weights, num_tokens, kind):
    case = reroute(gemma_case(gemma_weights, num_tokens), kind)
    output, truth = run(case), oracle(case)
    assert output.isfinite().all()
    assert torch.equal(output.any(-1), truth.any(-1))
    if truth.any() and num_tokens > 1:
        assert relative_error(output, truth) <= 1.1 * BOUND[run.backend]
    assert max_error(output, truth) <= 2 * max_error(rounded_experts(case), truth) + 1e-6


@pytest.mark.parametrize(
    ("num_experts", "hidden", "intermediate", "top_k", "activation"),
    [
        (128, 2048, 768, 8, SILU),  # Qwen3-30B-A3B
        (8, 4096, 14336, 2, SILU),  # Mixtral 8x7B
        (128, 2816, 352, 8, MoEActivation.GELU_TANH),  # Gemma 4 over 2 and 4 ranks
        (128, 2816, 176, 8, MoEActivation.GELU_TANH),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 9, 64, 128, 300, 801])
def test_other_models(run, num_tokens, num_experts, hidden, intermediate, top_k, activation):
    case = random_experts(num_tokens, num_experts, hidden, intermediate, top_k, dtype=torch.bfloat16, device="cuda")
    check(run, case, activation)


@pytest.mark.parametrize("num_tokens", [1, 16, 40, 100, 200, 300, 1001, 3100])
def test_float16(run, num_tokens):
    """Three more bits than bfloat16."""
    case = random_experts(num_tokens, 128, 2816, 704, 8, dtype=torch.float16, device="cuda")
    assert check(run, case) <= 0.0029 / 7


@pytest.mark.parametrize(("few", "many"), [(2, 16), (17, 64), (65, 383), (384, 3583), (384, 4000)])
def test_a_token_does_not_depend_on_the_others_of_its_regime(gemma_weights, few, many):
    case = gemma_case(gemma_weights, many)
    (first, *_) = calls(case, few)
    outputs = [fused_experts(*each, activation="gelu_tanh", backend="fused") for each in (first, case)]
    assert torch.equal(outputs[0], outputs[1][:few])


def test_slots_of_more_than_2_31_bytes(gemma_weights):
    """Each token is right on its own; the last ones have the slots that are furthest from the start."""
    num_tokens = 49152
    assert num_tokens * GEMMA.top_k_experts * GEMMA.hidden_size * 2 > 2**31
    case = gemma_case(gemma_weights, num_tokens)
    output = fused_experts(*case, activation="gelu_tanh", backend="fused")
    assert output.isfinite().all()
    rows = torch.tensor([*range(0, num_tokens, 769), num_tokens - 1], device="cuda")
    some = Experts(case.hidden_states[rows], *gemma_weights, case.top_k_index[rows], case.top_k_weights[rows])
    assert relative_error(output[rows], oracle(some)) <= BOUND["fused"]


@pytest.mark.parametrize("num_tokens", [1024, 8192])
def test_memory_is_that_of_the_slots(gemma_weights, num_tokens):
    """At most a quarter more than the rows of both projections take."""
    case = gemma_case(gemma_weights, num_tokens)
    fused_experts(*case, activation="gelu_tanh", backend="fused")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = fused_experts(*case, activation="gelu_tanh", backend="fused")
    peak = torch.cuda.max_memory_allocated() - before - output.nbytes
    columns = GEMMA.hidden_size + GEMMA.moe_intermediate_size
    assert peak <= 1.25 * 2 * num_tokens * GEMMA.top_k_experts * columns
