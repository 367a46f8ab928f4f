"""cupymoe audit: targets, exit codes and JSON."""

import json
import sys

import pytest
import torch

from cupymoe.tools.audit import targets
from tests.helpers import transformers_gemma4
from tests.tools.audit.helpers import ASKED, invoke


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
    result = invoke("tests.tools.audit.helpers:erf", "--json", "--seed", "3")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert {key: report[key] for key in ("target", "activation", "dtype", "seed", "verdict")} == {
        "target": "tests.tools.audit.helpers:erf",
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
    assert invoke("tests.tools.audit.helpers:erf", "--activation", "gelu").exit_code == 0


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("top_2_only", "the target raised AssertionError: top-2 only"),
        ("batch_of_64_only", "the target raised AssertionError: 64 tokens only"),
        ("leaving_when_probed", "the target raised SystemExit: 0"),
    ],
)
def test_a_target_that_refuses_a_probe_is_unclear(target, reason):
    """What it refuses says nothing of what it computes; the other probes still run."""
    target = f"tests.tools.audit.helpers:{target}"
    result = invoke(target)
    assert result.exit_code == 0, result.output
    assert f"{target} is unclear" in result.output
    report = json.loads(invoke(target, "--json").output)
    findings = {finding["name"]: finding for finding in report["findings"]}
    order = findings["gate order"]
    assert (order["value"], order["status"], order["detail"]) == ("not measured", "unclear", reason)
    assert {"activation", "routing weights"}.isdisjoint(findings)  # which need the order
    assert findings["rounding"]["status"] == findings["determinism"]["status"] == "ok"
    assert report["verdict"] == "unclear"


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("nothing", "is not 'cupymoe', 'transformers:NAME', 'vllm', 'sglang' or"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("tests.tools.audit.helpers:no_such_function", "AttributeError"),
        ("tests.tools.audit.helpers:NOT_A_FUNCTION", "is a int, not a function"),
        ("tests.tools.audit.helpers:refusing", "RuntimeError: no kernel for this card"),
        ("tests.tools.audit.helpers:leaving", "SystemExit: 0"),
        ("tests.tools.audit.leaves:experts", "can't be imported: SystemExit: 0"),
        ("tests.tools.audit.helpers:wrong_shape", "must return a tensor of shape [64, 256], got [64, 255]"),
        ("tests.tools.audit.helpers:of_complex_numbers", "must return a floating-point tensor, got torch.complex64"),
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


def test_a_target_of_transformers_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    with pytest.raises(targets.TargetError, match="transformers is not installed"):
        targets.resolve("transformers:eager", "silu")


def test_a_target_beside_the_caller_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside_the_caller.py").write_text("def experts(*case): return case[0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    states = torch.ones(1, 2)
    assert torch.equal(targets.resolve("beside_the_caller:experts", "silu").experts(states), states)


@pytest.mark.usefixtures("_cpu")
def test_what_a_target_prints_is_not_in_the_json():
    result = invoke("tests.tools.audit.helpers:printing", "--json")
    assert json.loads(result.stdout)["verdict"] == "agrees"
    assert "a word from the target" in result.stderr


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize(
    ("target", "activation", "reason"),
    [
        ("cupymoe", "gelu_so_fast", "Unknown MoE activation"),
        ("cupymoe", "silu_no_mul", "has no gate"),
        ("transformers:eager", "swigluoai", "transformers has no activation 'swigluoai'; it has ["),
    ],
)
def test_exit_2_for_an_activation_that_cannot_be_asked_for(target, activation, reason):
    if target.startswith("transformers"):
        transformers_gemma4()
    result = invoke(target, "--activation", activation)
    assert result.exit_code == 2
    assert reason in result.output
