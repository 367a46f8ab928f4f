"""cupymoe audit: each wrong implementation is named for what it is wrong in, and right ones pass."""

import json
from enum import Enum

import pytest
import torch
from click.testing import CliRunner

from cupymoe import MoEActivation, audit, reference
from cupymoe.audit.measured import CANDIDATES, LAYOUTS, NUM_EXPERTS
from cupymoe.cli import main
from tests.helpers import transformers_gemma4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ASKED = "gelu_pytorch_tanh"


def plain_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, act=CANDIDATES["gelu_tanh"]):
    """The layer in plain torch: fp32 inside, one rounding, and a masked pair contributes nothing."""
    output = torch.zeros(hidden_states.shape)
    for expert, (rows, down) in enumerate(zip(gate_up_proj.float(), down_proj.float(), strict=True)):
        token, k = torch.where(top_k_index == expert)
        gate, up = (hidden_states[token].float() @ rows.T).chunk(2, -1)
        output.index_add_(0, token, act(gate, up) @ down.T * top_k_weights[token, k, None])
    return output.to(hidden_states.dtype)


def with_activation(name):
    return lambda *case: plain_experts(*case, act=CANDIDATES[name])


def with_layout(name):
    """Experts that read gate_up_proj in this order."""

    def experts(hidden_states, gate_up_proj, *rest):
        gate, up = {
            "up first": lambda rows: rows.chunk(2, 1)[::-1],
            "interleaved": lambda rows: (rows[:, ::2], rows[:, 1::2]),
            "interleaved, up first": lambda rows: (rows[:, 1::2], rows[:, ::2]),
        }[name](gate_up_proj)
        return plain_experts(hidden_states, torch.cat((gate, up), 1), *rest)

    return experts


def with_weights(change):
    return lambda *case: plain_experts(*case[:4], change(case[4]))


def clamped(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    top_k_index = top_k_index.clamp(0, len(gate_up_proj) - 1)
    return plain_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)


def raising(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    if top_k_index.min() < 0 or top_k_index.max() >= len(gate_up_proj):
        raise IndexError("no such expert")
    return plain_experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)


def noisy(scale):
    return lambda *case: plain_experts(*case) * (1 + scale * torch.randn(()))


def mixing(scale):
    """Experts of which a token's output leaks into the others."""

    def experts(*case):
        output = plain_experts(*case)
        return output + scale * output.mean(0) * (len(output) > 1)

    return experts


def dropping(*case):
    """Experts with a capacity: past 40 tokens they drop the rest."""
    output = plain_experts(*case)
    output[40:] = 0
    return output


def ungated(hidden_states, gate_up_proj, *rest):
    return plain_experts(hidden_states, gate_up_proj, *rest, act=lambda gate, up: CANDIDATES["gelu_tanh"](gate, up**0))


def erf(*case):
    return plain_experts(*case, act=CANDIDATES["gelu"])


def not_a_number(*case):
    return plain_experts(*case) * float("nan")


def wrong_shape(hidden_states, *rest):
    return hidden_states[:, 1:]


def refusing(*case):
    raise RuntimeError("no kernel for this card")


NOT_A_FUNCTION = 3


def subject_of(experts, dtype=torch.float32, activation="gelu_tanh"):
    return audit.Subject(audit.Target("under test", experts), activation, dtype, torch.device("cpu"))


def findings_of(experts, dtype=torch.float32, activation="gelu_tanh"):
    findings = list(audit.audit(subject_of(experts, dtype, activation)))
    return {finding.name: finding for finding in findings}, audit.verdict(findings)


def contradictions(findings):
    return {name for name, finding in findings.items() if finding.status == "contradicts"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_implementation_agrees(dtype):
    findings, verdict = findings_of(plain_experts, dtype)
    assert verdict == "agrees"
    assert [finding.value for finding in findings.values()][:3] == ["gate first", "GELU (tanh)", "as given, once"]
    assert {finding.status for finding in findings.values()} <= {"ok", "warn"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gelu", "GELU (erf)"),
        ("silu", "SILU"),
        ("quick_gelu", "quick GELU"),
        ("relu", "ReLU"),
        ("relu2", "ReLU2"),
        ("swigluoai", "SWIGLUOAI"),
        ("swiglustep", "SWIGLUSTEP"),
    ],
)
def test_a_wrong_activation_is_named(name, value, dtype):
    findings, verdict = findings_of(with_activation(name), dtype)
    assert verdict == "contradicts"
    assert findings["activation"].value == value
    assert findings["activation"].status == "contradicts"
    assert findings["gate order"].value == "gate first"
    assert findings["rounding"].measured["error_from_found"] < torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "swigluoai"])
