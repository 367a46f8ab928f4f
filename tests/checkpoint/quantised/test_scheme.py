"""What config.json says of quantised experts, and what the files must then hold."""

import json
import re

import pytest
import torch

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from cupymoe.weights import QuantizedWeight
from tests.checkpoint.quantised.layers import EXPERTS, FAMILIES, LAYER, PREFIX, fused, per_expert, write
from tests.checkpoint.quantised.stored import BNB, KINDS, fp8

GEMMA4 = FAMILIES["gemma4"]
INT4 = KINDS["ct int4 g32"]
WEIGHTS_OF_INT4 = INT4.config["config_groups"]["group_0"]["weights"]
ANOTHER = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def plain(kind, layer):
    """The same layer's weights in bfloat16, per expert."""
    tensors = {}
    for expert in range(EXPERTS):
        gate, up = layer.gate_up_proj[expert].bfloat16().chunk(2)
        for name, weight in (("gate", gate), ("up", up), ("down", layer.down_proj[expert].bfloat16())):
            tensors[f"{PREFIX}experts.{expert}.{name}_proj.weight"] = weight
    return layer._replace(tensors=tensors)


def load(folder, kind, layer, **quantization):
    return checkpoint.load_layer(write(folder, kind, GEMMA4, layer, **quantization), LAYER).experts


def assert_is(experts, layer):
    for name, weight in layer.weights.items():
        loaded = getattr(experts, name)
        loaded = loaded.dequantize() if isinstance(loaded, QuantizedWeight) else loaded.double()
        assert torch.equal(loaded, weight if loaded.dtype != torch.bfloat16 else weight.bfloat16())


GROUPS = {
    "by a regular expression": {"a": {"targets": ["re:.*experts.*"], "weights": WEIGHTS_OF_INT4}},
    "before a class": {
        "a": {"targets": ["Linear"], "weights": ANOTHER},
        "b": {
            "targets": [r"re:.*experts\.\d+\.(gate|up|down)_proj$"],
            "weights": WEIGHTS_OF_INT4,
        },
    },
    "with a format of its own": {
        "a": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": WEIGHTS_OF_INT4,
        }
    },
    "beside one of attention that is not served": {
        "a": {"targets": ["re:.*self_attn.*"], "weights": {**ANOTHER, "num_bits": 3}},
        "b": {"targets": ["Linear"], "weights": WEIGHTS_OF_INT4},
    },
}


@pytest.mark.parametrize("groups", GROUPS)
def test_config_groups(tmp_path, groups):
    format = "mixed-precision" if "own" in groups else "pack-quantized"
    layer = per_expert(INT4, GEMMA4)
    assert_is(load(tmp_path, INT4, layer, config_groups=GROUPS[groups], format=format), layer)


IGNORED = {
    "ct all": ("ct int4 g32", {"ignore": ["re:.*experts.*"]}),
    "ct by a parent": ("ct int4 g32", {"ignore": [f"{PREFIX}experts"]}),
    "ct under another prefix": ("ct int4 g32", {"ignore": [f"model.layers.{LAYER}.experts"]}),
    "ct attention only": (
        "ct int4 g32",
        {"config_groups": {"a": {"targets": ["re:.*self_attn.*"], "weights": ANOTHER}}},
    ),
    "modelopt": ("modelopt nvfp4", {"ignore": [f"{PREFIX}experts*"]}),
    "modelopt all of the layer": ("modelopt nvfp4", {"ignore": [f"{PREFIX}*"]}),
    "fp8": ("fp8 blocks", {"modules_to_not_convert": ["experts"]}),
    "fp8 in full": ("fp8 blocks", {"modules_to_not_convert": [f"{PREFIX}experts"]}),
    "awq": ("awq", {"modules_to_not_convert": ["experts"]}),
    "bnb": ("nf4", {"llm_int8_skip_modules": ["experts"]}),
    "gptq": ("gptq", {"dynamic": {r"-:.*experts.*": {}}}),
}


@pytest.mark.parametrize("case", IGNORED)
def test_experts_that_are_left_out_are_plain(tmp_path, case):
    name, quantization = IGNORED[case]
    kind = KINDS[name]
    layer = per_expert(kind, GEMMA4)
    with pytest.raises(CheckpointError):
        load(tmp_path, kind, layer, **quantization)
    experts = load(tmp_path, kind, plain(kind, layer), **quantization)
    assert torch.equal(experts.down_proj, layer.down_proj.bfloat16())


NOT_LEFT_OUT = {
    "ct": ("ct int4 g32", {"ignore": ["lm_head", f"{PREFIX}mlp.gate_proj", "re:.*router.*", "re:.*self_attn.*"]}),
    "modelopt": ("modelopt nvfp4", {"ignore": ["lm_head", "*router*", "*self_attn*", "*.mlp.*"]}),
    "fp8": (
        "fp8 blocks",
        {"modules_to_not_convert": ["gate", "mlp.gate", f"{PREFIX}mlp", f"{PREFIX}router"]},
    ),
}


