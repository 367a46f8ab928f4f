"""bench_model.py's logic on a tiny model: what it builds, what a step computes, what counts as a wrong token."""

import json

import pytest
import torch
from click.testing import CliRunner

from cupymoe import Gemma4Router
from tests.helpers import transformers_gemma4

pytest.importorskip("transformers", minversion="5.17")

from scripts import bench_model
from scripts.benchmarks import model_contenders

transformers_gemma4()
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own


@pytest.fixture
def bench():
    torch.manual_seed(0)
    return bench_model.ModelBench(bench_model.small_plan(), torch.device("cpu"))


@pytest.mark.slow
def test_small_runs_every_cell_and_writes_nothing(tmp_path):
    result = CliRunner().invoke(bench_model.main, ["--small", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for cell in ("decode, generate(), batch 1", "decode, generate(), batch 2", "prefill of 12"):
        assert f"{cell}: grouped_mm" in result.output
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_small_with_int4_experts(tmp_path):
    result = CliRunner().invoke(bench_model.main, ["--small", "--experts", "int4", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for cell in ("decode, step, batch 1", "decode, generate(), batch 2", "prefill of 12"):
        assert f"{cell}: cupymoe, bf16 experts" in result.output
    assert "memory, prefill of 12, 48 tokens of KV, batch 1: weights 0.00 GB, peak not measured" in result.output
    assert [*tmp_path.iterdir()] == []


def test_a_report_with_failures_is_written_and_exits_with_1(monkeypatch, tmp_path):
    """The minutes on a GPU are spent."""
    plan = bench_model.small_plan()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    row = {"name": "cupymoe", "steps": 8, "same": 7, "beyond": 8, "beyond_same": 7, "decided": 8, "wrong": 1}
    row |= {"largest_difference": 0.1, "std_of_logits": 1.0, "finite": True}
    cell = {"what": "prefill", "ms": {name: {"p50": 1.0} for name in model_contenders.CONTENDERS}}

    class Measured:
        def __init__(self, *arguments):
            pass

        def run(self):
            return {"layers": 30, "parameters": 1, "prompt": plan.prompt, "cells": [cell], "greedy": [row]}

    monkeypatch.setattr(bench_model, "ModelBench", Measured)
    result = CliRunner().invoke(bench_model.main, ["--output", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert "cupymoe chose another token than grouped_mm at 1 steps beyond rounding" in result.output
    assert json.loads((tmp_path / "a-card" / "model.json").read_text())["greedy"] == [row]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(bench_model.main, [])
    assert result.exit_code == 1
    assert "measures a CUDA GPU" in result.output


def test_the_model_is_gemma_4_26b_a4b_s_text_part():
    config = bench_model.gemma4_26b_a4b()
    model = bench_model.build(config, torch.device("meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = config.vocab_size * config.hidden_size  # of its own
    assert 25.1e9 < parameters - head < 25.4e9
    assert config.layer_types.count("full_attention") == 5
    experts = model.model.layers[29].experts
    assert experts.gate_up_proj.shape == (128, 1408, 2816)
    assert experts.gate_up_proj.dtype == torch.bfloat16
    assert bench_model.Plan(config).cache_length <= config.sliding_window


def test_weights_are_random(bench):
    for name, parameter in bench.contenders.model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.dim() > 1:
            assert parameter.float().std() == pytest.approx(0.02, rel=0.2), name


def test_steps_are_what_generate_does(bench):
    """Position, mask and rewinding of the static cache."""
    plan = bench.plan
    prompt = bench_model.random_tokens(plan.config, 2, plan.prompt, device="cpu")
    model = bench.contenders.become("cupymoe")
    with torch.inference_mode():
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        decoder = bench_model.Decoder(model, prompt, plan.cache_length)
        decoder.prefill()
        for _ in range(2):
            decoder.rewind()
            tokens = []
            for _ in range(6):
                tokens.append(decoder.token.clone())
                decoder.step()
            assert torch.equal(torch.cat(tokens, 1), expected[:, plan.prompt :])


def test_contenders_run_what_they_are_named_for(bench):
    layer = bench.contenders.model.model.layers[1]
    for name, implementation, ours in (
        ("cupymoe + router", "cupymoe", True),
        ("grouped_mm", "grouped_mm", False),
        ("cupymoe", "cupymoe", False),
        ("eager", "eager", False),
    ):
        assert bench.contenders.become(name).config._experts_implementation == implementation
        assert isinstance(layer.router, Gemma4Router) == ours


@torch.inference_mode()
def test_int4_stands_beside_what_it_is_in_bf16():
    torch.manual_seed(0)
    plan = bench_model.small_plan()
    bench = bench_model.ModelBench(plan, torch.device("cpu"), model_contenders.QuantisedContenders)
    prompt = bench_model.random_tokens(plan.config, 1, plan.prompt, device="cpu")
    layer = bench.contenders.model.model.layers[1]
    plain = bench.contenders.become(model_contenders.BF16)(prompt).logits
    parameters = layer.experts.down_proj
    assert parameters.dtype == torch.bfloat16
    codes = bench.contenders.become(model_contenders.INT4)(prompt).logits
    assert layer.experts.down_proj.format.name == "int4_g32"
    assert torch.equal(layer.experts.down_proj.dequantize(torch.bfloat16), parameters)
    assert not [name for name, _ in bench.contenders.model.named_parameters() if ".experts." in name]
    assert 0 < (plain - codes).abs().max() < 0.1 * plain.std()
    found = bench.memory(bench.contenders)
    model = bench.contenders.model
    head = model.lm_head.weight
    assert head is model.model.embed_tokens.weight
    of_experts = sum(each.nbytes for block in model.model.layers for each in block.experts.buffers())
    rest = sum(each.nbytes for each in model.parameters())
    assert found["weights_gb"] * 1e9 == pytest.approx(of_experts + rest, rel=1e-2)
    assert found["peak_gb"] is None


@pytest.mark.parametrize("cell", ["decode_graph", "generate", "prefill"])
def test_every_cell_times_the_contender_it_names(bench, monkeypatch, cell):
    ran = {}

    def each_once(measure, repeats):
        for name in model_contenders.CONTENDERS:
            seen.clear()
            measure(name)
            ran[name] = {*seen}
        return {name: [1.0] for name in model_contenders.CONTENDERS}

    model, seen = bench.contenders.model, []
    layer = model.model.layers[0]
    model.register_forward_pre_hook(
        lambda *_: seen.append((model.config._experts_implementation, isinstance(layer.router, Gemma4Router)))
    )
    monkeypatch.setattr(bench, "_in_turn", each_once)
    with torch.inference_mode():
        getattr(bench, cell)(*{"decode_graph": (1,), "generate": (1,), "prefill": (5,)}[cell])
    assert ran == {
        "grouped_mm": {("grouped_mm", False)},
        "cupymoe": {("cupymoe", False)},
        "cupymoe + router": {("cupymoe", True)},
    }


@pytest.mark.parametrize(
    ("margin", "shift", "same", "beyond", "decided", "wrong"),
    [
        (0.5, 0.0, 1, 1, 1, 0),  # equal
        (0.7, 0.3, 1, 1, 1, 0),  # moved, and no other choice
        (0.5, 0.3, 1, 1, 0, 0),  # it might have been another
        (0.1, 0.3, 0, 0, 0, 0),  # another choice within the difference
    ],
)
def test_a_step_within_rounding(bench, margin, shift, same, beyond, decided, wrong):
    expected = torch.tensor([[1.0, 1.0 - margin, -1.0]])
    got = expected + torch.tensor([[0.0, shift, 0.0]])
    found = bench._agreement("x", expected, got, got.argmax(-1))
    assert [found[key] for key in ("same", "beyond", "decided", "wrong")] == [same, beyond, decided, wrong]


def test_logits_that_move_towards_each_other_are_within_rounding(bench):
    """Both moved by 0.1, less than the margin of 0.15, and the choice is another."""
    expected, got = torch.tensor([[1.0, 0.85, 0.0]]), torch.tensor([[0.9, 0.95, 0.0]])
    found = bench._agreement("cupymoe", expected, got, got.argmax(-1))
    assert [found[key] for key in ("same", "beyond", "beyond_same", "decided", "wrong")] == [0, 1, 0, 0, 0]


def test_a_wrong_token_fails(bench):
    expected = torch.tensor([[1.0, 0.6, 0.0]])
    row = bench._agreement("cupymoe", expected, expected + 0.1, torch.tensor([1]))
    assert (row["decided"], row["wrong"]) == (1, 1)
    assert bench_model.failures({"greedy": [row]}) == [
        "cupymoe chose another token than grouped_mm at 1 steps beyond rounding"
    ]
    assert bench_model.failures({"greedy": [{**row, "name": "eager"}]}) == []
    row = bench._agreement("cupymoe", expected, torch.full_like(expected, torch.nan), torch.tensor([0]))
    assert "cupymoe gave logits that are not finite" in bench_model.failures({"greedy": [row]})


@pytest.mark.slow
def test_tables_of_a_report(bench, tmp_path):
    """readme_table.py renders model.json."""
    from scripts import readme_table

    report = {"device": "x", "date": "y", "versions": {}, "cuda_src_sha256": "z", **bench.run()}
    path = tmp_path / "model.json"
    path.write_text(json.dumps(report))
    result = CliRunner().invoke(readme_table.main, [str(path)])
    assert result.exit_code == 0, result.output
    assert "decode, step, batch 1" in result.output
    assert "| cupymoe + router ms |" in result.output
    assert (
        "| margin beyond difference | of these the same | margin beyond twice that | of these wrong |" in result.output
    )
