"""bench.py without a GPU: what it refuses, and that a peer's function gets what the experts are given."""

import pytest
import torch
from click.testing import CliRunner

from cupymoe import Gemma4MoEConfig, reference

CONFIG = Gemma4MoEConfig(32, 24, 6, 2, "gelu_pytorch_tanh")


@pytest.fixture(scope="module")
def bench():
    import bench

    return bench


def experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    return reference.experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, CONFIG.activation)


def test_a_peer_is_called_with_the_case(bench):
    _, layers = bench.make_layers(CONFIG, "cpu")
    cases = bench.make_cases(CONFIG, layers, 5)
    contender = bench.imported_contender(f"{__name__}:experts", CONFIG)
    for case in cases:
        inputs = case.inputs
        assert torch.equal(
            contender.bind(case)(),
            experts(inputs.hidden_states, *case.weights, inputs.top_k_index, inputs.top_k_weights),
        )


@pytest.mark.parametrize("routing", [None, "one expert has a quarter of the pairs", "four experts"])
def test_routings(bench, routing):
    config = Gemma4MoEConfig(32, 24, 64, 8, "gelu_pytorch_tanh")
    index = bench.make_cases(config, bench.make_layers(config, "cpu")[1], 400, routing)[0].inputs.top_k_index
    share = (index == 0).float().mean().item()
    if routing is None:
        assert all(len(set(row)) == 8 for row in index.tolist())
        assert share < 0.05
    elif routing == "four experts":
        assert set(index.flatten().tolist()) == {0, 1, 2, 3}
    else:
        assert 0.25 <= share < 0.3


@pytest.mark.parametrize("value", ["vllm", "=a.b:c", "vllm=", "cupymoe:mine=a.b:c"])
def test_refuses_a_peer_without_name_or_function(bench, value):
    result = CliRunner().invoke(bench.main, ["--peer", value])
    assert result.exit_code == 2
    assert "must be NAME=package.module:function" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_says_that_it_needs_a_gpu(bench):
    result = CliRunner().invoke(bench.main, [])
    assert result.exit_code == 1
    assert "measures a CUDA GPU, and torch sees none" in result.output
