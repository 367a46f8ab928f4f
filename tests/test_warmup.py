"""warmup: what it compiles, and that a later call compiles nothing."""

import pytest
import torch

import cupymoe.integrations.transformers  # noqa: F401  registers "cupymoe"
from cupymoe import Gemma4MoE, Gemma4MoEConfig, warmup
from cupymoe.kernels import jit
from tests.helpers import randomize, transformers_config, transformers_gemma4

CONFIG = Gemma4MoEConfig(
    hidden_size=64, moe_intermediate_size=32, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)


def test_calls_every_kind_once_at_every_number_of_tokens(monkeypatch):
    called = []
    layers = torch.nn.ModuleList([Gemma4MoE(CONFIG) for _ in range(3)])
    for layer in layers:
        for part in (layer.router.proj, layer.experts):
            part.register_forward_hook(
                lambda module, inputs, output: called.append((type(module).__name__, len(inputs[0])))
            )
    warmup(layers, (5, 1, 5))
    assert sorted(called) == [("Gemma4Experts", 1), ("Gemma4Experts", 5), ("Linear", 1), ("Linear", 5)]


def test_sizes_without_weights():
    warmup(CONFIG, (1, 3), device="cpu", dtype=torch.float32)


def test_transformers_experts():
    experts = transformers_gemma4().Gemma4TextExperts(transformers_config())
    randomize(experts)
    experts.config._experts_implementation = "eager"
    with pytest.raises(ValueError, match="holds none"):
        warmup(experts)
    experts.config._experts_implementation = "cupymoe"
    called = []
    experts.register_forward_hook(lambda module, inputs, output: called.append(output.abs().sum().item()))
    warmup(experts, (1, 4))
    assert called == [0.0, 0.0]


@pytest.mark.parametrize(
    ("target", "num_tokens", "error", "message"),
    [
        (torch.nn.Linear(2, 2), (1,), ValueError, "target must hold a Gemma4Router.*Linear holds none"),
        ("gemma", (1,), TypeError, "target must be a torch.nn.Module or a Gemma4MoEConfig, got str"),
        (Gemma4MoE(CONFIG), (), ValueError, r"num_tokens must be positive numbers, got \[\]"),
        (Gemma4MoE(CONFIG), (4, 0), ValueError, r"num_tokens must be positive numbers, got \[0, 4\]"),
    ],
)
def test_bad_input(target, num_tokens, error, message):
    with pytest.raises(error, match=message):
        warmup(target, num_tokens)


@pytest.mark.gpu
def test_nothing_is_compiled_after_it():
    moe = randomize(Gemma4MoE(CONFIG)).to("cuda", torch.bfloat16)
    counts = (1, 64, 65, 200, 400, 5000)
    warmup(moe, counts)
    compiled = jit.compiled_variants()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        states = [torch.randn(count, 64, device="cuda", dtype=torch.bfloat16) for count in counts]
        with torch.cuda.graph(graph):
            outputs = [moe(each) for each in states]
        graph.replay()
        for each, output in zip(states, outputs, strict=True):
            assert torch.equal(moe(each), output)
    assert jit.compiled_variants() == compiled
