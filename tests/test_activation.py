"""The activation contract: names, spellings, ops."""

import pytest
import torch

from cupymoe import MoEActivation

VALUES = {
    "SILU": "silu",
    "GELU": "gelu",
    "GELU_TANH": "gelu_tanh",
    "RELU2": "relu2",
    "SWIGLUOAI": "swigluoai",
    "SWIGLUSTEP": "swiglustep",
    "SILU_NO_MUL": "silu_no_mul",
    "GELU_NO_MUL": "gelu_no_mul",
    "GELU_TANH_NO_MUL": "gelu_tanh_no_mul",
    "RELU2_NO_MUL": "relu2_no_mul",
}

OPS = {
    "SILU": "silu_and_mul",
    "GELU": "gelu_and_mul",
    "GELU_TANH": "gelu_tanh_and_mul",
    "RELU2": "relu2_and_mul",
    "SWIGLUOAI": "swigluoai_and_mul",
    "SWIGLUSTEP": "swiglustep_and_mul",
    "SILU_NO_MUL": "silu",
    "GELU_NO_MUL": "gelu",
    "GELU_TANH_NO_MUL": "gelu_tanh",
    "RELU2_NO_MUL": "relu2",
}


def test_members_are_the_contract():
    assert {member.name: member.value for member in MoEActivation} == VALUES


@pytest.mark.parametrize("member", MoEActivation)
def test_from_str_takes_every_value(member):
    assert MoEActivation.from_str(member.value) is member


@pytest.mark.parametrize(
    ("spelling", "member"),
    [
        ("gelu", MoEActivation.GELU),  # erf, always
        ("gelu_python", MoEActivation.GELU),
        ("gelu_pytorch_tanh", MoEActivation.GELU_TANH),  # Gemma 4's configs
        ("gelu_new", MoEActivation.GELU_TANH),
        ("gelu_fast", MoEActivation.GELU_TANH),
        ("gelu_accurate", MoEActivation.GELU_TANH),
        ("gelu_python_tanh", MoEActivation.GELU_TANH),
        ("swish", MoEActivation.SILU),
    ],
)
def test_from_str_aliases(spelling, member):
    assert MoEActivation.from_str(spelling) is member


@pytest.mark.parametrize("name", ["quick_gelu", "GELU", "gelu ", "", "SILU"])
def test_from_str_lists_what_is_known(name):
    with pytest.raises(ValueError, match="Unknown MoE activation") as caught:
        MoEActivation.from_str(name)
    message = str(caught.value)
    assert repr(name) in message
    for known in [*VALUES.values(), "gelu_pytorch_tanh", "swish"]:
        assert repr(known) in message


@pytest.mark.parametrize("name", [None, ["silu"], 1])
def test_from_str_wants_a_string(name):
    with pytest.raises(TypeError, match="activation must be a MoEActivation or its name, got") as caught:
        MoEActivation.from_str(name)
    assert str(caught.value).endswith(repr(name))


@pytest.mark.parametrize("member", MoEActivation)
def test_gated_and_width(member):
    assert member.is_gated == (not member.name.endswith("NO_MUL"))
    assert member.input_size(7) == (14 if member.is_gated else 7)
    assert member.is_interleaved == (member is MoEActivation.SWIGLUOAI)


@pytest.mark.parametrize("member", MoEActivation)
def test_without_mul(member):
    ungated = member.without_mul()
    if f"{member.name}_NO_MUL" in VALUES:
        assert ungated is MoEActivation[f"{member.name}_NO_MUL"]
    else:
        assert ungated is member
    assert ungated.function == member.function
    assert ungated.without_mul() is ungated


@pytest.mark.parametrize("member", MoEActivation)
def test_custom_op_name_is_a_registered_op(member):
    assert member.custom_op_name == OPS[member.name]
    op = getattr(torch.ops.cupymoe, member.custom_op_name)
    assert op(torch.ones(3, 8)).shape == (3, 4 if member.is_gated else 8)
