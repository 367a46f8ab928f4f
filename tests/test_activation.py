"""The activation contract: names, spellings, ops."""

import copy
import math
import pickle

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.activation_math import FUNCTIONS
from cupymoe.ops.activation import member_of
from tests.helpers import WITH_PARAMETERS

VALUES = {
    "SILU": "silu",
    "GELU": "gelu",
    "GELU_TANH": "gelu_tanh",
    "RELU2": "relu2",
    "SWIGLUOAI": "swigluoai",
    "SWIGLUOAI_UNINTERLEAVE": "swigluoai_uninterleave",
    "SWIGLUSTEP": "swiglustep",
    "SITU": "situ",
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
    "SWIGLUOAI_UNINTERLEAVE": "swigluoai_uninterleave_and_mul",
    "SWIGLUSTEP": "swiglustep_and_mul",
    "SITU": "situ_and_mul",
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


def test_every_function_is_some_member_s():
    assert {member.function for member in MoEActivation} == set(FUNCTIONS)


@pytest.mark.parametrize(
    ("spelling", "member", "parameters"),
    [
        ("silu(limit=10.0)", MoEActivation.SILU, {"limit": 10.0, "alpha": 1.0}),
        ("swish( alpha = 1.702 , limit=1e1 )", MoEActivation.SILU, {"limit": 10.0, "alpha": 1.702}),
        ("swigluoai(limit=inf,alpha=2)", MoEActivation.SWIGLUOAI, {"limit": math.inf, "alpha": 2.0}),
        ("swiglustep(limit=0.5)", MoEActivation.SWIGLUSTEP, {"limit": 0.5}),
    ],
)
def test_parameters_are_part_of_a_spelling(spelling, member, parameters):
    activation = MoEActivation.from_str(spelling)
    assert activation.member is member
    assert activation.parameters == parameters
    assert activation is member.with_parameters(**parameters)
    assert (activation.function, activation.is_gated, activation.is_interleaved) == (
        member.function,
        member.is_gated,
        member.is_interleaved,
    )
    assert activation.input_size(7) == 14
    assert activation.without_mul() is activation


@pytest.mark.parametrize("activation", WITH_PARAMETERS, ids=lambda activation: activation.value)
def test_there_is_one_object_of_an_activation_with_parameters(activation):
    assert isinstance(activation, MoEActivation)
    assert activation not in list(MoEActivation)
    assert activation is MoEActivation.from_str(activation.value)
    assert activation is MoEActivation(activation.value)
    assert activation is member_of(activation.value)
    assert activation is copy.deepcopy(activation)
    assert activation is pickle.loads(pickle.dumps(activation))
    assert activation is activation.with_parameters()
    assert activation.with_parameters(**activation.member.parameters) is activation.member
    assert repr(activation).startswith(f"<MoEActivation.{activation.member.name}(")


@pytest.mark.parametrize("member", MoEActivation)
def test_a_member_with_its_own_parameters_is_itself(member):
    assert member.member is member
    assert member.with_parameters() is member
    if member.is_gated:
        assert member.with_parameters(**member.parameters) is member


def test_an_activation_with_parameters_has_no_op_of_its_own():
    with pytest.raises(ValueError, match=r"silu\(limit=10.0\) has no op of its own: .*moe_activation takes its value"):
        _ = MoEActivation.from_str("silu(limit=10.0)").custom_op_name


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("silu(limit=0)", r"limit of silu must be from 1e-06 to inf, got 0\.0"),
        ("silu(limit=-7)", "limit of silu must be from 1e-06 to inf, got -7"),
        ("swiglustep(limit=nan)", "limit of swiglustep must be from 1e-06 to inf, got nan"),
        ("swigluoai(alpha=inf)", r"alpha of swigluoai must be from 0\.125 to 8\.0, got inf"),
        ("swigluoai(alpha=nan)", "alpha of swigluoai must be from"),
        ("swigluoai(alpha=0)", "alpha of swigluoai must be from"),
        ("swigluoai(beta=1)", "swigluoai has no parameter 'beta': it has limit, alpha"),
        ("swiglustep(alpha=1)", "swiglustep has no parameter 'alpha': it has limit"),
        ("situ(beta=inf)", r"beta of situ must be from 0\.125 to 10000\.0, got inf"),
        ("situ(linear_beta=0)", r"linear_beta of situ must be from 0\.125 to inf, got 0\.0"),
        ("silu(self=1)", "silu has no parameter 'self'"),
        ("gelu_tanh(limit=7)", "gelu_tanh has no parameter 'limit': it has none"),
        ("silu_no_mul(limit=7)", "silu_no_mul has no parameter 'limit': it has none"),
        ("unknown(limit=7)", "Unknown MoE activation: 'unknown'"),
        *(
            (spelling, "must be spelled like 'swigluoai")
            for spelling in ("silu(", "silu()", "silu(7)", "silu(limit=7", "silu(limit=7)!", "silu(limit=7,limit=7)")
        ),
    ],
)
def test_parameters_that_can_t_be_are_refused(spelling, message):
    with pytest.raises(ValueError, match=message):
        MoEActivation.from_str(spelling)


@pytest.mark.parametrize("value", [None, "7", True, torch.tensor(7.0)])
def test_a_parameter_is_a_number(value):
    with pytest.raises(TypeError, match="limit of silu must be a number, got"):
        MoEActivation.SILU.with_parameters(limit=value)
