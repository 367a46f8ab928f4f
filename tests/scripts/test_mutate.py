"""mutate.py without a GPU: every fault still stands in one place, still compiles, and is a fault."""

import ast
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from cupymoe.kernels import catalog, cuda_sources, jit
from cupymoe.kernels.arch import ARCHITECTURES, HOPPER
from scripts import mutate
from tests.helpers import ROOT, compiled

CUDA = [mutation for mutation in mutate.MUTATIONS if mutation.source]
LAUNCHERS = [mutation for mutation in mutate.MUTATIONS if not mutation.source]


def by_fault(mutations):
    return pytest.mark.parametrize("mutation", mutations, ids=lambda mutation: mutation.fault)


def test_enough_and_none_twice():
    assert len(mutate.MUTATIONS) >= 20
    assert Counter(mutation.fault for mutation in mutate.MUTATIONS).most_common(1)[0][1] == 1


@by_fault(mutate.MUTATIONS)
def test_its_tests_are_there(mutation):
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (ROOT / file).read_text()


@pytest.mark.slow
@by_fault(CUDA)
def test_a_faulty_source_compiles_to_something_else(mutation, tmp_path, monkeypatch):
    variant, arch = next(
        (variant, arch.name)
        for arch in (HOPPER, ARCHITECTURES[0])
        for variant in catalog.variants(arch)
        if variant.source == mutation.source and set(mutation.defines) <= set(variant.defines)
    )
    expected = compiled(variant, arch).cubin
    shutil.copytree(cuda_sources.directory(), tmp_path / "cuda_src")
    mutation.apply(tmp_path)
    monkeypatch.setattr(cuda_sources, "directory", lambda: tmp_path / "cuda_src")
    monkeypatch.setattr(cuda_sources, "expanded", cuda_sources.expanded.__wrapped__)
    assert jit.compile_offline(variant, arch).cubin != expected


@by_fault(LAUNCHERS)
def test_a_faulty_launcher_is_other_python(mutation, tmp_path):
    shutil.copytree(ROOT / "cupymoe", tmp_path / "cupymoe", ignore=shutil.ignore_patterns("__pycache__"))
    mutation.apply(tmp_path)
    faulty, right = (ast.dump(ast.parse((folder / mutation.path).read_text())) for folder in (tmp_path, ROOT))
    assert faulty != right


def test_a_fault_that_stands_nowhere_is_named(tmp_path):
    (tmp_path / "file").write_text("a b b")
    for old, count in (("c", 0), ("b", 2)):
        with pytest.raises(ValueError, match=f"gone: stands {count} times in file, not once"):
            mutate.Mutation("gone", "file", old, "d", ()).apply(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("test", "mutated", "hangs", "expected", "word", "timeout"),
    [
        ("assert True", False, False, True, "passed", 60),
        ("assert False", False, False, False, "FAILED", 60),
        ("assert True", True, False, False, "MISSED", 60),
        ("assert False", True, False, True, "caught", 60),
        ("while True: pass", True, True, True, "HUNG", 3),
        ("while True: pass", True, False, False, "HUNG", 3),
    ],
)
def test_verdicts(monkeypatch, test, mutated, hangs, expected, word, timeout):
    """Of a checkout that holds one test, marked as the real ones are."""

    def copy_checkout(folder):
        (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu"]\n')
        (folder / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {test}\n")

    mutation = mutate.Mutation(
        "a fault", "test_it.py", "import pytest\n", "import pytest  #\n", ("test_it.py",), hangs=hangs
    )
    monkeypatch.setattr(mutate, "copy_checkout", copy_checkout)
    as_expected, line = mutate.judge(mutation if mutated else None, mutation.tests, timeout)
    assert (as_expected, line.split()[0]) == (expected, word)


def test_a_test_that_is_gone_is_no_catch(monkeypatch):
    monkeypatch.setattr(mutate, "copy_checkout", lambda folder: (folder / "file").write_text("a"))
    as_expected, line = mutate.judge(mutate.Mutation("a fault", "file", "a", "b", ()), ("gone.py",), timeout=30)
    assert not as_expected
    assert "pytest gave 4" in line


def test_says_that_it_needs_a_gpu():
    if mutate.torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, str(ROOT / "scripts" / "mutate.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "needs a CUDA device" in done.stderr) == (1, True)
