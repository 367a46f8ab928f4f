"""Which activation it is, and where no guess is made."""

import json

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.tools import audit
from cupymoe.tools.audit.measured import CANDIDATES, candidate_name
from tests.tools.audit.helpers import (
    DTYPES,
    fifth_is_silu,
    findings_of,
    invoke,
    not_a_number,
    plain_experts,
    subject_of,
    with_act,
    with_activation,
)


def activation_of(experts, dtype=torch.float32, asked="gelu_tanh"):
    """What the one probe finds, for tests that look at no other."""
    return audit.probes.activation(subject_of(experts, dtype, asked), "gate first")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_implementation_agrees(dtype):
    findings, verdict = findings_of(plain_experts, dtype)
    assert verdict == "agrees"
    assert [finding.value for finding in findings.values()][:3] == ["gate first", "GELU (tanh)", "as given, once"]
    assert {finding.status for finding in findings.values()} <= {"ok", "warn"}


# SILU(7) = 6.994 is 7 in bfloat16.
HIDDEN = {("swiglustep", torch.bfloat16), ("clamped_swiglu_7", torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        (name, value, dtype)
        for dtype in DTYPES
        for name, value in [
            ("gelu", "GELU (erf)"),
            ("silu", "SILU"),
            ("quick_gelu", "quick GELU"),
            ("relu", "ReLU"),
            ("relu2", "ReLU2"),
            ("swigluoai", "SWIGLUOAI"),
            ("swiglustep", "SWIGLUSTEP"),
            ("clamped_swiglu_7", "clamped SwiGLU (limit 7)"),
            ("clamped_swiglu_10", "clamped SwiGLU (limit 10)"),
        ]
        if (name, dtype) not in HIDDEN
    ],
)
def test_a_wrong_activation_is_named(name, value, dtype):
    subject = subject_of(with_activation(name), dtype)
    finding = audit.probes.activation(subject, "gate first")
    assert (finding.value, finding.status) == (value, "contradicts")
    assert audit.probes.gate_order(subject).value == "gate first"
    rounding = audit.probes.rounding(subject, finding.measured["found"], "gate first")
    assert rounding.measured["error_from_found"] < torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("name", [name for name, _ in sorted(HIDDEN, key=str)])
def test_a_clamp_of_silu_s_argument_or_result_is_the_same_in_bfloat16(name):
    """So each is unclear where the config asks for one of them, and contradicts where it asks for another function."""
    asked = activation_of(with_activation(name), torch.bfloat16, name)
    other = activation_of(with_activation(name), torch.bfloat16)
    for finding, status in ((asked, "unclear"), (other, "contradicts")):
        assert finding.value == "cannot tell: SWIGLUSTEP or clamped SwiGLU (limit 7)"
        assert finding.status == status


def of_tf32_products(gate, up):
    """Operands rounded to the 10 bits of mantissa that tensor cores read of a float32."""

    def rounded(values):
        return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    return rounded(CANDIDATES["gelu_tanh"](rounded(gate), rounded(up)))


@pytest.mark.parametrize(
    "act",
    [
        lambda gate, up: CANDIDATES["gelu_tanh"](gate, up) + 5e-4 * torch.sin(20 * gate) * up,
        lambda gate, up: CANDIDATES["gelu_tanh"](gate, up) * 1.0009,
        of_tf32_products,
    ],
    ids=["a wave", "a factor", "TF32"],
)
def test_in_float32_a_function_nearby_is_not_it(act):
    findings, verdict = findings_of(with_act(act))
    other = activation_of(with_act(act), asked="silu")
    for finding, status in ((findings["activation"], "unclear"), (other, "contradicts")):
        assert (finding.value, finding.status) == ("near GELU (tanh)", status)
        assert "more than rounding: TF32 products" in finding.detail
    assert verdict == "unclear"


@pytest.mark.parametrize(("roundings", "value"), [(80, "GELU (tanh)"), (120, "near GELU (tanh)")])
def test_in_float32_a_hundred_roundings_are_the_limit(roundings, value):
    factor = 1 + roundings * torch.finfo(torch.float32).eps
    finding = activation_of(with_act(lambda gate, up: CANDIDATES["gelu_tanh"](gate, up) * factor))
    assert finding.value == value