def test_each_candidate_agrees_where_the_config_asks_for_it(name):
    findings, verdict = findings_of(with_activation(name), activation=name)
    assert verdict == "agrees", findings


def test_interleaved_swigluoai_agrees_where_the_config_asks_for_it():
    def experts(*case):
        return reference.experts(*case, MoEActivation.SWIGLUOAI)

    findings, verdict = findings_of(experts, activation="swigluoai")
    assert (verdict, findings["gate order"].value) == ("agrees", "interleaved")


@pytest.mark.parametrize(
    ("share", "status"), [(0.0, "contradicts"), (0.5, "unclear"), (1.0, "ok")], ids=["erf", "between", "tanh"]
)
def test_between_erf_and_tanh_is_no_guess(share, status):
    def act(gate, up):
        return share * CANDIDATES["gelu_tanh"](gate, up) + (1 - share) * CANDIDATES["gelu"](gate, up)

    findings, verdict = findings_of(lambda *case: plain_experts(*case, act=act))
    assert findings["activation"].status == status
    if status == "unclear":
        assert findings["activation"].value == "cannot tell: GELU (erf) or GELU (tanh)"
        assert verdict == "unclear"


def in_steps(name, size):
    """An activation whose result is a multiple of size: noise of a known amplitude."""
    return lambda *case: plain_experts(*case, act=lambda gate, up: (CANDIDATES[name](gate, up) / size).round() * size)


def test_rounding_that_hides_the_difference_is_no_guess():
    """Steps of 0.02 are forty times the largest difference of erf and tanh."""
    findings, verdict = findings_of(in_steps("gelu_tanh", 0.02), torch.bfloat16)
    assert findings["activation"].value == "cannot tell: GELU (erf) or GELU (tanh)"
    assert verdict == "unclear"
    findings, _ = findings_of(in_steps("silu", 0.02), torch.bfloat16)
    assert findings["activation"].value == "SILU"


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh"])
def test_thousands_of_inputs_tell_what_no_single_one_does(name):
    """Steps of 0.002 are four times the largest difference of erf and tanh."""
    findings, _ = findings_of(in_steps(name, 0.002))
    assert findings["activation"].measured["found"] == name


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
    findings, verdict = findings_of(lambda *case: plain_experts(*case, act=lambda gate, up: torch.tanh(gate) * up))
    assert (findings["activation"].value, verdict) == ("unknown", "contradicts")


def test_nan_is_unknown():
    _, verdict = findings_of(not_a_number)
    assert verdict == "contradicts"


@pytest.mark.usefixtures("_cpu")
def test_json_has_no_infinity():
    def refuse(constant):
        raise AssertionError(constant)

    json.loads(invoke("tests.test_audit:not_a_number", "--json").output, parse_constant=refuse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "gate first"])
def test_a_wrong_gate_order_is_named(name, dtype):
    findings, verdict = findings_of(with_layout(name), dtype)
    assert verdict == "contradicts"
    assert contradictions(findings) == {"gate order", "rounding"}
    assert findings["gate order"].value == name
    assert findings["activation"].value == "GELU (tanh)"


def test_ungated_experts_are_named():
    findings, verdict = findings_of(ungated)
    assert (findings["gate order"].value, findings["activation"].value) == ("ungated", "GELU (tanh)")
    assert verdict == "contradicts"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("change", "value"),
    [
        (lambda weights: weights / weights.sum(-1, keepdim=True), "renormalised"),
        (torch.square, "applied twice"),
        (torch.ones_like, "not applied"),
    ],
    ids=["renormalised", "twice", "not applied"],
)
def test_wrong_routing_weights_are_named(change, value, dtype):
    findings, verdict = findings_of(with_weights(change), dtype)
    assert findings["routing weights"].value == value
    assert verdict == "contradicts"


def test_weights_clamped_to_one_are_seen():
    findings, _ = findings_of(with_weights(lambda weights: weights.clamp(max=1)))
    assert findings["routing weights"].status == "contradicts"


@pytest.mark.parametrize(
    ("dtype", "cast", "status"),
    [
        (torch.float32, torch.bfloat16, "contradicts"),
        (torch.float32, torch.float16, "contradicts"),
        (torch.float16, torch.bfloat16, "contradicts"),
        (torch.bfloat16, torch.bfloat16, "warn"),
    ],
)
def test_rounded_routing_weights_are_named(dtype, cast, status):
    findings, _ = findings_of(with_weights(lambda weights: weights.to(cast).float()), dtype)
    name = str(cast).removeprefix("torch.")
    assert findings["routing weights"].value == f"as given, once, rounded to {name}"
    assert findings["routing weights"].status == status


