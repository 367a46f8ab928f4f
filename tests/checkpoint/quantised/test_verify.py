"""cupymoe verify --checkpoint of quantised layers."""

import json

import pytest
import torch
from click.testing import CliRunner

from cupymoe import fused_experts
from cupymoe.tools.cli import verify
from tests.checkpoint.quantised.layers import FAMILIES, LAYER, PREFIX, fused, per_expert, write
from tests.checkpoint.quantised.stored import KINDS

GEMMA4 = FAMILIES["gemma4"]


def run_verify(*args):
    result = CliRunner().invoke(verify, ["--checkpoint", *map(str, args), "--json"])
    return result.exit_code, json.loads(result.output)["checks"]


@pytest.mark.parametrize("name", ["ct int4 g32", "ct fp8 block", "ct nvfp4", "gptq zero", "nf4"])
def test_layers_are_compared_with_their_dequantised_weights(tmp_path, name):
    kind = KINDS[name]
    code, (check,) = run_verify(write(tmp_path, kind, GEMMA4, per_expert(kind, GEMMA4)))
    assert code == 0, check
    assert check["detail"].startswith("relative error of 0.00500: ")
    assert f"gate_up_proj {kind.format}, down_proj {kind.format}" in check["detail"]


def test_one_of_the_weights_may_be_plain(tmp_path):
    """As transformers' quantiser leaves Gemma 4's down projection."""
    kind = KINDS["fp8 blocks"]._replace(hidden_size=256, intermediate_size=192)
    layer = fused(kind, GEMMA4)
    tensors = {key: value for key, value in layer.tensors.items() if "down_proj" not in key}
    tensors[f"{PREFIX}experts.down_proj"] = layer.down_proj.bfloat16()
    code, (check,) = run_verify(write(tmp_path, kind, GEMMA4, layer._replace(tensors=tensors)))
    assert code == 0, check
    assert "gate_up_proj fp8_g128, down_proj unquantised" in check["detail"]


def test_a_backend_that_reads_other_weights_fails(tmp_path, monkeypatch):
    kind = KINDS["ct int4 g32"]
    path = write(tmp_path, kind, GEMMA4, fused(kind, GEMMA4))

    def wrong(states, gate_up_proj, *args, **settings):
        gate_up_proj.scales.mul_(1.05)
        return fused_experts(states, gate_up_proj, *args, **settings)

    monkeypatch.setattr("cupymoe.tools.verification.experts.fused_experts", wrong)
    code, (check,) = run_verify(path)
    assert (code, check["status"]) == (1, "fail")


def test_an_expert_that_is_zero_fails(tmp_path):
    kind = KINDS["ct int4 g32"]
    layer = fused(kind, GEMMA4)
    key = next(key for key in layer.tensors if key.endswith("down_proj_scale"))
    layer.tensors[key][2] = 0
    code, (check,) = run_verify(write(tmp_path, kind, GEMMA4, layer))
    assert code == 1
    assert check["detail"] == "experts.down_proj of experts [2] is zero (1 of 4)"


def test_experts_that_config_promises_to_be_quantised_and_are_not(tmp_path):
    """As in files that llm-compressor wrote of models whose experts it did not know."""
    kind = KINDS["ct fp8 channel"]
    layer = fused(kind, GEMMA4)
    plain = {key.removesuffix("_scale"): torch.ones(4, 2, 2) for key in layer.tensors}
    plain = {key: layer.weights[key.rpartition(".")[2]].bfloat16() for key in plain}
    code, (check,) = run_verify(write(tmp_path, kind, GEMMA4, layer._replace(tensors=plain)))
    assert code == 1
    assert f"layers.{LAYER}.experts.down_proj is unquantised (BF16), and " in check["detail"]
    assert "config.json says compressed-tensors float-quantized fp8 (channel scales)" in check["detail"]
