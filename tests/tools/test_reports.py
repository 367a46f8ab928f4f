"""What a report says of its origin, and when it is stale."""

import json
from importlib import metadata

import pytest

from cupymoe.kernels import cuda_sources, cupy_import
from cupymoe.tools import reports
from tests.helpers import ROOT

HASHES = reports.kernel_hashes(["combine", "gather", "route"])


def reason(tmp_path, content):
    path = tmp_path / "decode.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return reports.stale_reason(path)


def test_a_report_of_the_present_kernels_is_not_stale(tmp_path):
    assert reason(tmp_path, {"kernels": HASHES, "cuda_src_sha256": "of other sources besides"}) is None


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"route": "0"}, "route is changed since"),
        ({"route": "0", "gather": "0"}, "gather, route are changed since"),
        ({"no_such_kernel": "0"}, "no_such_kernel is gone since"),
        ({"no_such_kernel": "0", "combine": "0"}, "combine is changed since; no_such_kernel is gone since"),
    ],
)
def test_a_stale_report_names_the_kernels(tmp_path, others, said):
    assert reason(tmp_path, {"kernels": {**HASHES, **others}}) == said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "does not say which kernels it timed (KeyError: "),
        ([], "does not say which kernels it timed (TypeError: "),
        ({"kernels": 1}, "does not say which kernels it timed (TypeError: "),
        ("no JSON", "does not say which kernels it timed (JSONDecodeError: "),
        ({"kernels": {}}, "it timed no kernel of cupymoe"),
    ],
)
def test_what_is_no_report_is_stale(tmp_path, content, said):
    assert said in reason(tmp_path, content)


def test_committed_reports_say_which_kernels_they_timed():
    paths = reports.committed()
    assert paths == sorted((ROOT / "benchmarks").glob("*/*.json"))
    assert len(paths) >= 7
    timed = {path.stem: set(json.loads(path.read_text(encoding="utf-8"))["kernels"]) for path in paths}
    assert {"experts_up", "experts_down", "combine", "raw_read"} <= timed["decode"]
    assert {"experts_up_wgmma", "experts_down_wgmma", "sort_by_expert"} <= timed["prefill"]
    assert {"route", "router_logits"} <= timed["model"] & timed["host"]
    assert not {"experts_up", "router_logits"} & timed["stages"]


def test_an_installed_wheel_has_no_committed_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_sources, "directory", lambda: tmp_path / "cupymoe" / "cuda_src")
    assert reports.committed() == []


def test_versions_leave_out_peers_that_are_not_installed(monkeypatch):
    def version(name):
        if name == "vllm":
            return "1.2.3"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(cupy_import, "installed_cupys", lambda: {"cupy-cuda13x": "14.2.0"})
    found = reports.versions()
    assert found.pop("cupymoe")
    assert list(found) == ["python", "torch", "cuda", "cupy-cuda13x", "transformers", "vllm"]
    assert (found["cupy-cuda13x"], found["transformers"], found["vllm"]) == ("14.2.0", "not installed", "1.2.3")