@pytest.mark.parametrize(
    ("name", "known"), [("gelu_pytorch_tanh", "gelu_tanh"), ("swish", "silu"), ("quick_gelu", "quick_gelu")]
)
def test_an_activation_is_asked_for_by_a_config_s_name_or_a_candidate_s(name, known):
    assert candidate_name(name) == known


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "swigluoai"])
def test_each_candidate_agrees_where_the_config_asks_for_it(name):
    findings, verdict = findings_of(with_activation(name), activation=name)
    assert verdict == "agrees", findings


def test_interleaved_swigluoai_agrees_where_the_config_asks_for_it():
    def experts(*case):
        return reference.experts(*case, MoEActivation.SWIGLUOAI)

    findings, verdict = findings_of(experts, activation="swigluoai")
    assert (verdict, findings["gate order"].value) == ("agrees", "interleaved")


def between_erf_and_tanh(share):
    def act(gate, up):
        return share * CANDIDATES["gelu_tanh"](gate, up) + (1 - share) * CANDIDATES["gelu"](gate, up)

    return with_act(act)


@pytest.mark.parametrize(("share", "status"), [(0.0, "contradicts"), (1.0, "ok")], ids=["erf", "tanh"])
def test_all_of_erf_or_of_tanh_is_told(share, status):
    assert activation_of(between_erf_and_tanh(share)).status == status


def test_between_erf_and_tanh_is_no_guess():
    findings, verdict = findings_of(between_erf_and_tanh(0.5))
    assert findings["activation"].value == "cannot tell: GELU (erf) or GELU (tanh)"
    assert findings["activation"].status == verdict == "unclear"


def in_steps(name, size):
    """An activation whose result is a multiple of size: noise of a known amplitude."""
    return with_act(lambda gate, up: (CANDIDATES[name](gate, up) / size).round() * size)


def test_rounding_that_hides_the_difference_is_no_guess():
    """Steps of 0.02 are forty times the largest difference of erf and tanh."""
    findings, verdict = findings_of(in_steps("gelu_tanh", 0.02), torch.bfloat16)
    assert findings["activation"].value == "cannot tell: GELU (erf) or GELU (tanh)"
    assert verdict == "unclear"
    assert activation_of(in_steps("silu", 0.02), torch.bfloat16).value == "SILU"


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_thousands_of_inputs_tell_what_no_single_one_does(name):
    """Steps of 0.002 are four times the largest difference of erf and tanh."""
    assert activation_of(in_steps(name, 0.002)).measured["found"] == name


@pytest.mark.parametrize(
    ("scale", "sigmas", "value"),
    [(2.5e-4, (6, 9), "GELU (tanh)"), (4e-4, (3, 6), "cannot tell: GELU (erf) or GELU (tanh)")],
)
def test_six_sigmas_tell_a_candidate(scale, sigmas, value):
    def act(gate, up):
        exact = CANDIDATES["gelu_tanh"](gate, up)
        return exact + scale * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))

    finding = activation_of(with_act(act), torch.bfloat16)
    assert sigmas[0] < finding.measured["sigmas"]["gelu"] < sigmas[1]
    assert finding.value == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_sixteen_bits_tell_erf_from_tanh(name, dtype):
    for seed in range(3):
        subject = audit.Subject(
            audit.Target("", with_activation(name)), "gelu_tanh", dtype, torch.device("cpu"), seed=seed
        )
        finding = audit.probes.activation(subject, "gate first")
        assert finding.measured["found"] == name
        assert min(finding.measured["sigmas"].values()) > 30


def test_an_unknown_activation_is_not_forced_into_a_candidate():
    finding = activation_of(with_act(lambda gate, up: torch.tanh(gate) * up))
    assert (finding.value, finding.status) == ("unknown", "contradicts")


def test_a_clamp_far_out_makes_another_activation():
    """Hardly a normal gate is beyond 6."""
    finding = activation_of(with_act(lambda gate, up: CANDIDATES["gelu_tanh"](gate.clamp(max=6), up)))
    assert (finding.value, finding.status) == ("unknown", "contradicts")


def test_one_expert_of_another_activation_is_seen():
    finding = activation_of(fifth_is_silu)
    assert (finding.value, finding.status) == ("unknown", "contradicts")


def test_nan_is_unknown():
    _, verdict = findings_of(not_a_number)
    assert verdict == "contradicts"


@pytest.mark.usefixtures("_cpu")
def test_json_has_no_infinity():
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(invoke("tests.tools.audit.helpers:not_a_number", "--json").output, parse_constant=refuse)
