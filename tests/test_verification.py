"""cupymoe verify: what it runs, and what it says."""

import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cupymoe import reference
from cupymoe.backends.reference import ReferenceBackend
from cupymoe.cli import main
from cupymoe.verification import compilation, experts
from cupymoe.verification.result import SHAPES, Setting
from cupymoe.warmup import NUM_TOKENS
from tests.helpers import ROOT, transformers_gemma4

MANY = 1500  # more than float64 computes


def small(device, dtype=torch.bfloat16):
    return Setting(SHAPES["small"], dtype, 0, torch.device(device))


def outcomes(results, pattern):
    return {result.name: result.status for result in results if re.search(pattern, result.name)}


@pytest.fixture
def _many(monkeypatch):
    """Many tokens on the CPU, as on a GPU."""
    monkeypatch.setattr(experts, "token_counts", lambda setting: (64, MANY))


def test_a_gpu_is_checked_in_every_regime_of_the_kernels():
    assert experts.token_counts(small("cpu")) == (1, 7, 64)
    counts = experts.token_counts(small("cuda"))
    assert {1, 7, 64, *NUM_TOKENS} == set(counts)
    assert sorted(counts) == list(counts)


@pytest.mark.usefixtures("_many")
def test_many_tokens_are_checked_as_few_are(monkeypatch):
    computed = []

    def recorded(states, *rest):
        computed.append((states.dtype, len(states)))
        return reference.experts(states, *rest)

    monkeypatch.setattr(experts, "reference", SimpleNamespace(experts=recorded))
    results = list(experts.checks(small("cpu")))
    assert computed == [(torch.float64, 64), (torch.float64, 1024)]
    assert outcomes(results, r"\(reference\)") == {
        f"{name}, T = {num_tokens} (reference)": "pass"
        for name in ("experts against float64", "same bits every run")
        for num_tokens in (64, MANY)
    }
    assert outcomes(results, "replay") == {
        f"CUDA-graph replay gives the eager bits, T = {num_tokens}": "skipped" for num_tokens in (64, MANY)
    }


def test_few_tokens_are_compared_over_several_calls(monkeypatch):
    """The error of one token scatters by a tenth; the calls stay as small as the check says."""
    right, calls, compared = ReferenceBackend.__call__, [], []

    def recorded(self, states, *rest):
        calls.append(len(states))
        return right(self, states, *rest)

    def oracle(states, *rest):
        compared.append(len(states))
        return reference.experts(states, *rest)

    monkeypatch.setattr(ReferenceBackend, "__call__", recorded)
    monkeypatch.setattr(experts, "reference", SimpleNamespace(experts=oracle))
    for num_tokens, count in ((1, 16), (7, 3), (16, 1), (64, 1)):
        assert [result.status for result in experts._against_float64(small("cpu"), num_tokens)][-1] == "pass"
        assert calls == [num_tokens] * count
        assert compared == [num_tokens * count]
        calls.clear(), compared.clear()


@pytest.mark.usefixtures("_many")
@pytest.mark.parametrize("tokens", [slice(0, 100), slice(MANY - 100, MANY)], ids=["first", "last"])
def test_a_fault_of_some_of_many_tokens_is_seen(monkeypatch, tokens):
    """Though float64 computes a part of them only."""
    right = ReferenceBackend.__call__

    def wrong(self, states, *rest):
        output = right(self, states, *rest)
        if len(output) == MANY:
            output[tokens] = 0
        return output

    monkeypatch.setattr(ReferenceBackend, "__call__", wrong)
    assert outcomes(experts.checks(small("cpu")), r"float64.*\(reference\)") == {
        "experts against float64, T = 64 (reference)": "pass",
        f"experts against float64, T = {MANY} (reference)": "fail",
    }


@pytest.mark.usefixtures("_many")
def test_a_result_that_changes_with_many_tokens_alone_is_seen(monkeypatch):
    right = ReferenceBackend.__call__

    def wrong(self, states, *rest):
        output = right(self, states, *rest)
        return output * (1 + torch.rand(())) if len(output) == MANY else output

    monkeypatch.setattr(ReferenceBackend, "__call__", wrong)
    assert outcomes(experts.checks(small("cpu")), "same bits") == {
        "same bits every run, T = 64 (reference)": "pass",
        f"same bits every run, T = {MANY} (reference)": "fail",
    }


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_pass_in_every_regime(dtype):
    with torch.inference_mode():
        results = list(experts.checks(small("cuda", dtype)))
    assert [result for result in results if result.status == "fail"] == []
    assert len(outcomes(results, r"float64.*\(reference\)")) == len({1, 7, 64, *NUM_TOKENS})
    assert len(outcomes(results, "replay")) == 2


def test_the_readme_s_counts_are_verify_s(monkeypatch):
    """On a machine without a GPU; nothing is compiled here, which takes a minute."""
    transformers_gemma4()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(compilation, "compile_offline", lambda *job: SimpleNamespace(spill_bytes=0, registers=1))
    result = CliRunner().invoke(main, ["verify", "--shape", "small"])
    assert result.exit_code == 0, result.output
    assert f"\n{result.output.splitlines()[-1]}\n" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", [str(10**22), "-1"])
def test_seeds_out_of_range(seed):
    for command in (["verify"], ["audit", "cupymoe"]):
        result = CliRunner().invoke(main, [*command, "--seed", seed])
        assert result.exit_code == 2
        assert f"Invalid value for '--seed': {seed} is not in the range" in result.output


def test_a_compiler_that_says_nothing_of_registers_is_no_pass(monkeypatch):
    """NVRTC's log is empty where it took a cubin from a cache."""
    monkeypatch.setattr(compilation, "compile_offline", lambda *job: SimpleNamespace(spill_bytes=0, registers=0))
    results = list(compilation.checks(SimpleNamespace(on_gpu=False)))
    assert {result.status for result in results} == {"fail"}
    assert "nothing of registers" in results[0].detail