@pytest.mark.parametrize(
    ("experts", "of_num_experts", "of_minus_one"),
    [
        (plain_experts, "contributes zero", "contributes zero"),
        (clamped, "clamped to expert 7", "clamped to expert 0"),
        (raising, "raises", "raises"),
    ],
)
def test_masked_ids(experts, of_num_experts, of_minus_one):
    findings, verdict = findings_of(experts)
    assert findings[f"masked id {NUM_EXPERTS} (num_experts)"].value == of_num_experts
    assert findings["masked id -1"].value == of_minus_one
    assert verdict == "agrees"


@pytest.mark.parametrize(("scale", "status"), [(3e-7, "warn"), (0.3, "contradicts")])
def test_nondeterminism(scale, status):
    findings, _ = findings_of(noisy(scale))
    assert (findings["determinism"].value, findings["determinism"].status) == ("differs", status)


@pytest.mark.parametrize(
    ("scale", "value", "status"),
    [(1e-7, "same to rounding", "warn"), (0.1, "depends on the batch", "contradicts")],
)
def test_batch_dependence(scale, value, status):
    findings, _ = findings_of(mixing(scale))
    assert (findings["batch invariance"].value, findings["batch invariance"].status) == (value, status)


def test_tokens_computed_one_by_one_are_the_same_bits():
    def experts(states, gate_up_proj, down_proj, index, weights):
        rows = zip(states.split(1), index.split(1), weights.split(1), strict=True)
        return torch.cat([plain_experts(one, gate_up_proj, down_proj, *routing) for one, *routing in rows])

    finding = audit.probes.batch_invariance(subject_of(experts))
    assert (finding.value, finding.status) == ("same bits", "ok")


def test_dropped_tokens_are_seen():
    findings, verdict = findings_of(dropping)
    assert verdict == "contradicts"
    assert {"rounding", "batch invariance"} <= contradictions(findings)


def invoke(*arguments):
    return CliRunner().invoke(main, ["audit", *arguments])


@pytest.fixture
def _cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["cupymoe", "eager", "grouped_mm", "batched_mm", "cupymoe of transformers"])
def test_what_runs_on_a_cpu_agrees(target, dtype):
    if target != "cupymoe":
        transformers_gemma4()
        target = f"transformers:{target.removesuffix(' of transformers')}"
    result = invoke(target, "--dtype", dtype)
    assert result.exit_code == 0, result.output
    assert f"{target} agrees" in result.output


@pytest.mark.usefixtures("_cpu")
def test_exit_1_and_json_of_a_contradiction():
    result = invoke("tests.test_audit:erf", "--json", "--seed", "3")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert {key: report[key] for key in ("target", "activation", "dtype", "seed", "verdict")} == {
        "target": "tests.test_audit:erf",
        "activation": ASKED,
        "dtype": "float32",
        "seed": 3,
        "verdict": "contradicts",
    }
    assert {"date", "device", "versions"} <= report.keys()
    assert [finding["name"] for finding in report["findings"]] == [
        "gate order",
        "activation",
        "routing weights",
        "rounding",
        "determinism",
        "batch invariance",
        "masked id 8 (num_experts)",
        "masked id -1",
    ]
    for finding in report["findings"]:
        assert finding.keys() == {"name", "value", "status", "detail", "expected", "measured"}
    activation = report["findings"][1]
    assert (activation["value"], activation["expected"]) == ("GELU (erf)", "GELU (tanh)")
    assert 1.5e-4 < activation["measured"]["errors"]["gelu_tanh"] < 2.5e-4
    assert invoke("tests.test_audit:erf", "--activation", "gelu").exit_code == 0


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nothing", "is not 'cupymoe', 'transformers:NAME' or"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("tests.test_audit:no_such_function", "AttributeError"),
        ("tests.test_audit:NOT_A_FUNCTION", "is a int, not a function"),
        ("tests.test_audit:refusing", "RuntimeError: no kernel for this card"),
        ("tests.test_audit:wrong_shape", "must return a tensor of shape [64, 256], got [64, 255]"),
        ("transformers:no_such", "registered: ['eager', "),
        ("transformers:deepgemm", "requires bfloat16"),
        ("transformers:sonicmoe", "ImportError: sonic-moe requires"),
    ],
)
def test_exit_2_says_why(target, reason):
    if target.startswith("transformers"):
        transformers_gemma4()
    result = invoke(target)
    assert result.exit_code == 2
    assert reason in result.output
    report = json.loads(invoke(target, "--json").output)
    assert report["verdict"] == "cannot run"
    assert reason in report["reason"]


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("activation", "reason"), [("gelu_so_fast", "Unknown MoE activation"), ("silu_no_mul", "has no gate")]
)
def test_exit_2_for_an_activation_that_cannot_be_asked_for(activation, reason):
    result = invoke("cupymoe", "--activation", activation)
    assert result.exit_code == 2
    assert reason in result.output


