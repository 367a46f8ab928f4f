"""soak.py: that it sees what it looks for, and that it runs."""

import subprocess
import sys

import pytest
import torch

from scripts import soak
from tests.helpers import ROOT

SCRIPT = ROOT / "scripts" / "soak.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300, check=False
    )


def test_says_that_it_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("--calls", "10")
    assert done.returncode == 1
    assert "soak.py needs a CUDA device" in done.stderr


@pytest.mark.parametrize("leak", soak.Memory._fields)
def test_sees_a_leak_of_each_kind(leak):
    middle, allowed = soak.Memory(100, 2000, 30, 40_000), soak.ALLOWED
    at_the_limit = middle._make(map(sum, zip(middle, allowed, strict=True)))
    assert soak.growth(middle, at_the_limit) == []
    (fault,) = soak.growth(middle, at_the_limit._replace(**{leak: getattr(at_the_limit, leak) + 1}))
    assert fault.startswith(leak)


@pytest.mark.gpu
def test_a_short_run():
    """Too short for the caches to be full in its middle, so that memory may have grown; results may not be wrong."""
    done = run("--calls", "400")
    assert "400 calls, 4 checked" in done.stdout, done.stderr
    assert "relative error of" not in done.stderr
