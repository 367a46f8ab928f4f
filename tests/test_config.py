"""Gemma4MoEConfig: validated, and read from transformers without an assumption."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from cupymoe import Gemma4MoEConfig, MoEActivation
from tests.helpers import transformers_config

FIELDS = {
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "top_k_experts": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-5,
}


def test_activation_is_the_config_s():
    assert Gemma4MoEConfig(**FIELDS).activation is MoEActivation.GELU_TANH
    assert Gemma4MoEConfig(**{**FIELDS, "hidden_activation": "gelu"}).activation is MoEActivation.GELU


def test_hidden_activation_has_no_default():
    with pytest.raises(TypeError, match="hidden_activation"):
        Gemma4MoEConfig(hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2)


@pytest.mark.parametrize("name", ["hidden_size", "moe_intermediate_size", "num_experts", "top_k_experts"])
@pytest.mark.parametrize("size", [0, -1, 2.0, "8", None, True])
def test_sizes_are_positive_integers(name, size):
    with pytest.raises(ValueError, match=rf"{name} must be a positive integer, got {size!r}"):
        Gemma4MoEConfig(**{**FIELDS, name: size})


@pytest.mark.parametrize("eps", [None, "1e-6", -5.0, -1, True, float("nan"), float("inf"), [1e-6]])
def test_eps_is_a_finite_number(eps):
    with pytest.raises(ValueError, match=re.escape(f"rms_norm_eps must be a finite number, at least 0, got {eps!r}")):
        Gemma4MoEConfig(**{**FIELDS, "rms_norm_eps": eps})


@pytest.mark.parametrize("eps", [0, 0.0, 1e-6])
def test_eps_may_be_zero(eps):
    assert Gemma4MoEConfig(**{**FIELDS, "rms_norm_eps": eps}).rms_norm_eps == eps


def test_top_k_is_at_most_the_number_of_experts():
    with pytest.raises(ValueError, match=r"top_k_experts must be at most num_experts=6, got 7"):
        Gemma4MoEConfig(**{**FIELDS, "top_k_experts": 7})
    assert Gemma4MoEConfig(**{**FIELDS, "top_k_experts": 6}).top_k_experts == 6


def test_unknown_activation():
    with pytest.raises(ValueError, match="Unknown MoE activation: 'quick_gelu'"):
        Gemma4MoEConfig(**{**FIELDS, "hidden_activation": "quick_gelu"})


def test_the_activation_is_a_string():
    with pytest.raises(ValueError, match=r"hidden_activation must be a string, got \['silu'\]"):
        Gemma4MoEConfig(**{**FIELDS, "hidden_activation": ["silu"]})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Gemma4MoEConfig(**FIELDS).hidden_size = 8


def test_from_transformers_reads_every_field():
    config = transformers_config(hidden_activation="silu", rms_norm_eps=1e-5)
    assert Gemma4MoEConfig.from_transformers(config) == Gemma4MoEConfig(**{**FIELDS, "hidden_activation": "silu"})


@pytest.mark.parametrize("name", FIELDS)
def test_from_transformers_fills_nothing_in(name):
    lacking = SimpleNamespace(**{key: value for key, value in FIELDS.items() if key != name})
    with pytest.raises(AttributeError, match=name):
        Gemma4MoEConfig.from_transformers(lacking)


def test_gemma4_26b_a4b():
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    sizes = (config.hidden_size, config.moe_intermediate_size, config.num_experts, config.top_k_experts)
    assert sizes == (2816, 704, 128, 8)
    assert config.rms_norm_eps == 1e-6
    assert config.activation is MoEActivation.GELU_TANH
