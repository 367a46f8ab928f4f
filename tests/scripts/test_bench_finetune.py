"""bench_finetune.py's logic on a tiny model: what is trained, what the loss is, what counts as another loss."""

import json

import pytest
import torch
from click.testing import CliRunner

from tests.helpers import transformers_gemma4

pytest.importorskip("transformers", minversion="5.17")
pytest.importorskip("peft", minversion="0.21")

from scripts import bench_finetune

transformers_gemma4()
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own


@pytest.fixture
def bench():
    torch.manual_seed(0)
    return bench_finetune.FinetuneBench(bench_finetune.small_plan(), torch.device("cpu"))


@pytest.mark.slow
def test_small_trains_every_recipe_and_writes_nothing(tmp_path):
    result = CliRunner().invoke(bench_finetune.main, ["--small", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for recipe in bench_finetune.RECIPES:
        for name in ("grouped_mm", "cupymoe"):
            assert f"{recipe.name}, {name}, seed 1: " in result.output
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_losses_fall_and_both_are_alike(bench, tmp_path):
    """And readme_table.py renders finetune.json."""
    from scripts import readme_table

    found = bench.run()
    assert bench_finetune.failures(found) == []
    for row in found["recipes"]:
        for losses in (each for runs in row["loss"].values() for each in runs):
            assert len(losses) == bench.plan.steps
            assert losses[-1] < 0.97 * losses[0], row["recipe"]
    report = {"device": "x", "date": "y", "versions": {}, "cuda_src_sha256": "z", **found}
    path = tmp_path / "finetune.json"
    path.write_text(json.dumps(report))
    result = CliRunner().invoke(readme_table.main, [str(path)])
    assert result.exit_code == 0, result.output
    assert "| grouped_mm tokens/s | cupymoe tokens/s |" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(bench_finetune.main, [])
    assert result.exit_code == 1
    assert "measures a CUDA GPU" in result.output


def test_the_loss_in_chunks_is_the_model_s(bench):
    ids = bench.batches[0]
    expected = bench.model(ids, labels=ids, use_cache=False).loss.item()
    assert bench_finetune.loss_of(bench.model, ids, 7).item() == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("contender", ["grouped_mm", "cupymoe"])
@pytest.mark.parametrize("recipe", [0, 1])
def test_only_the_recipe_s_adapters_are_trained(bench, monkeypatch, recipe, contender):
    """In float32, by the contender that is named; and the model is as before afterwards."""
    from cupymoe.integrations.peft import ParamWrapper

    recipe, before = bench_finetune.RECIPES[recipe], [name for name, _ in bench.model.named_parameters()]
    seen, kept = [], bench_finetune.loss_of

    def spy(model, ids, chunk):
        assert model.config._experts_implementation == contender
        assert model.is_gradient_checkpointing == recipe.checkpointing
        seen.append({name: p.dtype for name, p in model.named_parameters() if p.requires_grad})
        unmerged = any(isinstance(module, ParamWrapper) for module in model.modules())
        assert unmerged == (recipe.on_experts and contender == "cupymoe")
        return kept(model, ids, chunk)

    monkeypatch.setattr(bench_finetune, "loss_of", spy)
    bench.batches = bench.batches[:1]
    bench.train(recipe, contender, 0)
    for name, dtype in seen[0].items():
        assert "lora_" in name
        assert ("experts" in name) == recipe.on_experts
        assert dtype == torch.float32
    assert [name for name, _ in bench.model.named_parameters()] == before
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())
    assert not bench.model.is_gradient_checkpointing


def test_a_difference_beyond_the_noise_fails():
    losses = {"grouped_mm": [[3.0, 2.0], [3.0, 2.2]], "cupymoe": [[3.0, 2.1], [3.0, 2.1]]}
    found = bench_finetune.comparison(losses)
    assert found == {"difference": 0.05, "noise": 0.1}
    row = {"recipe": "attention", **found}
    assert bench_finetune.failures({"recipes": [row]}) == []
    for difference in (0.11, float("nan")):
        row["difference"] = difference
        assert bench_finetune.failures({"recipes": [row]}) == [
            f"attention: losses of cupymoe and grouped_mm differ by {difference}, "
            "and grouped_mm's own of two seeds by 0.1"
        ]
