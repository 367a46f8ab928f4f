"""The regime of other models' sizes without a GPU: sizes, floors, masks, rows, and what a partial run writes."""

import importlib
import json

import pytest
import torch
from click.testing import CliRunner

from cupymoe import Gemma4MoEConfig, reference
from scripts import bench
from scripts.benchmarks import models, timing
from tests.scripts.replayed import Replayed

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "module", "config", "intermediate"),
    [
        ("qwen3-30b", "qwen3_moe", "Qwen3MoeConfig", "moe_intermediate_size"),
        ("mixtral-8x7b", "mixtral", "MixtralConfig", "intermediate_size"),
        ("qwen3.5-35b", "qwen3_5_moe", "Qwen3_5MoeTextConfig", "moe_intermediate_size"),
        ("qwen3-next-80b", "qwen3_next", "Qwen3NextConfig", "moe_intermediate_size"),
        ("glm-4.5-air", "glm4_moe", "Glm4MoeConfig", "moe_intermediate_size"),
        ("deepseek-v3", "deepseek_v3", "DeepseekV3Config", "moe_intermediate_size"),
        ("llama4-scout", "llama4", "Llama4TextConfig", "intermediate_size"),
        ("phi-3.5-moe", "phimoe", "PhimoeConfig", "intermediate_size"),
    ],
)
def test_sizes_are_those_of_transformers_default_configs(name, module, config, intermediate):
    theirs = getattr(importlib.import_module(f"transformers.models.{module}.configuration_{module}"), config)()
    num_experts = next(
        getattr(theirs, field)
        for field in ("n_routed_experts", "num_local_experts", "num_experts")
        if hasattr(theirs, field)
    )
    assert models.MODELS[name].config == Gemma4MoEConfig(
        theirs.hidden_size, getattr(theirs, intermediate), num_experts, theirs.num_experts_per_tok, theirs.hidden_act
    )


def test_other_sizes_and_the_ranks():
    """GPT-OSS's and OLMoE's published configs are not the defaults of their classes."""
    sizes = {name: (m.config.num_experts, m.config.top_k_experts) for name, m in models.MODELS.items()}
    assert sizes["gpt-oss-20b"] == (32, 4)
    assert sizes["olmoe"] == (64, 8)
    assert models.MODELS["gpt-oss-20b"].config.hidden_size == models.MODELS["gpt-oss-20b"].config.moe_intermediate_size
    assert [name for name, model in models.MODELS.items() if model.is_gpt_oss] == ["gpt-oss-20b"]
    halves = [models.MODELS[name].config.moe_intermediate_size for name in ("gemma4-26b", "gemma4-tp2", "gemma4-tp4")]
    assert halves == [704, 352, 176]
    ranks = {name: model.ranks for name, model in models.MODELS.items() if model.ranks != (1,)}
    assert ranks == {"gemma4-26b": (1, 8), "qwen3.5-35b": (1, 8), "deepseek-v3": (8,)}
    assert len(models.MODELS) == 13
    assert len(models.cells_of(models.MODELS, models.TOKENS)) == 150


@pytest.mark.parametrize(
    ("name", "hit_experts", "pairs", "expected"),
    [
        ("gemma4-26b", 8, 8, 8 * 3 * 2816 * 704 * 2 / 3.05e9),
        ("mixtral-8x7b", 8, 16384, 16384 * 6 * 4096 * 14336 / 782e9),
        ("deepseek-v3", 32, 1024, 32 * 3 * 7168 * 2048 * 2 / 3.05e9),
        ("gpt-oss-20b", 4, 4, 4 * (3 * 2880 * 2880 + 3 * 2880) * 2 / 3.05e9),
    ],
)
def test_floors(name, hit_experts, pairs, expected):
    assert models.floor_ms(models.MODELS[name], hit_experts, pairs) == pytest.approx(expected)


def test_a_floor_computed_by_hand():
    """128 experts of 11,894,784 bytes are 1,522,532,352, which take 499.19 us at 3.05 TB/s."""
    assert models.floor_ms(models.MODELS["gemma4-26b"], 128, 1024) == pytest.approx(0.49919, abs=1e-5)


@pytest.fixture
def small(monkeypatch):
    """The regime at sizes that a CPU computes, three models of it."""
    found = {
        "gated": models.Model(Gemma4MoEConfig(32, 24, 16, 4, "gelu_pytorch_tanh"), ranks=(1, 8)),
        "gpt-oss": models.Model(Gemma4MoEConfig(32, 24, 6, 2, "swigluoai"), is_gpt_oss=True),
    }
    monkeypatch.setattr(models, "MODELS", found)
    monkeypatch.setattr(models, "SEVERAL_LAYERS", 1)
    return found


