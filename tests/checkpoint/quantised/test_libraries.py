"""Files as the formats' own libraries write them: a layout that was misread would not dequantise to what they do."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.quantised.layers import FAMILIES, LAYER, fused, per_expert, write
from tests.checkpoint.quantised.stored import BNB, KINDS, Kind, Stored

GEMMA4 = FAMILIES["gemma4"]
FLOAT32 = 2.0**-22  # a product and a division of float32


def weight_of(rng, n, k):
    return torch.from_numpy(rng.normal(size=(n, k))).to(torch.bfloat16)


def assert_loads(folder, kind, layout=per_expert, tolerance=0.0):
    layer = layout(kind, GEMMA4)
    experts = checkpoint.load_layer(write(folder, kind, GEMMA4, layer), LAYER).experts
    for name, weight in layer.weights.items():
        loaded = getattr(experts, name)
        assert loaded.format.name == kind.format
        torch.testing.assert_close(loaded.dequantize(), weight.double(), rtol=tolerance, atol=0)


# --- compressed-tensors -----------------------------------------------------------------------------------------------


def compressed(settings, format):
    """A writer that has compressed-tensors choose scales, quantise, pack, and dequantise."""

    def write(rng, n, k):
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.lifecycle.forward import dequantize
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        args = QuantizationArgs(**settings)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        weight = weight_of(rng, n, k).float()
        group = args.group_size
        if args.strategy == "block":
            high = [-(-size // 128) for size in (n, k)]
            cut = torch.nn.functional.pad(weight, (0, high[1] * 128 - k, 0, high[0] * 128 - n))
            blocks = cut.reshape(high[0], 128, high[1], 128)
            low, top = blocks.amin((1, 3)), blocks.amax((1, 3))
        elif args.strategy == "tensor":
            low, top = weight.amin().reshape(1), weight.amax().reshape(1)
        else:
            parts = weight.reshape(n, -1, group or k)
            low, top = parts.amin(-1), parts.amax(-1)
        state = {"weight": weight}
        if args.strategy == "tensor_group":
            state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax()).reshape(1)
        scale, zero = calculate_qparams(low, top, args, state.get("weight_global_scale"))
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(format)
        tensors = dict(compressor.compress(state, scheme))
        if args.strategy == "tensor_group":  # which its own decompress() rounds to bfloat16
            codes = unpack_fp4_from_uint8(tensors["weight_packed"], n, k, dtype=torch.float32)
            factor = tensors["weight_global_scale"]
            dequantised = dequantize(codes, tensors["weight_scale"].float(), args=args, global_scale=factor)
        else:
            dequantised = compressor.decompress(tensors, scheme)["weight"]
        return Stored({name: tensor.contiguous() for name, tensor in tensors.items()}, dequantised.double().numpy())

    return write


def compressed_kind(name, settings):
    kind = KINDS[name]
    return kind._replace(write=compressed(settings, kind.config["format"]))


COMPRESSED = {
    name: compressed_kind(name, {"symmetric": True, **settings})
    for name, settings in {
        "ct int4 g32": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "ct int4 g32 zero": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "ct int4 g64": {"num_bits": 4, "strategy": "group", "group_size": 64},
        "ct int4 g128": {"num_bits": 4, "strategy": "group", "group_size": 128},
        "ct int8": {"num_bits": 8, "strategy": "channel"},
        "ct fp8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "ct fp8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "ct fp8 block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        "ct nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        "ct mxfp4": {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": torch.uint8,
            "zp_dtype": torch.uint8,
        },
    }.items()
}


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("layout", [per_expert, fused])
def test_compressed_tensors(tmp_path, name, layout):
    """It divides an NVFP4 scale by the global one, and we multiply by the reciprocal."""
    assert_loads(tmp_path, COMPRESSED[name], layout, FLOAT32)


def test_compressed_tensors_own_config(tmp_path):
    """As QuantizationConfig writes itself, defaults and nulls included."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    )
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized", quantization_status="compressed"
    )
    kind = COMPRESSED["ct int4 g32"]._replace(config=json.loads(json.dumps(config.to_dict(), default=str)))
    assert_loads(tmp_path, kind, tolerance=FLOAT32)