@pytest.mark.parametrize("case", NOT_LEFT_OUT)
def test_lists_that_do_not_mean_the_experts(tmp_path, case):
    name, quantization = NOT_LEFT_OUT[case]
    layer = per_expert(KINDS[name], GEMMA4)
    assert_is(load(tmp_path, KINDS[name], layer, **quantization), layer)


@pytest.mark.parametrize("name", ["ct int4 g32", "ct fp8 channel", "fp8 blocks", "modelopt nvfp4", "gptq", "nf4"])
def test_a_promise_that_the_files_do_not_keep(tmp_path, name):
    kind = KINDS[name]
    message = f"{PREFIX}experts.0.down_proj.weight is unquantised (BF16), and {tmp_path / 'config.json'} says "
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path, kind, plain(kind, per_expert(kind, GEMMA4)))


@pytest.mark.parametrize("name", ["ct int4 g32", "ct fp8 channel", "modelopt nvfp4", "gptq"])
def test_quantised_experts_that_config_does_not_promise(tmp_path, name):
    path = write(tmp_path, KINDS[name], GEMMA4, per_expert(KINDS[name], GEMMA4))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"left over: nothing of a layer with 4 unquantised experts|got F8_E4M3"):
        checkpoint.load_layer(path, LAYER)


def test_some_experts_left_out(tmp_path):
    layer = per_expert(INT4, GEMMA4)
    message = (
        f"config.json: {PREFIX}experts.2.up_proj must be stored like {PREFIX}experts.0.gate_proj, of the same layer: "
        "compressed-tensors pack-quantized int4_g32, got unquantised"
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(tmp_path, INT4, layer, ignore=[f"{PREFIX}experts.2.up_proj"])


def test_one_projection_in_another_format(tmp_path):
    kind = KINDS["ct int4 g32"]
    int8 = per_expert(KINDS["ct int8"], GEMMA4)
    layer = per_expert(kind, GEMMA4)
    mixed = {key: (int8 if "down_proj" in key else layer).tensors[key] for key in layer.tensors}
    groups = {
        "a": {"targets": ["Linear"], "weights": WEIGHTS_OF_INT4},
        "b": {"targets": ["re:.*down_proj"], "weights": ANOTHER},
    }
    experts = load(tmp_path, kind, layer._replace(tensors=mixed), config_groups=groups)
    assert (experts.gate_up_proj.format.name, experts.down_proj.format.name) == ("int4_g32", "int8")
    assert torch.equal(experts.down_proj.dequantize(), int8.down_proj)


# --- transformers' fp8 ------------------------------------------------------------------------------------------------


def test_a_weight_that_transformers_does_not_cut_stays_plain(tmp_path):
    """Of Gemma 4's fused sizes, 1408 and 2816 are multiples of 128, and 704 is not."""
    kind = KINDS["fp8 blocks"]._replace(hidden_size=256, intermediate_size=192)
    layer = fused(kind, GEMMA4)
    tensors = {key: value for key, value in layer.tensors.items() if "down_proj" not in key}
    tensors[f"{PREFIX}experts.down_proj"] = layer.down_proj.bfloat16()
    path = write(tmp_path, kind, GEMMA4, layer._replace(tensors=tensors))
    experts = checkpoint.load_layer(path, LAYER).experts
    assert torch.equal(experts.gate_up_proj.dequantize(), layer.gate_up_proj)
    assert torch.equal(experts.down_proj, layer.down_proj.bfloat16())
    exported = checkpoint.export_experts(experts, path, LAYER)
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key].float(), tensors[key].float()) for key in tensors)


def stack(layer, role, name):
    """The tensors of single experts as one."""
    return torch.stack([layer.tensors[f"{PREFIX}experts.{expert}.{role}_proj.{name}"] for expert in range(EXPERTS)])


@pytest.mark.parametrize(("size", "rows"), [(64, 2), (192, 4)])
def test_gate_and_up_that_were_fused_with_their_scales(tmp_path, size, rows):
    """Each has row blocks of its own, the last of them cut."""
    kind = KINDS["fp8 blocks"]._replace(hidden_size=256, intermediate_size=size)
    apart = per_expert(kind, GEMMA4)
    tensors = {}
    for ending, name in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
        gate, up, down = (stack(apart, role, name) for role in ("gate", "up", "down"))
        tensors[f"{PREFIX}experts.gate_up_proj{ending}"] = torch.cat([gate, up], 1)
        tensors[f"{PREFIX}experts.down_proj{ending}"] = down
    assert tensors[f"{PREFIX}experts.gate_up_proj_scale_inv"].shape == (EXPERTS, rows, 2)
    path = write(tmp_path, kind, GEMMA4, apart._replace(tensors=tensors))
    experts = checkpoint.load_layer(path, LAYER).experts
    assert_is(experts, apart)
    exported = checkpoint.export_experts(experts, path, LAYER)
    assert all(torch.equal(exported[key].float(), tensors[key].float()) for key in tensors)