def test_pairs_of_other_ranks_are_masked_as_transformers_masks_them(small):
    layers = models.make_layers(small["gated"], 8, "cpu")
    assert [layer.num_experts for layer in layers] == [2, 2, 2]
    cases = models.cases_of(models.Cell("gated", 8, 40), layers)
    index = torch.stack([case.inputs.top_k_index for case in cases])
    weights = torch.stack([case.inputs.top_k_weights for case in cases])
    assert set(index.unique().tolist()) == {0, 1, 2}
    assert (weights[index == 2] == 0).all()
    assert (weights[index < 2] > 0).all()
    assert 0.05 < (index < 2).float().mean() < 0.2
    hit_experts, pairs = models.kept(cases)
    assert hit_experts == 2
    assert pairs == (index < 2).sum() / len(cases)


def test_every_expert_is_here_without_ranks(small):
    layers = models.make_layers(small["gated"], 1, "cpu")
    cases = models.cases_of(models.Cell("gated", 1, 40), layers)
    assert models.kept(cases) == (16, 160)
    assert all((case.inputs.top_k_weights > 0).all() for case in cases)


def test_layers_take_turns_by_their_size(small, monkeypatch):
    bytes_of_layer = models.empty_weights(small["gated"], 1, "cpu").nbytes
    assert bytes_of_layer == 16 * 3 * 32 * 24 * 2
    monkeypatch.setattr(models, "SEVERAL_LAYERS", 4 * bytes_of_layer + 1)
    assert len(models.make_layers(small["gated"], 1, "cpu")) == 5
    monkeypatch.setattr(models, "LARGE_LAYER", bytes_of_layer - 1)
    assert len(models.make_layers(small["gated"], 1, "cpu")) == 2


def test_gpt_oss_has_biases_and_lies_transposed(small):
    weights = models.empty_weights(small["gpt-oss"], 1, "cpu")
    assert [tuple(tensor.shape) for tensor in weights] == [(6, 48, 32), (6, 32, 24), (6, 48), (6, 32)]
    assert weights.gate_up_proj.transpose(1, 2).is_contiguous()
    assert weights.down_proj.transpose(1, 2).is_contiguous()


def test_some_tokens_in_float64_are_those_of_the_reference(small):
    layers = models.make_layers(small["gated"], 8, "cpu")
    case = models.cases_of(models.Cell("gated", 8, 40), layers)[0]
    rows, truth = models.oracle_of(small["gated"].config, case, 7)
    states, index, weights = case.inputs
    all_rows = reference.experts(states.double(), *case.weights[:2], index, weights, small["gated"].config.activation)
    assert len(rows.unique()) == 7
    assert truth.dtype == torch.float64
    assert truth.norm() > 0
    torch.testing.assert_close(truth, all_rows[rows])