# --- transformers' fp8 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [per_expert, fused])
def test_transformers_fp8_blocks(tmp_path, layout):
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Quantizer:
        quantization_config = FineGrainedFP8Config()

    def write(rng, n, k):
        tensors = Fp8Quantize(Quantizer).convert({"x.weight": weight_of(rng, n, k)})
        tensors = {name.removeprefix("x."): tensor for name, tensor in tensors.items()}
        codes, scale = tensors["weight"].float(), tensors["weight_scale_inv"]
        weight = codes * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return Stored(tensors, weight.double().numpy())

    config = FineGrainedFP8Config().to_dict()
    assert_loads(tmp_path, KINDS["fp8 blocks"]._replace(write=write, config=config), layout, FLOAT32)


# --- ModelOpt ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [per_expert, fused])
@pytest.mark.filterwarnings("ignore")
def test_modelopt_nvfp4(tmp_path, layout):
    pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def write(rng, n, k):
        quantised, scale, factor = NVFP4QTensor.quantize(weight_of(rng, n, k).float(), 16)
        weight = quantised.dequantize(torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16})
        tensors = {
            "weight": quantised._quantized_data,
            "weight_scale": scale,
            "weight_scale_2": factor,
            "input_scale": torch.tensor(0.5),
        }
        return Stored(tensors, weight.double().numpy())

    assert_loads(tmp_path, KINDS["modelopt nvfp4"]._replace(write=write), layout, FLOAT32)


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_nf4(tmp_path, nested):
    functional = pytest.importorskip("bitsandbytes.functional")

    def write(rng, n, k):
        packed, state = functional.quantize_4bit(
            weight_of(rng, n, k), blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        weight = functional.dequantize_4bit(packed, functional.QuantState.from_dict(state.as_dict(packed=True), "cpu"))
        tensors = {"weight": packed} | {f"weight.{name}": each for name, each in state.as_dict(packed=True).items()}
        return Stored(tensors, weight.double().numpy())

    kind = Kind(write, "nf4", {**BNB, "bnb_4bit_use_double_quant": nested}, 128, is_fused=False)
    assert_loads(tmp_path, kind, tolerance=2.0**-8)  # it dequantises to bfloat16


@pytest.fixture
def saved_by_transformers(tmp_path, monkeypatch):
    """A Qwen3-MoE that transformers has quantised to blocks, saved in its own names and in those of the original."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    # It wants a GPU for computing, which nobody does here.
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda self, *args, **settings: None)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 192, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "num_hidden_layers": 1}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes, **heads)).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=FineGrainedFP8Config(), dtype=torch.bfloat16, device_map="cpu"
    )
    quantised.save_pretrained(tmp_path / "fused", save_original_format=False)
    quantised.save_pretrained(tmp_path / "original")
    return tmp_path, model.model.layers[0].mlp.experts


@pytest.mark.filterwarnings("ignore")
def test_transformers_own_file(saved_by_transformers):
    """gate_up has 3 x 2 blocks; down, 192 deep, stays in bfloat16."""
    folder, experts = saved_by_transformers
    loaded = checkpoint.load_experts(folder / "fused", 0)
    assert torch.equal(loaded.down_proj, experts.down_proj)
    assert loaded.gate_up_proj.format.name == "fp8_g128"
    error = (loaded.gate_up_proj.dequantize() - experts.gate_up_proj).norm() / experts.gate_up_proj.norm()
    assert error < 0.03  # of e4m3 codes
    with safe_open(folder / "fused" / "model.safetensors", "pt") as file:
        keys = [key for key in list(file.keys()) if ".experts." in key]
        stored = {key: file.get_tensor(key) for key in keys}
    assert "model.layers.0.mlp.experts.down_proj_scale_inv" in stored  # of a weight in bfloat16: memory as it was
    assert save(checkpoint.export_experts(loaded, folder / "fused", 0)) == save(stored)


@pytest.mark.filterwarnings("ignore")
def test_codes_of_single_experts_beside_the_scales_of_all(saved_by_transformers):
    """Which transformers writes where it splits the weights, and not their scales, into the original's names."""
    folder, _ = saved_by_transformers
    with pytest.raises(CheckpointError, match=r"_proj_scale_inv are two layouts of the experts; one is allowed"):
        checkpoint.load_experts(folder / "original", 0)
