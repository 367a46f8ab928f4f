"""fused_experts on CUDA against float64: norms and elements, at Gemma 4's sizes, vLLM's and the awkward ones."""

import pytest
import torch

from cupymoe import Gemma4MoEConfig, MoEActivation, fused_experts
from tests.helpers import (
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
TRANSFORMERS_ERROR = 0.0042  # of transformers and SGLang at Gemma 4's sizes, in Frobenius norms


def grouped(case, activation=MoEActivation.GELU_TANH):
    return fused_experts(*case, activation=activation, backend="grouped")


def calls(case, num_tokens):
    """The calls of num_tokens each that a case is made of."""
    for rows in map(slice, range(0, len(case.hidden_states), num_tokens), range(num_tokens, 10**6, num_tokens)):
        yield Experts(case.hidden_states[rows], *case[1:3], case.top_k_index[rows], case.top_k_weights[rows])


def in_calls_of(case, num_tokens, activation=MoEActivation.GELU_TANH):
    return torch.cat([grouped(call, activation) for call in calls(case, num_tokens)])


def check(case, activation=MoEActivation.GELU_TANH):
    """Not further from float64 than a path that rounds at every step: as a whole, and twice that in any element."""
    output, truth = grouped(case, activation), oracle(case, activation)
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


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7, 16, 64, 129, 1000, 4096])
def test_gemma_4_is_at_least_as_right_as_transformers(gemma_weights, gemma_peers, num_tokens, capsys):
    # The error of a single token scatters by a tenth: 64 tokens at least, in calls of num_tokens, are judged together.
    case = gemma_case(gemma_weights, num_tokens * max(1, 64 // num_tokens))
    output, truth = in_calls_of(case, num_tokens), oracle(case)
    error = relative_error(output, truth)
    theirs = {
        name: torch.cat([peer(call.hidden_states, *call[3:]) for call in calls(case, num_tokens)])
        for name, peer in gemma_peers.items()
    }
    errors = {name: relative_error(their_output, truth) for name, their_output in theirs.items()}
    with capsys.disabled():
        print(f"\nT={num_tokens}: cupymoe {error:.5f}, " + ", ".join(f"{name} {e:.5f}" for name, e in errors.items()))
    assert error <= min(errors.values())
    assert error <= TRANSFORMERS_ERROR
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
def test_vllm_s_cases(num_tokens, intermediate, hidden, num_experts, top_k):
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
    output, truth = in_calls_of(case, num_tokens, SILU), oracle(case, SILU)
    assert relative_error(output, truth) <= TRANSFORMERS_ERROR
    assert max_error(output, truth) <= 2 * max_error(rounded_experts(case, SILU), truth) + 1e-6

    # Half of the experts are on another rank.
    masked = case._replace(top_k_index=case.top_k_index.where(case.top_k_index % 2 == 0, -1))
    output, truth = in_calls_of(masked, num_tokens, SILU), oracle(masked, SILU)
    assert max_error(output, truth) <= 2 * max_error(rounded_experts(masked, SILU), truth) + 1e-6
    assert torch.equal(output.any(-1), truth.any(-1))


@pytest.mark.parametrize("intermediate", [704, 352, 176, 88])
def test_intermediate_sizes_of_tensor_parallel_gemma_4(intermediate):
    """704 over 1, 2, 4 and 8 ranks; 60 experts are no multiple of 32."""
    case = random_experts(100, 60, 512, intermediate, 6, dtype=torch.bfloat16, device="cuda")
    assert check(case) <= TRANSFORMERS_ERROR


@pytest.mark.parametrize("activation", MoEActivation)
def test_every_activation(activation):
    case = random_experts(130, 16, 256, 176, 4, dtype=torch.bfloat16, device="cuda", activation=activation)
    # Gates and ups that reach the clamps of the SWIGLU members.
    check(case._replace(hidden_states=case.hidden_states * 4), activation)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_masked_ids(index_dtype):
    case = random_experts(200, 60, 256, 88, 6, dtype=torch.bfloat16, device="cuda")
    index = case.top_k_index.to(index_dtype)
    index[torch.rand(index.shape, device="cuda") < 0.3] = -1
    index[torch.rand(index.shape, device="cuda") < 0.3] = 60
    index[::10] = -1
    check(case._replace(top_k_index=index))


def test_every_pair_masked():
    case = random_experts(20, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    output = grouped(case._replace(top_k_index=torch.full_like(case.top_k_index, -1)))
    assert torch.equal(output, torch.zeros_like(case.hidden_states))


@pytest.mark.parametrize("num_tokens", [33, 64, 2100])
@pytest.mark.parametrize("expert", [0, 59])
def test_all_tokens_to_one_expert_and_the_rest_empty(expert, num_tokens):
    """2100 tokens of 2 choices are more than one block of the sort."""
    case = random_experts(num_tokens, 60, 128, 88, 2, dtype=torch.bfloat16, device="cuda")
    case = case._replace(top_k_index=torch.full_like(case.top_k_index, expert))
    check(case)


def test_top_k_of_all_experts():
    check(random_experts(64, 8, 128, 64, 8, dtype=torch.bfloat16, device="cuda"))


def test_misaligned_hidden_states():
    case = random_experts(9, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    shifted = torch.cat((case.hidden_states.new_zeros(1), case.hidden_states.flatten()))[1:].view(9, 128)
    assert shifted.data_ptr() % 16
    assert torch.equal(grouped(case._replace(hidden_states=shifted)), grouped(case))


def test_misaligned_weights_are_refused():
    case = random_experts(9, 8, 128, 64, 2, dtype=torch.bfloat16, device="cuda")
    down_proj = case.down_proj
    shifted = torch.cat((down_proj.new_zeros(1), down_proj.flatten()))[1:].view(down_proj.shape)
    with pytest.raises(ValueError, match="both weights must start on 16 bytes"):
        grouped(case._replace(down_proj=shifted))
    output = fused_experts(*case._replace(down_proj=shifted), activation="gelu_tanh")
    assert max_error(output, oracle(case)) <= 2 * max_error(rounded_experts(case), oracle(case)) + 1e-6