class SonicActivation(Enum):
    """As sonic-moe's ``enums.ActivationType``; its GEGLU is the tanh form (comment there, and QuACK's ``geglu``)."""

    SWIGLU = "silu"
    GEGLU = "gelu_tanh"
    REGLU = "relu"


@pytest.fixture
def sonicmoe(monkeypatch):
    """transformers' bridge as it is, over a kernel in plain torch that computes the activation it is asked for."""
    transformers_gemma4()
    from transformers.integrations import sonicmoe

    asked = []

    def moe_general_routing_inputs(
        x, scores, token, expert, w1, b1, w2, b2, *, E, activation_type, concat_layout, **others
    ):
        asked.append(activation_type)
        assert (b1, b2, concat_layout) == (None, None, True)
        assert w1.shape == (w1.shape[0], x.shape[1], E)  # (2I, H, E)
        assert w2.shape == (x.shape[1], w1.shape[0] // 2, E)  # (H, I, E)
        output = torch.zeros(x.shape)
        for expert_id in range(E):
            pairs = torch.where(expert == expert_id)[0]
            rows = token[pairs].long()
            gate, up = (x[rows].float() @ w1[:, :, expert_id].float().T).chunk(2, -1)
            y = CANDIDATES[activation_type.value](gate, up) @ w2[:, :, expert_id].float().T
            output.index_add_(0, rows, y * scores[pairs, None].float())
        return output.to(x.dtype), None

    monkeypatch.setattr(sonicmoe, "_SONICMOE", sonicmoe.SonicMoE(SonicActivation, moe_general_routing_inputs))
    return asked


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sonicmoe_bridge_asks_for_swiglu_where_gemma4_says_gelu_tanh(sonicmoe, dtype):
    result = invoke("transformers:sonicmoe", "--dtype", dtype, "--json")
    assert set(sonicmoe) == {SonicActivation.SWIGLU}
    assert result.exit_code == 1
    findings = {finding["name"]: finding for finding in json.loads(result.output)["findings"]}
    assert (findings["activation"]["value"], findings["activation"]["status"]) == ("SILU", "contradicts")
    assert findings["gate order"]["value"] == "gate first"
    assert findings["routing weights"]["value"] == (
        "as given, once" if dtype == "float32" else "as given, once, rounded to bfloat16"
    )
    assert findings["rounding"]["measured"]["error"] > 0.1
    assert findings["rounding"]["measured"]["error_from_found"] < 5e-3


@pytest.mark.usefixtures("_cpu", "sonicmoe")
def test_the_sonicmoe_bridge_is_right_where_the_config_says_silu():
    assert invoke("transformers:sonicmoe", "--activation", "silu").exit_code == 0


def test_the_sonicmoe_bridge_has_no_tanh_gelu_to_ask_for(sonicmoe):
    """Reading the activation's name is not enough to mend it: the bridge's map has no tanh GELU."""
    from transformers.integrations.sonicmoe import sonicmoe_experts_forward

    gemma4 = transformers_gemma4()
    config = gemma4.Gemma4TextConfig(enable_moe_block=True, num_experts=2, hidden_size=8, moe_intermediate_size=4)
    assert not hasattr(config, "hidden_act")
    config._experts_implementation = "sonicmoe"
    experts = gemma4.Gemma4TextExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.zeros_(parameter)
    arguments = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    config.hidden_act = config.hidden_activation
    with pytest.raises(ValueError, match="sonicmoe does not support the 'gelu_pytorch_tanh' activation"):
        sonicmoe_experts_forward(experts, *arguments)
    config.hidden_act = "gelu"  # erf, to transformers; sonic-moe's GEGLU is the tanh form
    sonicmoe_experts_forward(experts, *arguments)
    assert sonicmoe == [SonicActivation.GEGLU]
