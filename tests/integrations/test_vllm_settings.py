"""What the plug-in for vLLM decides without vLLM: whether it is asked for, and which activation a model means."""

import pkgutil
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.integrations import vllm as plugin
from cupymoe.integrations.vllm.activations import member_of
from cupymoe.integrations.vllm.served import slow_reason
from tests.helpers import ROOT


def test_the_entry_point_is_register():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (name,) = project["entry-points"]["vllm.general_plugins"].values()
    assert pkgutil.resolve_name(name) is plugin.register


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_registered_unless_asked_for(monkeypatch, value):
    monkeypatch.setitem(sys.modules, "vllm", None)  # to import it would raise
    monkeypatch.setenv(plugin.ENVIRONMENT, value) if value is not None else monkeypatch.delenv(
        plugin.ENVIRONMENT, raising=False
    )
    plugin.register()


def test_an_unknown_value_is_refused(monkeypatch):
    monkeypatch.setenv(plugin.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match="CUPYMOE_VLLM must be 0 or 1, got 'yes'"):
        plugin.register()


def test_each_spelling_of_gelu_is_its_own():
    assert member_of("gelu") is MoEActivation.GELU
    assert member_of("gelu_tanh") is MoEActivation.GELU_TANH


# What vLLM's kernels compute: gate and up [T, I] in float64.
def clamped(gate, up, limit, alpha, beta):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def situ(gate, up, beta, linear_beta):
    up = linear_beta * torch.tanh(up / linear_beta) if linear_beta else up
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


@pytest.mark.parametrize(
    ("activation", "settings", "function"),
    [
        ("silu", {}, lambda g, u: torch.nn.functional.silu(g) * u),
        ("silu", {"limit": 1.5}, lambda g, u: clamped(g, u, 1.5, 1.0, 0.0)),
        ("silu", {"limit": 1.5, "alpha": 1.702, "beta": 1.0}, lambda g, u: clamped(g, u, 1.5, 1.0, 0.0)),
        ("gelu", {"limit": 1.5}, lambda g, u: torch.nn.functional.gelu(g) * u),
        ("gelu_tanh", {}, lambda g, u: torch.nn.functional.gelu(g, approximate="tanh") * u),
        ("swigluoai_uninterleave", {"limit": 1.5}, lambda g, u: clamped(g, u, 1.5, 1.0, 0.0)),
        ("swigluoai_uninterleave", {"limit": 2.0, "alpha": 1.5, "beta": 1.0}, lambda g, u: clamped(g, u, 2.0, 1.5, 1)),
        ("swiglustep", {}, lambda g, u: torch.nn.functional.silu(g).clamp(max=7) * u.clamp(-7, 7)),
        ("situ", {"situ_beta": 4.0}, lambda g, u: situ(g, u, 4.0, None)),
        ("situ", {"situ_beta": 4.0, "situ_linear_beta": -1.0}, lambda g, u: situ(g, u, 4.0, None)),
        ("situ", {"situ_beta": 4.0, "situ_linear_beta": 2.0}, lambda g, u: situ(g, u, 4.0, 2.0)),
    ],
)
def test_the_function_is_the_one_that_vllm_computes(activation, settings, function):
    gate, up = 6 * torch.randn(2, 64, 8, dtype=torch.float64)
    member = member_of(activation, **settings)
    torch.testing.assert_close(reference.activate(torch.cat((gate, up), -1), member), function(gate, up))


def test_swigluoai_is_interleaved_and_has_gpt_oss_parameters():
    gate, up = 6 * torch.randn(2, 64, 8, dtype=torch.float64)
    rows = torch.stack((gate, up), -1).flatten(-2)
    member = member_of("swigluoai", limit=7.0, alpha=1.702, beta=1.0)
    torch.testing.assert_close(reference.activate(rows, member), clamped(gate, up, 7.0, 1.702, 1.0))


@pytest.mark.parametrize(
    ("activation", "settings", "reason"),
    [
        ("relu2", {}, "vLLM has relu2 only without a gate"),
        ("swigluoai", {"limit": 10.0}, "the model sets {'limit': 10.0}"),
        ("swigluoai_uninterleave", {}, "needs a swiglu_limit"),
        ("swigluoai_uninterleave", {"limit": 7.0, "beta": 0.5}, "a beta of 0 or 1, got 0.5"),
        ("situ", {}, "needs an activation_situ_beta"),
        ("silu", {"limit": 0.0}, "limit of silu must be from"),
        ("xielu", {}, "Unknown MoE activation: 'xielu'"),
    ],
)
def test_other_activations_are_refused_by_name(activation, settings, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        member_of(activation, **settings)


def test_a_layer_that_is_slow_only_with_the_same_bits_in_every_call_is_refused_then(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    sizes = {"num_local_experts": 8, "experts_per_token": 2, "hidden_dim": 2824, "intermediate_size_per_partition": 704}
    layer = SimpleNamespace(**sizes, device="cuda", in_dtype=torch.bfloat16, has_bias=False)
    assert slow_reason(layer, MoEActivation.SILU, "fast") is None
    reason = slow_reason(layer, MoEActivation.SILU, "invariant")
    assert "only a slow backend serves 1 tokens" in reason
    assert "fused: its tiles need a hidden size that is a multiple of 16, not 2824" in reason


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_zero", "int8", "fp8", "fp8_g128"])
@pytest.mark.parametrize("numerics", ["fast", "invariant"])
def test_quantised_layers_of_gemma_4_s_sizes_are_not_slow(monkeypatch, capability, name, numerics):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    sizes = {
        "num_local_experts": 128,
        "experts_per_token": 8,
        "hidden_dim": 2816,
        "intermediate_size_per_partition": 704,
    }
    layer = SimpleNamespace(**sizes, device="cuda", in_dtype=torch.bfloat16, has_bias=False)
    assert slow_reason(layer, MoEActivation.GELU_TANH, numerics, f"{name},{name}") is None
