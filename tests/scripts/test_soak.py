"""soak.py: that it sees what it looks for, and that it runs."""

import random
import subprocess
import sys

import pytest
import torch

from cupymoe import Gemma4MoEConfig, adapter_copies
from scripts import soak
from scripts.soaking.training import WAYS, Training
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


@pytest.fixture
def training():
    """Steps of a tiny layer on the CPU, after the first of each way."""
    pytest.importorskip("peft", minversion="0.21")
    torch.manual_seed(0)
    config = Gemma4MoEConfig(
        hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
    )
    states = torch.randn(128, config.hidden_size, dtype=torch.bfloat16)
    return Training(soak.new_layer(config, "cpu"), states, random.Random(0))


def wrong(training):
    return [name for name, (error, allowed) in training.errors().items() if not error <= allowed]


def test_training_steps(training):
    """Each way is checked in its largest step; adapters change, and what they are compared with; no gradient stays."""
    before = training.adapters.down.b.clone()
    for step in range(20):
        training.step(is_checked=step % 2 == 0)
    assert training.checked == len(WAYS) + 10
    of_tokens = ("hidden_states", "top_k_weights")
    assert set(training.errors()) == {
        *(f"full {name}" for name in (*of_tokens, "gate_up_proj", "down_proj")),
        *(f"frozen {name}" for name in of_tokens),
        *(f"lora {name}" for name in (*of_tokens, *training.factors)),
    }
    assert wrong(training) == training.faults() == []
    assert 0 < (training.adapters.down.b - before).abs().max() < 0.01
    for name, factor in training.adapters.factors().items():
        assert factor.data_ptr() == training.factors[name].data_ptr()
    assert all(parameter.grad is None for parameter in training.adapted.parameters())


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_sees_a_wrong_gradient(training, factor):
    training.factors["down_b"].register_hook(lambda grad: grad * factor)
    for _ in range(50):
        training.step(is_checked=True)
        if wrong(training):
            break
    assert wrong(training) == ["lora down_b"]


def test_sees_a_copy_that_is_stale(training, monkeypatch):
    monkeypatch.setattr(adapter_copies.AdapterCopy, "distrust", lambda _: None)
    monkeypatch.setattr(adapter_copies, "_state_of", lambda *_: 0)
    for _ in range(20):
        training.step(is_checked=True)
    (fault,) = training.faults()
    assert fault.startswith("after ")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "done"), [([], "400 calls, 4 checked"), (["--training"], "400 steps, 10 checked")], ids=str
)
def test_a_short_run(options, done):
    """Too short for the caches to be full in its middle, so that memory may have grown; results may not be wrong."""
    if options:
        pytest.importorskip("peft", minversion="0.21")
    short = run("--calls", "400", *options)
    assert done in short.stdout, short.stderr
    assert "relative error of" not in short.stderr
    assert "other bits" not in short.stderr
