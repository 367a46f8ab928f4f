"""load_experts: Qwen3-MoE, Mixtral and GPT-OSS in every spelling; all else is refused by name."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

from cupymoe import MoEActivation, checkpoint
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.families import (
    CONFIGS,
    DOWN,
    GATE_UP,
    LAYERS,
    PREFIX,
    SPELLINGS,
    E,
    H,
    I,
    K,
    assert_is_layer,
    by_number,
    by_role,
    fused,
    tensors_of,
    write,
    write_config,
)
from tests.helpers import random_experts, randomize, transformers_gemma4

every_spelling = pytest.mark.parametrize(("model_type", "layout"), SPELLINGS)


@every_spelling
@pytest.mark.parametrize("shards", [1, 3])
def test_every_spelling_is_read(tmp_path, model_type, layout, shards, device):
    path = write(tmp_path, model_type, tensors_of(model_type, layout), shards)
    assert checkpoint.layers(path) == LAYERS
    checkpoint.check_index(path)
    for layer in LAYERS:
        experts = checkpoint.load_experts(path, layer, device=device)
        assert experts.top_k == K
        assert all(parameter.device.type == device.type for parameter in experts.parameters())
        assert all(parameter.requires_grad for parameter in experts.parameters())
        assert_is_layer(experts.cpu(), model_type, layer)


@every_spelling
@pytest.mark.parametrize("prefix", ["layers.", "model.language_model.layers.", "language_model.model.layers."])
def test_prefixes(tmp_path, model_type, layout, prefix):
    path = write(tmp_path, model_type, tensors_of(model_type, layout, prefix))
    assert_is_layer(checkpoint.load_experts(path, 3), model_type, 3)


@every_spelling
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_asked_for(tmp_path, model_type, layout, dtype):
    path = write(tmp_path, model_type, tensors_of(model_type, layout))
    assert_is_layer(checkpoint.load_experts(path, 3, dtype=dtype), model_type, 3, dtype)


def test_a_tensor_of_another_dtype_needs_one_asked_for(tmp_path):
    tensors = tensors_of("gpt_oss", fused)
    tensors[f"{PREFIX}3.{DOWN}_bias"] = tensors[f"{PREFIX}3.{DOWN}_bias"].float()
    path = write(tmp_path, "gpt_oss", tensors)
    with pytest.raises(CheckpointError, match=r"must have \S+'s dtype torch.\w+ as long as no dtype is asked for"):
        checkpoint.load_experts(path, 3)
    assert_is_layer(checkpoint.load_experts(path, 3, dtype=torch.bfloat16), "gpt_oss", 3)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps")
def test_gpt_oss_s_weights_stay_mapped(tmp_path):
    """Kept as they are published, they need no copy."""
    path = write(tmp_path, "gpt_oss", tensors_of("gpt_oss", fused))
    experts = checkpoint.load_experts(path, 3)
    with open("/proc/self/maps") as maps:
        mapped = [line.split() for line in maps if str(path / "model.safetensors") in line]
    bounds = [[int(bound, 16) for bound in line[0].split("-")] for line in mapped]
    for parameter in experts.parameters():
        assert any(first <= parameter.data_ptr() < end for first, end in bounds)


# --- config.json ------------------------------------------------------------------------------------------------------


@every_spelling
def test_config_may_be_nested(tmp_path, model_type, layout):
    path = write(tmp_path, model_type, tensors_of(model_type, layout))
    write_config(path, model_type, nested=True)
    assert_is_layer(checkpoint.load_experts(path, 3), model_type, 3)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        (model_type, name)
        for model_type, fields in CONFIGS.items()
        for name in ("model_type", *fields)
        if (model_type, name) not in (("qwen3_moe", "intermediate_size"), ("gpt_oss", "hidden_act"))
    ],
)
def test_config_fills_nothing_in(tmp_path, model_type, name):
    layout = dict(SPELLINGS)[model_type]
    path = write(tmp_path, model_type, tensors_of(model_type, layout))
    write_config(path, model_type, **{name: ...})
    with pytest.raises(CheckpointError, match=rf"config.json: {name} must be there, since it has no default"):
        checkpoint.load_experts(path, 3)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be a positive integer, got 0"),
        ("qwen3_moe", {"moe_intermediate_size": "24"}, "moe_intermediate_size must be a positive integer, got '24'"),
        ("qwen3_moe", {"num_local_experts": 8}, "num_local_experts must be num_experts, 6, got 8"),
        ("qwen3_moe", {"hidden_act": "quick_gelu"}, "Unknown MoE activation: 'quick_gelu'"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts must be a positive integer, got None"),
        ("mixtral", {"hidden_act": ["silu"]}, r"activation must be a MoEActivation or its name, got \['silu'\]"),
        ("mixtral", {"num_experts_per_tok": 7}, "top_k must be at most num_experts=6, got 7"),
        ("gpt_oss", {"hidden_size": True}, "hidden_size must be a positive integer, got True"),
        ("gpt_oss", {"swiglu_limit": None}, "limit of swigluoai must be a number, got None"),
        ("gpt_oss", {"swiglu_alpha": "1.7"}, "alpha of swigluoai must be a number, got '1.7'"),
        ("gemma4_text", {}, r"model_type must be one of \['qwen3_moe', 'mixtral', 'gpt_oss'\] \(load_layer reads "),
        ("mixtral", {"model_type": ["mixtral"]}, r"model_type must be one of .*, got \['mixtral'\]"),
    ],
)
def test_config_is_validated(tmp_path, model_type, changes, message):
    path = write(tmp_path, model_type, tensors_of("qwen3_moe", by_role))
    write_config(path, model_type, **changes)
    with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
        checkpoint.load_experts(path, 3)


def test_the_number_of_experts_by_transformers_name(tmp_path):
    """Which transformers 5.24 saves for Qwen3-MoE, where published files have num_experts."""
    path = write(tmp_path, "qwen3_moe", tensors_of("qwen3_moe", by_role))
    for both in (..., E):
        write_config(path, "qwen3_moe", num_experts=both, num_local_experts=E)
        assert_is_layer(checkpoint.load_experts(path, 3), "qwen3_moe", 3)


@pytest.mark.parametrize(
    ("model_type", "changes", "activation"),
    [
        ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}, MoEActivation.GELU_TANH),
        ("mixtral", {"hidden_act": "gelu"}, MoEActivation.GELU),
        ("gpt_oss", {}, MoEActivation.SWIGLUOAI),
        ("gpt_oss", {"swiglu_limit": 10}, MoEActivation.SWIGLUOAI.with_parameters(limit=10.0)),
        ("gpt_oss", {"swiglu_alpha": 1.5}, MoEActivation.SWIGLUOAI.with_parameters(alpha=1.5)),
    ],
)
def test_the_activation_is_read(tmp_path, model_type, changes, activation):
    path = write(tmp_path, model_type, tensors_of(model_type, dict(SPELLINGS)[model_type]))
    write_config(path, model_type, **changes)
    assert checkpoint.load_experts(path, 3).activation is activation


# --- what is refused --------------------------------------------------------------------------------------------------


def without(*names):
    return lambda tensors: [tensors.pop(f"{PREFIX}3.{name}") for name in names]


def with_(name, tensor):
    return lambda tensors: tensors.update({f"{PREFIX}3.{name}": tensor})


def rename(old, new):
    return lambda tensors: tensors.update({f"{PREFIX}3.{new}": tensors.pop(f"{PREFIX}3.{old}")})


def mxfp4(tensors):
    for name in (GATE_UP, DOWN):
        tensors[f"{PREFIX}3.{name}_blocks"] = tensors.pop(f"{PREFIX}3.{name}").to(torch.uint8)
        tensors[f"{PREFIX}3.{name}_scales"] = torch.ones(E, 2, dtype=torch.uint8)


QWEN, MIXTRAL = "mlp.experts.4.", "block_sparse_moe.experts.4."
REFUSED = {
    "missing projection": (
        "qwen3_moe",
        by_role,
        without(f"{QWEN}up_proj.weight"),
        "4.up_proj.weight is missing (1 of ",
    ),
    "missing expert": (
        "mixtral",
        by_number,
        without(*(f"{MIXTRAL}w{i}.weight" for i in (1, 2, 3))),
        "3.block_sparse_moe.experts.4.w1.weight is missing (3 of 18 keys are: ",
    ),
    "missing fused weight": ("mixtral", fused, without(DOWN), f"3.{DOWN} is missing (1 of 2 keys are: "),
    "missing bias": ("gpt_oss", fused, without(f"{GATE_UP}_bias"), f"3.{GATE_UP}_bias is missing (1 of 4 keys are: "),
    "an expert too many": (
        "mixtral",
        by_number,
        with_("block_sparse_moe.experts.6.w1.weight", torch.ones(I, H)),
        "6.w1.weight is left over: nothing of a layer with 6 unquantised experts reads it; its tensors are "
        "read from [model.][language_model.]layers.3.{block_sparse_moe,mlp}.experts.*",
    ),
    "id with a zero": (
        "qwen3_moe",
        by_role,
        rename(f"{QWEN}up_proj.weight", "mlp.experts.04.up_proj.weight"),
        "04.up_",
    ),
    "a bias that the model has not": ("mixtral", fused, with_(f"{DOWN}_bias", torch.ones(E, H)), "bias is left over"),
    "a scale": (
        "qwen3_moe",
        by_role,
        with_(f"{QWEN}up_proj.weight_scale_inv", torch.ones(1)),
        "4.up_proj.weight_scale_inv is left over: nothing of a layer with 6 unquantised experts reads it",
    ),
    "packed": (
        "mixtral",
        by_number,
        rename(f"{MIXTRAL}w2.weight", f"{MIXTRAL}w2.qweight"),
        "4.w2.qweight is left over",
    ),
    "MXFP4": ("gpt_oss", fused, mxfp4, "_blocks is left over: nothing of a layer with 6 unquantised experts reads it"),
    "MXFP4 scales beside the weights": (
        "gpt_oss",
        fused,
        with_(f"{GATE_UP}_scales", torch.ones(1)),
        "gate_up_proj_scales is left over",
    ),
    "float8": (
        "qwen3_moe",
        by_role,
        with_(f"{QWEN}up_proj.weight", torch.ones(I, H).to(torch.float8_e4m3fn)),
        "4.up_proj.weight must have dtype BF16, F16, F32, F64, got F8_E4M3 (as an unquantised weight)",
    ),
    "int8": ("gpt_oss", fused, with_(DOWN, torch.ones(E, I, H).to(torch.int8)), "must have dtype BF16, F16, F32, F64"),
    "both spellings": (
        "qwen3_moe",
        by_role,
        with_(GATE_UP, torch.ones(E, 2 * I, H)),
        "are two layouts of the experts; one is allowed",
    ),
    "both of Mixtral's": ("mixtral", by_number, with_(DOWN, torch.ones(E, H, I)), "are two layouts of the experts"),
    "another family's names": (
        "mixtral",
        by_number,
        rename(f"{MIXTRAL}w1.weight", f"{MIXTRAL}gate_proj.weight"),
        "4.gate_proj.weight is left over",
    ),
    "single experts of GPT-OSS": (
        "gpt_oss",
        fused,
        with_("mlp.experts.0.gate_proj.weight", torch.ones(I, H)),
        "0.gate_proj.weight is left over",
    ),
    "transposed": (
        "qwen3_moe",
        fused,
        with_(GATE_UP, torch.ones(E, H, 2 * I)),
        "3.mlp.experts.gate_up_proj must have shape [6, 48, 32], got [6, 32, 48]",
    ),
    "not transposed": (
        "gpt_oss",
        fused,
        with_(DOWN, torch.ones(E, H, I)),
        "3.mlp.experts.down_proj must have shape [6, 24, 32], got [6, 32, 24]",
    ),
    "shape of one expert": (
        "mixtral",
        by_number,
        with_(f"{MIXTRAL}w2.weight", torch.ones(I, H)),
        "4.w2.weight must have shape [32, 24], got [24, 32]",
    ),
    "shape of a bias": (
        "gpt_oss",
        fused,
        with_(f"{DOWN}_bias", torch.ones(E, I)),
        "must have shape [6, 32], got [6, 24]",
    ),
    "a router that the model has not": (
        "qwen3_moe",
        by_role,
        with_("mlp.router.weight", torch.ones(E, H)),
        "3.mlp.router.weight is left over",
    ),
    "more of the router": (
        "gpt_oss",
        fused,
        with_("mlp.router.weight_scale", torch.ones(1)),
        "3.mlp.router.weight_scale is left over",
    ),
    "experts elsewhere": ("gpt_oss", fused, with_("moe.down_proj", torch.ones(1)), "3.moe.down_proj is left over"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("shards", [1, 3])
def test_refused_by_name(tmp_path, case, shards):
    model_type, layout, corrupt, message = REFUSED[case]
    tensors = tensors_of(model_type, layout)
    corrupt(tensors)
    path = write(tmp_path, model_type, tensors, shards)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        checkpoint.load_experts(path, 3)
    assert str(caught.value).startswith(str(tmp_path))
    assert f"{PREFIX}3." in str(caught.value)
    assert_is_layer(checkpoint.load_experts(path, 0), model_type, 0)  # the other layer is not concerned


@every_spelling
def test_a_layer_of_two_prefixes(tmp_path, model_type, layout):
    tensors = tensors_of(model_type, layout)
    key = next(key for key in tensors if key.startswith(f"{PREFIX}3.") and ".experts." in key)
    tensors[key.replace("model.", "model.language_model.")] = tensors.pop(key)
    with pytest.raises(CheckpointError, match="are two prefixes of a layer; one is allowed"):
        checkpoint.load_experts(write(tmp_path, model_type, tensors), 3)


@every_spelling
def test_a_tensor_under_two_prefixes(tmp_path, model_type, layout):
    tensors = tensors_of(model_type, layout)
    key = next(key for key in tensors if key.startswith(f"{PREFIX}3.") and ".experts." in key)
    tensors[key.replace("model.", "model.language_model.")] = tensors[key].clone()
    with pytest.raises(CheckpointError, match=r" and \S+ are both \S+; one is allowed"):
        checkpoint.load_experts(write(tmp_path, model_type, tensors), 3)


@every_spelling
def test_a_key_that_the_index_does_not_list(tmp_path, model_type, layout):
    tensors = {**tensors_of(model_type, layout), f"{PREFIX}3.mlp.experts.scale": torch.ones(1)}
    path = write(tmp_path, model_type, tensors, 2)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"].pop(f"{PREFIX}3.mlp.experts.scale")
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"experts.scale is left over: the index .* does not list it"):
        checkpoint.load_experts(path, 3)


def test_a_layer_without_experts(tmp_path):
    path = write(tmp_path, "gpt_oss", tensors_of("gpt_oss", fused))
    message = (
        r"no key \[model.\]\[language_model.\]layers.1.mlp.experts.\* is there; the layers that have one are \[0, 3\]"
    )
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_experts(path, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"device": "meta"}, ValueError, "device must have memory for the parameters, got meta"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of .* or None, got torch.int8"),
        ({"backend": "zzz"}, ValueError, r"backend must be one of \['auto', .*\], got 'zzz'"),
        ({"layer": "3"}, TypeError, "layer must be an int, the N of layers.N., got '3'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    path = write(tmp_path, "mixtral", tensors_of("mixtral", by_number))
    with pytest.raises(error, match=message) as caught:
        checkpoint.load_experts(path, **{"layer": 3, **arguments})
    assert not isinstance(caught.value, CheckpointError)
    assert checkpoint.load_experts(path, 3, backend="reference").backend == "reference"


def test_load_layer_does_not_take_them_for_gemma_4(tmp_path):
    path = write(tmp_path, "mixtral", tensors_of("mixtral", by_number))
    with pytest.raises(CheckpointError, match=r"top_k_experts, hidden_activation, \w+ must be there, with no default"):
        checkpoint.load_layer(path, 3)


# --- transformers' own checkpoints ------------------------------------------------------------------------------------


def tiny_model(model_type):
    """A model of transformers, and where its layers have their experts."""
    transformers_gemma4()
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config_class, model_class = {
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    }[model_type]
    config = config_class(**{**sizes, **CONFIGS[model_type]})
    config._experts_implementation = "eager"
    return randomize(model_class(config))


@pytest.mark.filterwarnings("ignore")  # of transformers, about what a tiny model leaves out
@pytest.mark.parametrize("published", [True, False], ids=["published", "in memory"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_transformers_model_s_own_checkpoint(tmp_path, model_type, published):
    """What save_pretrained writes, in the published names and as it has them in memory, config.json too."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path, max_shard_size="20KB", save_original_format=published)
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint.check_index(tmp_path)
    assert checkpoint.layers(tmp_path) == (0, 1)
    case = random_experts(9, E, H, I, K)
    arguments = 2 * case.hidden_states, case.top_k_index, case.top_k_weights
    for number, layer in enumerate(model.model.layers):
        experts = checkpoint.load_experts(tmp_path, number)
        assert experts.top_k == K
        expected = layer.mlp.experts(*arguments)
        assert expected.any()
        torch.testing.assert_close(experts(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_the_files_are_never_written(tmp_path):
    path = write(tmp_path, "gpt_oss", tensors_of("gpt_oss", fused))
    before = (path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in checkpoint.load_experts(path, 3).parameters():
            parameter.zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_a_single_file_without_the_rest(tmp_path):
    """The shard that holds a layer is enough, with its config.json."""
    tensors = tensors_of("mixtral", by_number)
    write_config(tmp_path, "mixtral")
    save_file(
        {key: value for key, value in tensors.items() if key.startswith(f"{PREFIX}3.")}, tmp_path / "three.safetensors"
    )
    assert_is_layer(checkpoint.load_experts(tmp_path / "three.safetensors", 3), "mixtral", 3)