def test_gate_and_up_with_a_scale_each(tmp_path):
    kind = KINDS["fp8 tensor"]
    apart = per_expert(kind, GEMMA4)
    tensors = {}
    for ending, name in (("", "weight"), ("_scale_inv", "weight_scale_inv")):
        gate, up, down = (stack(apart, role, name) for role in ("gate", "up", "down"))
        tensors[f"{PREFIX}experts.gate_up_proj{ending}"] = torch.cat([gate, up], 1)
        tensors[f"{PREFIX}experts.down_proj{ending}"] = down
    assert tensors[f"{PREFIX}experts.gate_up_proj_scale_inv"].shape == (EXPERTS, 2, 1)
    experts = load(tmp_path, kind, apart._replace(tensors=tensors))
    assert_is(experts, apart)
    wrong = {**tensors, f"{PREFIX}experts.down_proj_scale_inv": torch.ones(EXPERTS, 2, 1)}
    with pytest.raises(CheckpointError, match=r"down_proj_scale_inv must have shape .*, got \[4, 2, 1\]"):
        load(tmp_path, kind, apart._replace(tensors=wrong))


def test_static_scales_of_activations_are_read_and_given_back(tmp_path):
    kind = KINDS["fp8 tensor"]._replace(
        write=fp8("tensor", "weight_scale_inv", scalar_shape=(), activation="activation_scale")
    )
    layer = per_expert(kind, GEMMA4)
    path = write(tmp_path, kind, GEMMA4, layer, activation_scheme="static")
    experts = checkpoint.load_layer(path, LAYER).experts
    assert_is(experts, layer)
    exported = checkpoint.export_experts(experts, path, LAYER)
    key = f"{PREFIX}experts.0.up_proj.activation_scale"
    assert torch.equal(exported[key], layer.tensors[key])


# --- other files and models -------------------------------------------------------------------------------------------


def test_modelopt_s_own_file(tmp_path):
    kind = KINDS["modelopt nvfp4"]
    layer = per_expert(kind, GEMMA4)
    path = write(tmp_path, kind, GEMMA4, layer)
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    own = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"], "kv_cache_quant_algo": None}
    (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": own}))
    assert_is(checkpoint.load_layer(path, LAYER).experts, layer)
    own["group_size"] = 32
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json: quantization.group_size must be one of \[16\], "):
        checkpoint.load_layer(path, LAYER)


def test_config_of_the_text_model(tmp_path):
    layer = per_expert(INT4, GEMMA4)
    path = write(tmp_path, INT4, GEMMA4, layer)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(config))
    assert_is(checkpoint.load_layer(path, LAYER).experts, layer)
    config["quantization_config"] = {"quant_method": "fp8"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"and text_config.quantization_config must be the same where"):
        checkpoint.load_layer(path, LAYER)


def test_transposed_experts_are_not_read_quantised(tmp_path):
    layer = fused(INT4, FAMILIES["qwen3"])
    path = write(tmp_path, INT4, FAMILIES["qwen3"], layer)
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= {
        "model_type": "gpt_oss",
        "num_local_experts": EXPERTS,
        "intermediate_size": 64,
        "swiglu_limit": 7.0,
    }
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"biases or transposed weights must be unquantised, got comp"):
        checkpoint.load_experts(path, LAYER)


