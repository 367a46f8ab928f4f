"""sanitize.py without a GPU or its tools: which kernels are watched, what is reached, and that a blind tool fails."""

import stat
import sys

import pytest
import torch
from click.testing import CliRunner

from cupymoe import fused_experts, reference
from cupymoe.backends.fused import plans_at_once, tiles_reason
from cupymoe.kernels import cuda_sources
from cupymoe.kernels.arch import BUILDS
from cupymoe.kernels.coded_tiles import coded_slots
from cupymoe.kernels.cupy_import import import_nvrtc
from cupymoe.kernels.expert_tiles import CUTS, batch_cuts, cut, prefers_tiles
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from cupymoe.tools.verification.result import relative_error
from scripts import sanitize
from scripts.sanitizer import calls, inputs


def test_every_kernel_is_watched():
    entries = sanitize.entry_points()
    kernels = sum(cuda_sources.expanded(name).count("__global__") for name in cuda_sources.names())
    assert len({*entries}) == len(entries) == kernels
    assert {*entries} >= {*cuda_sources.names(), "count_by_expert"}


def test_every_regime_and_every_cut_is_reached():
    reached = set()
    for num_experts, hidden_size, counts in calls.CASES:
        for count in counts:
            load = Load.of(count, inputs.TOP_K, num_experts)
            tiled = prefers_tiles(load) and tiles_reason(load, hidden_size) is None
            reached.add(cut(load, 48) if tiled else regime(load, 48))
    assert reached == {*CUTS, *(regime(Load.of(count, 1, 1), 48) for count in range(1, 1000))}


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_reaches_every_regime(monkeypatch, name):
    """By calls that the reference answers here."""
    reached = set()

    class Backend:
        def __init__(self, build):
            self.build = build

        def forward(self, call, tensors):
            planned = plans_at_once(call.load, self.build)
            reached.add((regime(call.load, call.intermediate_size, self.build), planned))
            return reference.experts(*tensors[:5], call.activation).to(call.dtype)

    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
    monkeypatch.setattr(calls, "FusedBackend", Backend)
    calls.run_build(name)
    every = {regime(Load.of(count, 1, experts), 48, BUILDS[name]) for experts in (1, 64) for count in range(1, 5000)}
    assert {each for each, planned in reached if planned} == every
    assert [planned for _, planned in reached].count(False) == 1


def test_quantised_calls_reach_every_regime_and_size_of_tiles():
    def reached(load):
        return coded_slots(load) if prefers_tiles(load, has_codes=True) else regime(load, 128, has_codes=True)

    every = {reached(Load.of(count, inputs.TOP_K, 64)) for count in range(1, 2000)}
    assert {reached(Load.of(count, inputs.TOP_K, 64)) for count in calls.QUANTISED_TOKENS} == every


def test_training_reaches_both_ways_and_every_cut():
    """Kinds of the stream, and cuts of the tiles, by which all gradients go."""
    reached, cuts = set(), set()
    for num_experts, hidden_size, counts in calls.TRAINED:
        for load in (Load.of(count, inputs.TOP_K, num_experts) for count in counts):
            assert tiles_reason(load, hidden_size) is None
            reached.add(cut(load, 48) if prefers_tiles(load) else regime(load, 48).inline_pairs > 0)
            cuts.add(cut(load, 48))
    assert (reached, cuts) == ({True, False, *CUTS}, {*CUTS})


def test_training_steps_agree_with_their_truth(monkeypatch):
    """On the CPU, by the reference in the dtype of the parameters."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
    monkeypatch.setattr(
        calls, "fused_experts", lambda *tensors, activation, backend: fused_experts(*tensors, activation=activation)
    )
    checked = []
    monkeypatch.setattr(inputs, "relative_error", lambda *tensors: checked.append(relative_error(*tensors)) or 0.0)
    calls.run_training(8, 32, (3, 20), 24, torch.bfloat16)
    assert len(checked) == 2 * (5 + 7)
    assert 0.0 < max(checked) < 0.02


def test_batches_and_maps_agree_with_their_truth(monkeypatch):
    """On the CPU, by the reference; the rooms of a batch reach the stream, one cut and both."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor.clone())
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda module: module)
    checked = []
    monkeypatch.setattr(inputs, "relative_error", lambda *tensors: checked.append(relative_error(*tensors)) or 0.0)
    calls.run_batches()
    calls.run_mapped_experts()
    assert len(checked) == 2 * (3 * 6 + 8) + 5
    assert 0.0 < max(checked) < 0.01
    loads = [Load.of(8 * room, 1, 8) for room in (3, 100, 380)]
    cuts = [batch_cuts(load, 128) if prefers_tiles(load) else () for load in loads]
    assert cuts == [(), ((1, 2),), ((1, 2), (1, 3))]


def test_planted_faults_compile():
    nvrtc = import_nvrtc()
    assert {*sanitize.FAULTS} == {*sanitize.TOOLS}
    for tool in sanitize.TOOLS:
        program = nvrtc.createProgram(sanitize.planted_source(tool), "planted.cu", [], [])
        nvrtc.compileProgram(program, ("-arch=sm_90a",))
        assert sanitize.PLANTED.encode() in nvrtc.getCUBIN(program)
        nvrtc.destroyProgram(program)


# Stands for compute-sanitizer: reports the planted kernel, or a finding of the suite, only if its name is watched.
TOOL = r"""#!/bin/bash
echo "========= COMPUTE-SANITIZER"
case " $* " in *" {missing} "*) exit 0;; esac
case " $* " in
*"kne=planted_fault "*"--planted "*) echo "=========     at planted_fault+0x70 in planted.cu:1"; exit 9;;
*" --part "*) {suite};;
esac
"""


@pytest.mark.parametrize(
    ("missing", "suite", "exit_code", "message"),
    [
        ("never", "echo the part is done", 0, "memcheck   0 findings\nsynccheck  0 findings"),
        ("synccheck", "echo the part is done", 1, "synccheck  BLIND: it did not report a fault that was planted"),
        ("never", "echo the part is done; exit 9", 1, "memcheck   FAILED"),
        ("never", "exit 0", 1, "memcheck   FAILED"),
    ],
    ids=["clean", "a blind tool", "a finding", "a suite cut short"],
)
def test_verdict(monkeypatch, tmp_path, missing, suite, exit_code, message):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(missing=missing, suite=suite))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    python = tmp_path / "python"  # what runs without a tool
    python.write_text("#!/bin/bash\necho the part is done\n")
    python.chmod(tool.stat().st_mode)
    monkeypatch.setattr(sys, "executable", str(python))
    result = CliRunner().invoke(sanitize.main, ["--tool", "memcheck", "--tool", "synccheck"])
    assert result.exit_code == exit_code, result.output
    assert message in result.output
    monkeypatch.setattr(sys, "executable", "false")
    result = CliRunner().invoke(sanitize.main, [])
    assert result.exit_code == 1
    assert "the kernels fail without a tool" in result.output


def test_a_traceback_is_no_report():
    assert not sanitize.reports_planted('File "sanitize.py", in planted_fault\n========= ERROR SUMMARY: 0 errors')
    assert sanitize.reports_planted("\n=========     at planted_fault+0x70 in planted.cu:1")