def test_every_model_has_a_peer():
    for model in models.MODELS.values():
        for ep in model.ranks:
            module = models.transformers_module(model, ep, models.empty_weights(model, ep, "meta"))
            assert module.num_experts == model.config.num_experts // ep
            assert (module.has_bias, module.is_transposed, module.is_concatenated) == (
                (True, True, False) if model.is_gpt_oss else (False, False, True)
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compile for")
def test_a_cell_that_can_t_be_compiled_ahead_says_why(small):
    assert models.compile_cell(models.Cell("gated", 1, 1)) is not None


TIMES = {name: {"p20": 0.9, "p50": 1.0, "p80": 1.1} for name in ("cupymoe", "grouped_mm")}


@pytest.fixture
def on_cpu(small, monkeypatch):
    """Without compilations, and with times that are made up."""
    ceilings = timing.Ceilings(3.0, 700.0)
    monkeypatch.setattr(models, "compile_ahead", lambda cells: None)
    monkeypatch.setattr(models, "measure_ceilings", lambda buffer, parts: ceilings)
    monkeypatch.setattr(models, "CEILING_BYTES", 64)
    monkeypatch.setattr(models, "capture", Replayed)
    monkeypatch.setattr(models, "time_in_turn", lambda captured, seconds: {name: TIMES[name] for name in captured})
    monkeypatch.setenv("CUPYMOE_ON_SLOW", "error")  # measure_models sets it; this gives it back


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_rows_of_a_run(small, capsys):
    found, failures = models.measure_models(tuple(small), (1, 40), torch.device("cpu"))
    assert failures == []
    assert found["ceilings"] == {"read_tbs": 3.0, "bf16_tflops": 700.0}
    assert found["floor"] == {"read_tbs": 3.05, "bf16_tflops": 782.0}
    rows = found["rows"]
    assert all(list(row) == ["model", "ep", "tokens", "hit_experts", "floor_ms", "error", "ms"] for row in rows)
    assert [(row["model"], row["ep"], row["tokens"]) for row in rows] == [
        ("gated", 1, 1),
        ("gated", 1, 40),
        ("gated", 8, 1),
        ("gated", 8, 40),
        ("gpt-oss", 1, 1),
        ("gpt-oss", 1, 40),
    ]
    assert [row["hit_experts"] for row in rows][:2] == [4, 16]
    assert all(row["ms"] == TIMES for row in rows)
    assert all(0 < row["error"][name] < 0.01 for row in rows for name in TIMES)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("gated, ep 1, T=1: floor 0.0000 ms, cupymoe 1.0000 ms, ")


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu", "small")
def test_a_wrong_output_fails_the_run(monkeypatch):
    kept = models.fused_experts
    monkeypatch.setattr(models, "fused_experts", lambda *a, **k: kept(*a, **k) * 1.01)
    found, failures = models.measure_models(("gated",), (40,), torch.device("cpu"))
    assert len(found["rows"]) == len(failures) == 2
    assert failures[0].startswith("gated, ep 1, T=40: cupymoe has a relative error of 0.0")


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu", "small")
def test_a_cell_that_fails_does_not_end_the_run(monkeypatch):
    kept = models.fused_experts

    def fails(states, *arguments, **settings):
        if len(states) == 1:
            raise RuntimeError("no kernel")
        return kept(states, *arguments, **settings)

    monkeypatch.setattr(models, "fused_experts", fails)
    found, failures = models.measure_models(("gpt-oss",), (1, 40), torch.device("cpu"))
    assert [row["tokens"] for row in found["rows"]] == [40]
    assert failures == ["gpt-oss, ep 1, T=1 failed: RuntimeError: no kernel"]


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu", "small")
def test_how_many_experts_there_are_is_said_where_ranks_share_them(monkeypatch):
    said = []
    kept = models.fused_experts

    def fused_experts(*arguments, global_num_experts, **settings):
        said.append(global_num_experts)
        return kept(*arguments, global_num_experts=global_num_experts, **settings)

    monkeypatch.setattr(models, "fused_experts", fused_experts)
    _, failures = models.measure_models(("gated",), (5000,), torch.device("cpu"))
    assert failures == []
    assert set(said[: len(said) // 2]) == {None}
    assert set(said[len(said) // 2 :]) == {16}


def test_only_a_run_of_all_cells_writes_the_report_of_all():
    names, tokens = tuple(models.MODELS), models.TOKENS
    assert models.report_name(names, tokens) == "models"
    assert models.report_name(names, (*tokens, 2)) == "models"
    assert models.report_name(names[1:], tokens) == "models-part"
    assert models.report_name(names, tokens[1:]) == "models-part"


def test_a_partial_run_leaves_the_report_of_all_cells_as_it_is(tmp_path, monkeypatch):
    def measure(names, tokens, device):
        rows = [{"model": name, "ep": 1, "tokens": n, "floor_ms": 0.5, "ms": TIMES} for name in names for n in tokens]
        return {"rows": rows}, []

    monkeypatch.setattr(bench, "measure_models", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    everything = ["--regime", "models", "--output", str(tmp_path)]
    for arguments in (everything, [*everything, "--models", "olmoe,gemma4-tp2", "--tokens", "48,4"]):
        result = CliRunner().invoke(bench.main, arguments)
        assert result.exit_code == 0, result.output
    assert "| gemma4-tp2 | 2.00 (1.00x) | 2.00 (1.00x) |" in result.output
    full, part = (json.loads((tmp_path / "a-gpu" / f"{name}.json").read_text()) for name in ("models", "models-part"))
    assert [(row["model"], row["tokens"]) for row in full["rows"]] == [
        (name, tokens) for name in models.MODELS for tokens in models.TOKENS
    ]
    assert [(row["model"], row["tokens"]) for row in part["rows"]] == [
        ("olmoe", 48),
        ("olmoe", 4),
        ("gemma4-tp2", 48),
        ("gemma4-tp2", 4),
    ]
    assert {"device", "date", "versions", "cuda_src_sha256", "kernels"} <= part.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--regime", "models", "--models", "gemma4-tp2,llama"], "got 'llama'"),
        (["--models", "olmoe"], "--models is for --regime models, not for experts"),
    ],
)
def test_refused_models(arguments, said):
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
