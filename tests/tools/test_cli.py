"""``cupymoe info``: what it says of a machine, whatever the machine lacks."""

import json
import os
from importlib import metadata

import pytest
import torch
from click.testing import CliRunner

from cupymoe.backends import registry
from cupymoe.kernels import catalog, cuda_sources, cupy_import, jit
from cupymoe.tools import reports
from cupymoe.tools.cli import main
from cupymoe.weights import FORMATS


def info():
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0, result.output
    return result.output


def states_of_sources(output):
    return section(output, "CUDA sources")


def section(output, title):
    """First and other words of each line under a title."""
    lines = output.partition(f"\n{title}\n")[2].partition("\n\n")[0].splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def a_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize(
    ("folder", "note"),
    [
        ("", ""),
        (".", ""),
        ("no_such_folder", ""),
        ("/no_such_folder/below", " (not writable)"),
        ("a_file/below", " (not writable)"),
    ],
)
def test_info_of_any_cache_folder(no_gpu, monkeypatch, tmp_path, folder, note):
    """Root may write everywhere, so who may is said here."""
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path.startswith(str(tmp_path)))
    monkeypatch.setattr(cupy_import, "cache_folder", lambda: folder)
    assert f"\nkernel cache     {folder}{note}\n" in info()


@pytest.mark.parametrize("package", ["cupy", "transformers"])
def test_info_of_a_package_that_is_not_installed(no_gpu, monkeypatch, package):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert f"\n{package:16} not installed\n" in info()


def test_info_without_a_gpu(no_gpu):
    assert states_of_sources(info()) == dict.fromkeys(cuda_sources.names(), "not compiled: no CUDA device")


def test_info_says_which_backend_serves_which_format(no_gpu):
    table = section(info(), "quantised weights, both in one format (bfloat16)")
    served = ["yes" if name == "reference" else "no" for name in registry()]
    rows = {name: cells.split() for name, cells in table.items()}
    assert rows == {"format": [*registry()], **dict.fromkeys(FORMATS, served)}


def test_info_says_of_each_benchmark_report_whether_it_is_of_these_kernels(no_gpu, monkeypatch, tmp_path):
    kernels = {
        "fresh": reports.kernel_hashes(["route"]),
        "stale": {"route": "0" * 64},
    }
    paths = [tmp_path / "gpu" / f"{name}.json" for name in kernels]
    (tmp_path / "gpu").mkdir()
    for path, timed in zip(paths, kernels.values(), strict=True):
        path.write_text(json.dumps({"kernels": timed}))
    monkeypatch.setattr(reports, "committed", lambda: paths)
    assert section(info(), "benchmark reports") == {
        "gpu/fresh.json": "of the present kernels",
        "gpu/stale.json": "stale: route is changed since",
    }


def test_info_of_a_wheel_names_no_benchmark_report(no_gpu, monkeypatch):
    monkeypatch.setattr(reports, "committed", lambda: [])
    assert "benchmark reports" not in info()


def test_info_compiles_what_a_gpu_is_served_with(monkeypatch):
    a_gpu(monkeypatch, (8, 0))
    compiled = []
    monkeypatch.setattr(jit, "kernel", lambda variant, entry, device: compiled.append(entry))
    states = states_of_sources(info())
    assert set(states) == set(cuda_sources.names())
    for name, state in states.items():
        assert state.startswith("not compiled: it serves" if name in catalog.HOPPER_ONLY else "ready in"), name
    assert compiled == [name for name in cuda_sources.names() if name not in catalog.HOPPER_ONLY]


@pytest.mark.parametrize(
    ("capability", "architecture", "said"),
    [
        ((7, 5), "sm_75, compute capability 7.5, 48 KB", "cupymoe has no kernel for compute capability 7.5"),
        ((8, 6), "sm_86, compute capability 8.6, 99 KB", "as build sm_86 with what this one has, was run on a Hopper"),
        ((9, 0), "sm_90a, compute capability 9.0, 227 KB", None),
        ((10, 0), "sm_100, compute capability 10.0, 227 KB", "its weight stream was run on a Hopper card"),
        ((12, 1), "sm_121, compute capability 12.1, 99 KB", "as build sm_120 with what this one has"),
    ],
)
def test_info_says_what_was_run_for_a_card(monkeypatch, capability, architecture, said):
    a_gpu(monkeypatch, capability)
    monkeypatch.setattr(jit, "kernel", lambda variant, entry, device: None)
    printed = info()
    assert f"\narchitecture     {architecture} of shared memory a block\n" in printed
    assert said is None or said in printed
    assert ("ever run on a card" in printed) == (capability not in ((7, 5), (9, 0)))


def test_info_names_the_backends_that_alignment_keeps_out(monkeypatch):
    a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(jit, "kernel", lambda variant, entry, device: None)
    lines = [line.split(maxsplit=2) for line in info().splitlines() if line.startswith("  ")]
    unaligned = {name: said for name, kind, said in lines if kind == "unaligned"}
    assert unaligned == {
        "fused": "hidden_states and both weights must start on 16 bytes",
        "grouped": "both weights must start on 16 bytes",
        "simt": "serves it",
        "reference": "serves it",
    }


@pytest.mark.parametrize("error", [ImportError("two cupys\nat once"), jit.CompileError("no\nlog")])
def test_info_says_why_a_kernel_is_not_usable(monkeypatch, error):
    def kernel(*_):
        raise error

    a_gpu(monkeypatch, (9, 0))
    monkeypatch.setattr(jit, "kernel", kernel)
    first = str(error).splitlines()[0]
    assert states_of_sources(info()) == dict.fromkeys(cuda_sources.names(), f"not usable: {first}")
