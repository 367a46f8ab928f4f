"""bench_vllm.py's logic in the real vLLM, on a CPU: both contenders are called as a layer calls them."""

import json
from contextlib import ExitStack

import pytest
import torch
from click.testing import CliRunner

from cupymoe.integrations.vllm import served
from tests.scripts.replayed import Replayed

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from cupymoe.integrations.vllm.experts import CupymoeExperts

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own


@pytest.fixture
def bench_vllm(monkeypatch):
    from scripts import bench_vllm

    class Graph(Replayed):
        def _replace(self, outputs):
            self.outputs, self.calls = outputs, self.calls[: len(outputs)]
            return self

    monkeypatch.setattr(bench_vllm, "capture", Graph)
    monkeypatch.setattr(bench_vllm, "time_in_turn", lambda graphs: {name: {"p50": 1.0} for name in graphs})
    monkeypatch.setattr(bench_vllm, "free_memory", lambda: None)
    monkeypatch.setattr(served, "slow_reason", lambda *of_layer: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    return bench_vllm


@pytest.fixture
def without_triton(bench_vllm, monkeypatch):
    """Ours in the place of theirs, which a CPU can't run."""
    monkeypatch.setattr(bench_vllm, "experts_class", lambda name: CupymoeExperts)


def test_each_row_has_times_and_errors_of_both(bench_vllm, without_triton):
    torch.manual_seed(0)
    with ExitStack() as stack:
        bench_vllm.in_vllm(stack, torch.device("cpu"))
        rows, failures = bench_vllm.measure(bench_vllm.SMALL, torch.device("cpu"), (1, 8), lambda line: None)
    assert [row["tokens"] for row in rows] == [1, 8]
    for row in rows:
        assert set(row["ms"]) == {"cupymoe", "vllm_triton"}
        assert 0 < row["error"]["cupymoe"] < 0.0042
    assert failures == []


def test_their_class_is_vllm_s_own(bench_vllm):
    assert bench_vllm.experts_class("vllm_triton").__module__.startswith("vllm.")
    assert bench_vllm.experts_class("cupymoe") is CupymoeExperts


def test_a_layer_that_cupymoe_does_not_serve_is_not_measured(bench_vllm, monkeypatch):
    monkeypatch.setattr(served, "slow_reason", lambda *of_layer: "no such card")
    with ExitStack() as stack:
        bench_vllm.in_vllm(stack, torch.device("cpu"))
        moe = bench_vllm.moe_config(bench_vllm.SMALL, torch.device("cpu"), 8)
        with pytest.raises(Exception, match="does not serve vLLM's layer here: no such card"):
            bench_vllm.kernel_of("cupymoe", moe)


def test_a_report_with_failures_is_written_and_exits_with_1(bench_vllm, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    monkeypatch.setattr(bench_vllm, "in_vllm", lambda stack, device: None)
    row = {"tokens": 1, "ms": {}, "error": {}}
    for name in ("cupymoe", "vllm_triton"):
        row["ms"][name], row["error"][name] = {"p20": 1.0, "p50": 1.0, "p80": 1.0}, 0.1
    monkeypatch.setattr(bench_vllm, "measure", lambda *arguments: ([row], ["vllm_triton is wrong"]))
    result = CliRunner().invoke(bench_vllm.main, ["--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "vllm_triton is wrong" in result.output
    assert json.loads((tmp_path / "a-card" / "vllm.json").read_text())["rows"] == [row]
