"""Compilations without a GPU are kept on disk only where a folder is named, and never given for another text."""

import pytest

from cupymoe.kernels import cuda_sources, jit, offline_cache, raw_read
from cupymoe.kernels.jit import CompileError, CompileReport

VARIANT = raw_read.variant()


@pytest.fixture
def compiled(monkeypatch):
    """The compilations that were made, each giving another report."""
    made = []

    def compile_offline(variant, arch):
        made.append((variant, arch))
        return CompileReport(len(made), 0, 0.5, "a log", bytes([0, 255, len(made)]))

    monkeypatch.setattr(jit, "compile_offline", compile_offline)
    return made


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CUPYMOE_OFFLINE_CACHE", str(tmp_path / "offline"))
    return tmp_path / "offline"


@pytest.mark.parametrize("value", [None, ""])
def test_nothing_is_kept_without_a_folder(compiled, monkeypatch, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUPYMOE_OFFLINE_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("CUPYMOE_OFFLINE_CACHE", value)
    assert [offline_cache.compile_offline(VARIANT, "sm_80").registers for _ in range(2)] == [1, 2]
    assert [*tmp_path.iterdir()] == []


def test_a_kept_report_is_the_one_that_was_made(compiled, folder):
    first = offline_cache.compile_offline(VARIANT, "sm_80")
    assert offline_cache.compile_offline(VARIANT, "sm_80") == first
    assert first.cubin == bytes([0, 255, 1])
    assert len(compiled) == len([*folder.iterdir()]) == 1


def test_another_text_variant_architecture_or_nvrtc_is_compiled(compiled, folder, monkeypatch):
    calls = [(VARIANT, "sm_80"), (VARIANT, "sm_90a"), (VARIANT._replace(defines=("A=1",)), "sm_80")]
    reports = [offline_cache.compile_offline(*call) for call in calls]
    monkeypatch.setattr(cuda_sources, "expanded", lambda name: "another text")
    reports.append(offline_cache.compile_offline(VARIANT, "sm_80"))
    monkeypatch.setattr(jit.import_nvrtc(), "getVersion", lambda: (99, 0))
    reports.append(offline_cache.compile_offline(VARIANT, "sm_80"))
    assert [report.registers for report in reports] == [1, 2, 3, 4, 5]


def test_another_option_is_compiled(compiled, folder, monkeypatch):
    offline_cache.compile_offline(VARIANT, "sm_80")
    before = jit._options
    monkeypatch.setattr(jit, "_options", lambda variant, arch: (*before(variant, arch), "--fmad=false"))
    assert [offline_cache.compile_offline(VARIANT, "sm_80").registers for _ in range(2)] == [2, 2]


def test_an_error_is_not_kept(folder, monkeypatch):
    def compile_offline(variant, arch):
        raise CompileError("no such type")

    monkeypatch.setattr(jit, "compile_offline", compile_offline)
    for _ in range(2):
        with pytest.raises(CompileError, match="no such type"):
            offline_cache.compile_offline(VARIANT, "sm_80")
    assert not folder.exists()
