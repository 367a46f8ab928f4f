"""Experts that were quantised here, written as compressed-tensors stores them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from cupymoe import MoEExperts, QuantizedExperts, QuantizedWeight, checkpoint, quantize
from cupymoe.weights import FORMATS
from tests.checkpoint.quantised.layers import EXPERTS, FAMILIES, LAYER, PREFIX, per_expert, write
from tests.checkpoint.quantised.stored import KINDS

H, I = 128, 64  # noqa: E741
GEMMA4 = FAMILIES["gemma4"]


def plain_weights():
    torch.manual_seed(0)
    return torch.randn(EXPERTS, 2 * I, H), torch.randn(EXPERTS, H, I)


def read_again(folder, tensors, config):
    kind = KINDS["ct int4 g32"]._replace(hidden_size=H, intermediate_size=I, config=json.loads(json.dumps(config)))
    layer = per_expert(KINDS["ct int4 g32"], GEMMA4)._replace(tensors=tensors)
    return checkpoint.load_layer(write(folder, kind, GEMMA4, layer), LAYER).experts


QUANTISED = [("int4", 32), ("int4", 64), ("int8", None), ("fp8", None), ("nvfp4", None)]


@pytest.mark.parametrize(("format", "group_size"), QUANTISED)
def test_what_was_quantised_here_is_read_again(tmp_path, format, group_size):
    experts = quantize(*(weight.bfloat16() for weight in plain_weights()), format, group_size=group_size)
    tensors, config = checkpoint.to_compressed_tensors(experts, f"{PREFIX}experts.")
    save_file(tensors, tmp_path / "x.safetensors")
    again = read_again(tmp_path / "again", tensors, config)
    for name in ("gate_up_proj", "down_proj"):
        one, other = getattr(experts, name), getattr(again, name)
        assert torch.equal(one.codes, other.codes)
        # NVFP4's global scale is written as its reciprocal.
        rtol = 2.0**-23 if format == "nvfp4" else 0
        torch.testing.assert_close(one.dequantize(), other.dequantize(), rtol=rtol, atol=0)


@pytest.mark.parametrize(("format", "group_size"), QUANTISED)
def test_compressed_tensors_dequantises_it_to_the_same(format, group_size):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    experts = quantize(*(weight.bfloat16() for weight in plain_weights()), format, group_size=group_size)
    tensors, config = checkpoint.to_compressed_tensors(experts, "")
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["down_proj"]
    compressor = BaseCompressor.get_value_from_registry(parsed.format)
    for expert in range(EXPERTS):
        stem = f"{expert}.down_proj."
        state = {key.removeprefix(stem): each for key, each in tensors.items() if key.startswith(stem)}
        weight = compressor.decompress(state, scheme)["weight"]
        expected = experts.down_proj.dequantize(experts=slice(expert, expert + 1))[0]
        torch.testing.assert_close(weight.double(), expected, rtol=2.0**-8, atol=0)  # it rounds to the scales' dtype


def test_formats_of_their_own(tmp_path):
    gate_up, down = (weight.bfloat16() for weight in plain_weights())
    int4, fp8 = quantize(gate_up, down, "int4", group_size=32), quantize(gate_up, down, "fp8")
    experts = QuantizedExperts(int4.gate_up_proj, fp8.down_proj)
    tensors, config = checkpoint.to_compressed_tensors(experts, f"{PREFIX}experts.")
    assert config["format"] == "mixed-precision"
    again = read_again(tmp_path, tensors, config)
    assert (again.gate_up_proj.format.name, again.down_proj.format.name) == ("int4_g32", "fp8")
    assert torch.equal(again.down_proj.dequantize(), fp8.down_proj.dequantize())


@pytest.mark.parametrize("name", ["gptq zero", "awq", "ct mxfp4", "fp8 blocks"])
def test_another_kind_of_file_as_compressed_tensors(tmp_path, name):
    kind = KINDS[name]
    layer = per_expert(kind, GEMMA4)
    experts = checkpoint.load_layer(write(tmp_path / "first", kind, GEMMA4, layer), LAYER).experts
    tensors, config = checkpoint.to_compressed_tensors(experts, f"{PREFIX}experts.")
    written = kind._replace(config=config)
    again = checkpoint.load_layer(write(tmp_path / "again", written, GEMMA4, layer._replace(tensors=tensors)), LAYER)
    assert again.experts.down_proj.format == experts.down_proj.format
    assert torch.equal(again.experts.gate_up_proj.dequantize(), layer.gate_up_proj)


def test_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"experts.gate_up_proj must be a cupymoe.QuantizedWeight, got Parameter"):
        checkpoint.to_compressed_tensors(MoEExperts(2, 32, 32, "silu"), "")
    kind = KINDS["nf4"]
    experts = checkpoint.load_layer(write(tmp_path, kind, GEMMA4, per_expert(kind, GEMMA4)), LAYER).experts
    with pytest.raises(ValueError, match="compressed-tensors has no format for nf4"):
        checkpoint.to_compressed_tensors(experts, "")
    fused = QuantizedWeight.of(  # 3 blocks of 128 rows, the second of which has rows of gate and of up
        FORMATS["fp8_g128"],
        torch.zeros(1, 384, 128, dtype=torch.uint8),
        (torch.arange(1.0, 4) / 4).repeat_interleave(128).reshape(1, 384, 1),
    )
    down = QuantizedWeight.of("fp8", torch.zeros(1, 128, 192, dtype=torch.uint8), row_scales=torch.ones(1, 128))
    with pytest.raises(ValueError, match=r"gate_up_proj, up_proj of expert 0: .* can't hold the scales of this"):
        checkpoint.to_compressed_tensors(QuantizedExperts(fused, down), "")
