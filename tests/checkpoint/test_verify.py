"""cupymoe verify --checkpoint."""

import json
import re
import sys

import pytest
import torch
from click.testing import CliRunner

from cupymoe import MoEActivation, checkpoint, reference
from cupymoe.backends.reference import ReferenceBackend
from cupymoe.tools.cli import verify
from cupymoe.tools.verification import checkpoint as layers
from cupymoe.tools.verification import routing
from cupymoe.tools.verification.result import Setting
from tests.checkpoint.helpers import (
    CONFIG,
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


@pytest.mark.parametrize("path", ["google/gemma-4-26B-A4B-it", "nowhere", ""])
def test_verify_names_a_path_that_is_not_there(tmp_path, monkeypatch, path):
    monkeypatch.chdir(write(tmp_path, tensors_of()))
    result = run_verify(path)
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert f"{path or 'an empty path'}: a checkpoint must be a file or a folder on disk" in output
    assert ("cupymoe downloads nothing" in output) == ("/" in path)


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


def statuses(report):
    return {check["name"].split(" against")[0]: check["status"] for check in report["checks"]}


def test_verify_fails_for_layers_that_config_json_has_and_the_files_lack(tmp_path):
    path = write(tmp_path, tensors_of(layers=(0, 2)))
    write_config(path, num_hidden_layers=4)
    result = run_verify(path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert statuses(report) == {"layer 0": "pass", "layer 1": "fail", "layer 2": "pass", "layer 3": "fail"}
    assert (
        "layer 3 has no router and no experts; num_hidden_layers of config.json is 4" in report["checks"][3]["detail"]
    )
    write_config(path, num_hidden_layers="4")
    assert "num_hidden_layers must be a positive integer, got '4'" in run_verify(path).output


def test_verify_fails_for_a_layer_that_the_index_does_not_list(tmp_path):
    path = write_shards(tmp_path, tensors_of())
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if f"{PREFIX}3." not in key}
    index.write_text(json.dumps(content))
    result = run_verify(path, "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert statuses(report) == {"index and files agree": "fail", "layer 0": "pass", "layer 11": "pass"}
    assert f"{PREFIX}3.{DOWN} is in model-" in report["checks"][0]["detail"]


def test_verify_goes_on_after_an_exception_in_a_layer(tmp_path, monkeypatch):
    load_layer = checkpoint.load_layer

    def breaking(path, layer, *args, **kwargs):
        if layer == 3:
            raise RuntimeError("no memory")
        return load_layer(path, layer, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "load_layer", breaking)
    result = run_verify(write(tmp_path, tensors_of()), "--json")
    assert result.exit_code == 1
    report = json.loads(result.output)
    assert statuses(report) == {"layer 0": "pass", "layer 3": "fail", "layer 11": "pass"}
    assert report["checks"][1]["detail"] == "RuntimeError: no memory"


def test_verify_without_safetensors(tmp_path, monkeypatch):
    path = write_shards(tmp_path, tensors_of())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    result = run_verify(path, "--json")
    assert result.exit_code == 1
    assert "pip install 'cupymoe[checkpoint]'" in json.loads(result.output)["checks"][0]["detail"]


def test_verify_fails_for_a_backend_that_is_wrong(tmp_path, monkeypatch):
    """Erf for tanh is seen in float32; a scale that is applied twice in bfloat16 too."""
    right = ReferenceBackend.forward

    def erf(self, call, *rest):
        return right(self, call._replace(activation=MoEActivation.GELU), *rest)

    def scaled_twice(self, call, tensors, *rest):
        return right(self, call, tensors._replace(top_k_weights=tensors.top_k_weights * 1.01), *rest)

    path = write(tmp_path, tensors_of())
    for wrong, dtype in ((erf, "float32"), (scaled_twice, "bfloat16")):
        monkeypatch.setattr(ReferenceBackend, "forward", wrong)
        result = run_verify(path, "--dtype", dtype)
        assert result.exit_code == 1
        assert "3 fail" in result.output


def of_negated_logits(logits, top_k, per_expert_scale):
    return reference.route(-logits, top_k)


def of_other_experts(logits, top_k, per_expert_scale):
    weights, index = reference.route(logits, top_k, per_expert_scale)
    return weights, index.flip(-1)


def of_other_weights(logits, top_k, per_expert_scale):
    weights, index = reference.route(logits, top_k, per_expert_scale)
    return weights * (1 + 1e-5), index


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (of_negated_logits, r"[1-9]\d* experts differ from float64's"),
        (of_other_experts, r"; 32 experts differ from float64's"),
        (of_other_weights, r"; 0 experts differ from float64's, weights within 1\.\de-05"),
    ],
)
def test_verify_fails_for_a_routing_that_is_wrong(tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(routing, "route", wrong)
    result = run_verify(write(tmp_path, tensors_of()))
    assert result.exit_code == 1
    assert re.search(message, result.output)


def test_a_tie_at_the_last_choice_counts_and_one_among_the_rest_does_not():
    logits = torch.tensor([[3.0, 3, 1, 0], [4, 3, 3, 1], [9, 0, 0, 2], [9, 8, 1, 1]])
    index = torch.tensor([[0, 1], [0, 1], [0, 3], [0, 1]])
    assert layers._routing_statistics(logits, index) == (
        "3 of 4 experts hit, the most used by 4 of 4 tokens; 2 tokens with ties"
    )


def test_the_load_is_that_of_the_most_used_expert():
    index = torch.tensor([[4, 1], [4, 2], [4, 3], [2, 1], [3, 2]])
    assert layers._routing_statistics(torch.arange(5.0).expand(5, 5), index) == (
        "4 of 5 experts hit, the most used by 3 of 5 tokens; 0 tokens with ties"
    )


def test_the_states_of_a_layer_have_a_mean_square_of_one():
    states = layers._normalised_states(Setting(CONFIG, torch.float32, 0, torch.device("cpu")))
    torch.testing.assert_close(states.square().mean(-1), torch.ones(16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), "neither model.safetensors.index.json nor a .safetensors file is there"),
        (lambda folder: write(folder, {"lm_head.weight": torch.ones(1)}), "no key of a router or of experts"),
        (
            lambda folder: write_config(write(folder, tensors_of()), hidden_activation=...),
            "hidden_activation must be there, with no default",
        ),
        (
            lambda folder: write_config(write(folder, tensors_of()), rms_norm_eps="1e-6"),
            "rms_norm_eps must be a finite number, at least 0, got '1e-6'",
        ),
    ],
)
def test_verify_fails_without_layers_or_config(tmp_path, make, message):
    make(tmp_path / "model")
    result = run_verify(tmp_path / "model")
    assert result.exit_code == 1
    assert re.search(rf"fail +checkpoint has layers with experts .*{message}", result.output)
