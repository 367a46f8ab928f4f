"""cupymoe verify --checkpoint."""

import json
import re

import pytest
import torch
from click.testing import CliRunner

from cupymoe import MoEActivation, reference
from cupymoe.backends.reference import ReferenceBackend
from cupymoe.cli import verify
from cupymoe.verification import routing
from tests.checkpoint.helpers import (
    DOWN,
    GATE_UP,
    LAYERS,
    LAYOUTS,
    PREFIX,
    H,
    tensors_of,
    with_,
    without,
    write,
    write_config,
    write_shards,
)


def run_verify(*args):
    return CliRunner().invoke(verify, ["--checkpoint", *map(str, args)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verify_prints_a_line_for_each_layer(tmp_path, layout):
    result = run_verify(write_shards(tmp_path, tensors_of(layout)))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if " against float64" in line]
    assert [line.split()[:3] for line in lines] == [["pass", "layer", str(layer)] for layer in LAYERS]
    for line in lines:
        assert re.search(
            r"relative error of 0.00420: .*reference 0.00\d{3} \(largest \d.\de-\d+\).*; "
            r"\d of 6 experts hit, the most used by \d+ of 16 tokens; \d+ tokens with ties",
            line,
        )
    assert "3 pass, 0 fail, 0 skipped" in result.output


def test_verify_is_the_same_for_every_layout(tmp_path):
    outputs = set()
    for layout in LAYOUTS:
        report = json.loads(run_verify(write(tmp_path / layout.__name__, tensors_of(layout)), "--json").output)
        outputs.add(json.dumps(report["checks"]))
    assert len(outputs) == 1


def test_verify_in_float32(tmp_path):
    result = run_verify(write(tmp_path, tensors_of()), "--dtype", "float32", "--json")
    assert result.exit_code == 0, result.output
    assert all(
        check["detail"].startswith("relative error of 0.00001:") for check in json.loads(result.output)["checks"]
    )


def nan_in(tensors):
    tensors[f"{PREFIX}3.{GATE_UP}"][4, 0, 0] = float("nan")


def zeros_in(tensors):
    tensors[f"{PREFIX}3.{DOWN}"][:2] = 0


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (nan_in, r"experts.gate_up_proj of experts \[4\] is not finite \(1 of 6\)"),
        (zeros_in, r"experts.down_proj of experts \[0, 1\] is zero \(2 of 6\)"),
        (with_("router.scale", torch.zeros(H)), r"router.scale is zero"),
        (without(DOWN), r"3.experts.down_proj is missing"),
        (with_("experts.w_scale", torch.ones(1)), r"3.experts.w_scale is left over"),
    ],
)
def test_verify_fails_for_a_corrupted_layer_alone(tmp_path, corrupt, message):
    tensors = tensors_of()
    corrupt(tensors)
    result = run_verify(write(tmp_path, tensors), "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert report["checkpoint"] == str(tmp_path)
    assert "shape" not in report
    assert [check["status"] for check in report["checks"]] == ["pass", "fail", "pass"]
    assert re.search(message, report["checks"][1]["detail"])


def test_verify_fails_for_a_backend_that_is_wrong(tmp_path, monkeypatch):
    """Erf for tanh is seen in float32; a scale that is applied twice in bfloat16 too."""
    right = ReferenceBackend.__call__

    def erf(self, *args):
        return right(self, *args[:-1], MoEActivation.GELU)

    def scaled_twice(self, states, gate_up, down, index, weights, activation):
        return right(self, states, gate_up, down, index, weights * 1.01, activation)

    path = write(tmp_path, tensors_of())
    for wrong, dtype in ((erf, "float32"), (scaled_twice, "bfloat16")):
        monkeypatch.setattr(ReferenceBackend, "__call__", wrong)
        result = run_verify(path, "--dtype", dtype)
        assert result.exit_code == 1
        assert "3 fail" in result.output


def test_verify_fails_for_a_routing_that_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "route", lambda logits, top_k, per_expert_scale: reference.route(-logits, top_k))
    result = run_verify(write(tmp_path, tensors_of()))
    assert result.exit_code == 1
    assert re.search(r"\d+ experts differ from float64's", result.output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "neither model.safetensors.index.json nor a .safetensors file is there"),
        (lambda folder: write(folder, {"lm_head.weight": torch.ones(1)}), "no key of a router or of experts"),
        (
            lambda folder: write_config(write(folder, tensors_of()), hidden_activation=...),
            "hidden_activation must be there and is not assumed",
        ),
    ],
)
def test_verify_fails_without_layers_or_config(tmp_path, make, message):
    make(tmp_path / "model")
    result = run_verify(tmp_path / "model")
    assert result.exit_code == 1
    assert re.search(rf"fail +checkpoint has layers with experts .*{message}", result.output)


def test_verify_of_a_path_that_is_not_there(tmp_path):
    result = run_verify(tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "does not exist" in result.output
