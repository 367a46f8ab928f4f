"""fused_experts' expert_map=: indices of all experts, and weights of those that are here."""

import pytest
import torch

from cupymoe import LowRank, fused_experts, lora_experts
from cupymoe.backends import registry
from cupymoe.kernels.catalog import variants
from cupymoe.ops import experts_call
from cupymoe.ops.activation import member_of
from tests.helpers import (
    no_host_sync,
    oracle,
    poison_free_memory,
    random_biases,
    random_experts,
    relative_error,
    slow_on_cuda,
)

NUM_EXPERTS = 16
TOKENS = [1, 5, 70, 300, 1100, 4200]
"""Of 4 choices: every block plans for itself, one plans for all, tiles, and two launches of the sort."""


def split(case, map_dtype=torch.int64):
    """The case's even and odd experts, each with its map; absent ones are -1 in one, and in the other past the last."""
    for first, absent in ((0, -1), (1, NUM_EXPERTS // 2)):
        experts = torch.arange(first, NUM_EXPERTS, 2, device=case.hidden_states.device)
        expert_map = torch.full((NUM_EXPERTS,), absent, dtype=map_dtype, device=experts.device)
        expert_map[experts] = torch.arange(len(experts), dtype=map_dtype, device=experts.device)
        part = case._replace(gate_up_proj=case.gate_up_proj[experts], down_proj=case.down_proj[experts])
        yield part, expert_map, experts


def local(index, expert_map):
    """What the map makes of indices, in the plainest way."""
    return torch.tensor(
        [
            [int(expert_map[expert]) if 0 <= expert < len(expert_map) else -1 for expert in row]
            for row in index.tolist()
        ],
        device=index.device,
    )


def random_case(num_tokens, device, dtype=torch.bfloat16):
    case = random_experts(num_tokens, NUM_EXPERTS, 64, 32, 4, dtype=dtype, device=device)
    case.top_k_index[::3, 1], case.top_k_index[::4, 2] = -1, NUM_EXPERTS  # masked whatever the map says
    return case


@slow_on_cuda
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("map_dtype", [torch.int32, torch.int64])
def test_parts_sum_to_the_whole_in_every_backend(device, num_tokens, map_dtype):
    case = random_case(num_tokens, device)
    call = experts_call(*case[:4], member_of("gelu_tanh"))
    index = case.top_k_index.to(torch.int32)
    for name, backend in registry().items():
        if backend.unsupported_reason(call) is not None or (name == "reference" and num_tokens > 300):
            continue
        total = torch.zeros_like(case.hidden_states, dtype=torch.float64)
        for part, expert_map, _ in split(case._replace(top_k_index=index), map_dtype):
            kwargs = {"activation": "gelu_tanh", "backend": name}
            output = fused_experts(*part, **kwargs, expert_map=expert_map)
            mapped = part._replace(top_k_index=local(index, expert_map))
            assert torch.equal(output, fused_experts(*mapped, **kwargs, global_num_experts=NUM_EXPERTS)), name
            out = torch.full_like(output, torch.nan)
            assert fused_experts(*part, **kwargs, expert_map=expert_map[:, None].repeat(1, 2)[:, 0], out=out) is out
            assert torch.equal(out, output)
            total += output
        assert relative_error(total, oracle(case)) < 0.01


@slow_on_cuda
@pytest.mark.parametrize("num_tokens", [5, 300])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_are_those_of_mapped_indices(device, num_tokens, biased, adapted):
    part, expert_map, experts = next(iter(split(random_case(num_tokens, device))))
    tensors = [*part, *([*random_biases(part).values()] if biased else [None, None])]
    tensors += [None, None]
    if adapted:
        tensors[-2:] = [torch.randn(len(experts), *size).to(part.down_proj) for size in ((8, 32), (64, 8))]

    def gradients(index, **settings):
        leaves = [None if each is None else each.detach().clone() for each in tensors]
        wanted = [each.requires_grad_() for each in leaves if each is not None and each.is_floating_point()]
        *experts, gate_up_bias, down_bias, a, b = leaves
        experts[3] = index
        adapter = None if a is None else LowRank(a, b)
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        output = lora_experts(*experts, None, adapter, activation="gelu_tanh", **biases, **settings)
        return output, *torch.autograd.grad(output, wanted, torch.ones_like(output))

    got = gradients(part.top_k_index, expert_map=expert_map)
    wanted = gradients(local(part.top_k_index, expert_map), global_num_experts=NUM_EXPERTS)
    for ours, theirs in zip(got, wanted, strict=True):
        assert theirs.any()
        assert torch.equal(ours, theirs)


def test_compiled(device):
    part, expert_map, _ = next(iter(split(random_case(9, device))))

    def function(expert_map, *tensors):
        return fused_experts(*tensors, activation="gelu_tanh", expert_map=expert_map)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(expert_map, *part), function(expert_map, *part))


PART, EXPERT_MAP, _ = next(iter(split(random_case(5, "cpu"))))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"expert_map": [0, 1]}, TypeError, "expert_map must be a torch.Tensor, got list"),
        ({"expert_map": EXPERT_MAP.float()}, TypeError, "expert_map must be int32 or int64, got torch.float32"),
        ({"expert_map": EXPERT_MAP[None]}, ValueError, r"expert_map must have shape \[\*\], got \[1, 16\]"),
        ({"expert_map": EXPERT_MAP[:7]}, ValueError, "at least the 8 whose weights are given, got 7"),
        (
            {"expert_map": EXPERT_MAP, "global_num_experts": 12},
            ValueError,
            r"expert_map must have shape \[12\], got \[16\]",
        ),
        (
            {"expert_map": EXPERT_MAP.to("meta")},
            ValueError,
            "expert_map must be on hidden_states's device cpu, got meta",
        ),
        (
            {"expert_map": EXPERT_MAP, "out": PART.hidden_states},
            ValueError,
            "out must not overlap an input",
        ),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_refused(settings, error, message, adapted):
    adapters = (None, None) if adapted else ()
    if adapted and "out" in settings:
        return  # lora_experts has none
    with pytest.raises(error, match=message):
        (lora_experts if adapted else fused_experts)(*PART, *adapters, activation="gelu_tanh", **settings)


def test_kernels_with_and_without_a_map_are_compiled_in_ci():
    streamed = "plan_experts", "experts_up", "experts_down", "lora_shrink_chunks"
    for source in ("sort_by_expert", *streamed, "experts_up_wgmma", "experts_down_wgmma"):
        have = {"HAS_EXPERT_MAP=1" in each.defines for each in variants() if each.source == source}
        assert have == {False, True}, source


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 70, 1100])
def test_a_map_may_change_between_replays(num_tokens):
    """As an expert is moved to another device; and the host never waits."""
    case = random_case(num_tokens, "cuda")
    (part, expert_map, _), (other, other_map, _) = split(case)
    poison_free_memory()
    fused_experts(*part, activation="gelu_tanh", expert_map=expert_map)
    with no_host_sync():
        fused_experts(*part, activation="gelu_tanh", expert_map=expert_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused_experts(*part, activation="gelu_tanh", expert_map=expert_map)
    for weights, its_map in ((part, expert_map.clone()), (other, other_map)):
        part.gate_up_proj.copy_(weights.gate_up_proj)
        part.down_proj.copy_(weights.down_proj)
        expert_map.copy_(its_map)
        graph.replay()
        assert torch.equal(output, fused_experts(*weights, activation="gelu_tanh", expert_map=its_map))