def linear(weights):
    return {"config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}


REFUSED = {
    "method": ({"quant_method": "hqq"}, "quantization_config.quant_method must be one of ['compressed-tensors', 'fp8'"),
    "no method": ({"quant_method": ...}, "quant_method must be one of"),
    "no groups": ({"config_groups": ...}, "quantization_config.config_groups must be an object, got None"),
    "format": ({"format": "int-quantized"}, "quantization_config.format must be one of ['pack-quantized', "),
    "two groups": (
        {"config_groups": {name: {"targets": ["Linear"], "weights": ANOTHER} for name in "ab"}},
        "must be in one of quantization_config.config_groups, got ['quantization_config.config_groups.a', ",
    ),
    "sparse": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format must be one of ['dense']"),
    "rotated": (
        {"transform_config": {"config_groups": {"u": {}}}},
        "transform_config must be empty, got {'config_",
    ),
    "targets": ({"config_groups": {"a": {"targets": "Linear"}}}, "config_groups.a.targets must be a list of names"),
    "regular expression": ({"ignore": ["re:("]}, "quantization_config has '(', which is no valid regular expression"),
}
WEIGHTS = {
    "act-order": ({"actorder": "group"}, "weights.actorder must be null, 'weight' or 'static', got 'group'"),
    "act-order of old": ({"actorder": True}, "weights.actorder must be null, 'weight' or 'static', got True"),
    "bits": ({"num_bits": 3}, "weights.num_bits must be one of [4, 8], got 3"),
    "group": ({"group_size": 48}, "weights.group_size must be one of [32, 64, 128], got 48"),
    "int8 in groups": ({"num_bits": 8}, "weights.strategy must be one of ['channel'], got 'group'"),
    "channel": ({"strategy": "channel"}, "weights.strategy must be one of ['group'], got 'channel'"),
    "type": ({"type": "float"}, "weights.type must be one of ['int'], got 'float'"),
    "symmetric": ({"symmetric": "yes"}, "weights.symmetric must be one of [True, False], got 'yes'"),
    "does not divide": (
        {"group_size": 128},
        "can't be compressed-tensors pack-quantized int4_g128: k must be a",
    ),
}
OTHERS = {
    "cut groups of nf4": (
        "ct int4 g32",
        {**BNB, "config_groups": ...},
        "k must be a multiple of nf4's groups of",
    ),
    "fp8 blocks": (
        "fp8 blocks",
        {"weight_block_size": [64, 64]},
        "size must be one of [[128, 128], None]",
    ),
    "fp8 without a word on blocks": (
        "fp8 blocks",
        {"weight_block_size": ...},
        "weight_block_size must be [128, 128] or null, got None: it must be there, with no default",
    ),
    "fp4 experts": ("fp8 blocks", {"expert_dtype": "fp4"}, "expert_dtype must be one of ['fp8', None], got 'fp4'"),
    "fp8 codes": ("fp8 blocks", {"fmt": "e5m2"}, "fmt must be one of ['e4m3'], got 'e5m2'"),
    "modelopt": ("modelopt nvfp4", {"quant_algo": "W4A8_AWQ"}, "quant_algo must be one of ['NVFP4', 'FP8']"),
    "gptq bits": ("gptq", {"bits": 8}, "bits must be one of [4], got 8"),
    "gptq sym": ("gptq", {"sym": ...}, "sym must be one of [True, False], got None"),
    "gptq version": ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format must be one of ['gptq', 'gptq_v2']"),
    "gptq per module": (
        "gptq",
        {"dynamic": {"+:.*experts.*": {"bits": 8}}},
        "must be without settings of its own",
    ),
    "awq zero": ("awq", {"zero_point": False}, "zero_point must be one of [True], got False"),
    "awq version": ("awq", {"version": "gemv"}, "version must be one of ['gemm', 'GEMM'], got 'gemv'"),
    "bnb fp4": ("nf4", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type must be one of ['nf4'], got 'fp4'"),
    "bnb int8": ("nf4", {"load_in_4bit": False}, "load_in_4bit must be one of [True], got False"),
    "ct fp8": (
        "ct fp8 channel",
        linear({"num_bits": 8, "type": "float", "strategy": "token"}),
        "strategy must be one of ['channel', 'tensor', 'block'], got 'token'",
    ),
}
CASES = {
    **{name: ("ct int4 g32", *case) for name, case in REFUSED.items()},
    **{
        name: (
            "ct int4 g32",
            linear({**WEIGHTS_OF_INT4, **changes}),
            message,
        )
        for name, (changes, message) in WEIGHTS.items()
    },
    **OTHERS,
}


@pytest.mark.parametrize("case", CASES)
def test_what_config_says_is_refused_by_name(tmp_path, case):
    name, quantization, message = CASES[case]
    layer = per_expert(KINDS[name], GEMMA4)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load(tmp_path, KINDS[name], layer, **quantization)
    assert str(caught.value).startswith(str(tmp_path))


def test_an_act_order_needs_its_indices(tmp_path):
    """Without ``g_idx`` nothing would say that the groups are not in their order."""
    layer = per_expert(KINDS["gptq"], GEMMA4)
    load(tmp_path, KINDS["gptq"], layer, desc_act=True)
    for key in [key for key in layer.tensors if key.endswith("g_idx")]:
        del layer.tensors[key]
    load(tmp_path, KINDS["gptq"], layer, desc_act=False)
    with pytest.raises(CheckpointError, match="g_idx is missing"):
        load(tmp_path, KINDS["gptq"], layer, desc_act=True)


def test_a_config_that_is_no_object(tmp_path):
    path = write(tmp_path, INT4, GEMMA4, per_expert(INT4, GEMMA4))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": ["fp8"]}))
    with pytest.raises(CheckpointError, match=r"config.json: quantization_config must be an object, got \['fp8'\]"):
        checkpoint.load_layer(path, LAYER)
