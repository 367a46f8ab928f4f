"""Whole models of transformers whose experts are quantised in the checkpoint: what they compute, what is refused."""

import copy
import json
import logging
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cupymoe import QuantizedWeight
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.quantised.layers import EXPERTS, FAMILIES, PREFIX, fused, per_expert
from tests.checkpoint.quantised.stored import KINDS
from tests.helpers import randomize, relative_error, transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")
load_quantized = integration.load_quantized
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

SIZES = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "pad_token_id": 0,
}
BITS_4 = "ct int4 g32"


def gemma4_text(kind, **changes):
    return transformers.Gemma4TextConfig(
        **SIZES,
        hidden_size=kind.hidden_size,
        intermediate_size=64,
        layer_types=["sliding_attention", "full_attention"],
        global_head_dim=32,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=EXPERTS,
        top_k_experts=2,
        moe_intermediate_size=kind.intermediate_size,
        **changes,
    )


def gemma4(kind):
    """Its head is tied to the embedding."""
    return transformers.Gemma4ForCausalLM(gemma4_text(kind))


def gemma4_with_vision(kind):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision |= {"num_key_value_heads": 1, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 8}
    config = transformers.Gemma4Config(text_config=gemma4_text(kind), vision_config=vision, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration(config)


def qwen3_moe(kind):
    """One of its layers has no experts."""
    config = transformers.Qwen3MoeConfig(
        **{**SIZES, "num_hidden_layers": 3},
        hidden_size=kind.hidden_size,
        intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=kind.intermediate_size,
        mlp_only_layers=[1],
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral(kind):
    config = transformers.MixtralConfig(
        **SIZES,
        hidden_size=kind.hidden_size,
        intermediate_size=kind.intermediate_size,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return transformers.MixtralForCausalLM(config)


MODELS = {
    "gemma4": (gemma4, "gemma4"),
    "gemma4 with vision": (gemma4_with_vision, "gemma4"),
    "qwen3": (qwen3_moe, "qwen3"),
    "mixtral": (mixtral, "mixtral"),
}


def write(folder, name, kind_name=BITS_4, layout=per_expert, dtype=torch.float32):
    """A checkpoint in ``folder``, and the model of its weights in float64, rounded to float32."""
    build, family = MODELS[name]
    kind = KINDS[kind_name]
    torch.manual_seed(0)
    model = randomize(build(kind)).eval().to(dtype)
    model.save_pretrained(folder)
    tensors = {key: value for key, value in load_file(folder / "model.safetensors").items() if ".experts." not in key}
    for path, experts in model.named_modules():
        if path.endswith(".experts"):
            prefix, number = re.fullmatch(r"(.*layers\.)(\d+)\..*", path).groups()
            layer = layout(kind, FAMILIES[family], int(number))
            tensors |= {key.replace(PREFIX, f"{prefix}{number}."): value for key, value in layer.tensors.items()}
            experts.gate_up_proj.data = layer.gate_up_proj.float()
            experts.down_proj.data = layer.down_proj.float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=kind.config)
    return model.float()


def change_config(folder, **changes):
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})


def tokens():
    return torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(3))


def load(folder):
    return load_quantized(folder, device="cpu", dtype=torch.float32)


def weights_of(model):
    return [module for module in model.modules() if isinstance(module, QuantizedWeight)]


@torch.no_grad()
@pytest.mark.parametrize("layout", [per_expert, fused])
@pytest.mark.parametrize("kind", [BITS_4, "ct nvfp4", "ct fp8 channel", "modelopt nvfp4", "fp8 blocks"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_dequantised_weights(tmp_path, name, kind, layout):
    expected = write(tmp_path, name, kind, layout)
    model = load(tmp_path)
    assert type(model) is type(expected)
    assert not model.training
    assert model.config._experts_implementation == model.config.get_text_config()._experts_implementation == "cupymoe"
    assert {weight.format.name for weight in weights_of(model)} == {KINDS[kind].format}
    assert len(weights_of(model)) == 4
    assert not [key for key, _ in model.named_parameters() if ".experts." in key]
    assert not [key for key, each in (*model.named_parameters(), *model.named_buffers()) if each.is_meta]
    assert relative_error(model(tokens()).logits, expected(tokens()).logits.double()) < 1e-5


@torch.no_grad()
def test_one_of_the_weights_is_plain(tmp_path):
    """As those are that FP8's quantiser leaves alone."""
    expected = write(tmp_path, "qwen3")
    change_config(tmp_path, quantization_config={**KINDS[BITS_4].config, "ignore": ["re:.*down_proj"]})

    def edit(tensors):
        for path, experts in expected.named_modules():
            if path.endswith(".experts"):
                for number, weight in enumerate(experts.down_proj):
                    name = f"{path}.{number}.down_proj.weight"
                    for ending in ("packed", "scale", "shape"):
                        del tensors[f"{name}_{ending}"]
                    tensors[name] = weight.detach()

    change(tmp_path, edit)
    model = load(tmp_path)
    assert len(weights_of(model)) == 2
    assert torch.equal(model.model.layers[2].mlp.experts.down_proj, expected.model.layers[2].mlp.experts.down_proj)
    assert relative_error(model(tokens()).logits, expected(tokens()).logits.double()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_generates(tmp_path, name):
    expected = write(tmp_path, name)
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(load(tmp_path).generate(tokens(), **settings), expected.generate(tokens(), **settings))


@torch.no_grad()
def test_what_is_not_quantised_is_what_the_files_hold(tmp_path):
    expected = write(tmp_path, "gemma4", dtype=torch.bfloat16)
    generation = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=7, pad_token_id=0)
    generation.save_pretrained(tmp_path)
    model = load_quantized(tmp_path, device="cpu")
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.float(), theirs[name]), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 7
    assert model.generate(tokens(), do_sample=False).shape[1] <= 10
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)
    assert not hasattr(model.config, "quantization_config")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_it_is_a_model_like_any_other(tmp_path, name):
    write(tmp_path, name)
    model = load(tmp_path)
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    codes = [tensor for key, tensor in sorted(saved.items()) if key.endswith("experts.down_proj.codes")]
    ours = [tensor for key, tensor in sorted(model.state_dict().items()) if key.endswith("experts.down_proj.codes")]
    assert len(codes) == len(ours) == 2
    assert all(map(torch.equal, codes, ours))


@torch.no_grad()
def test_in_shards_and_in_the_published_prefixes(tmp_path):
    """Of Gemma 4: another prefix of layers, and another name of the router's scales."""
    expected = write(tmp_path, "gemma4")
    whole = tmp_path / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    weight_map = {}
    for number in range(3):
        keys = sorted(tensors)[number::3]
        names = {key: key.replace("router.per_expert_scale", "moe.per_expert_scale") for key in keys}
        file = f"model-{number}.safetensors"
        save_file({names[key]: tensors[key] for key in keys}, tmp_path / file)
        weight_map |= dict.fromkeys(names.values(), file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, index):
        assert relative_error(load(path)(tokens()).logits, expected(tokens()).logits.double()) < 1e-5
    weight_map.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is left over: the index .* does not list it"):
        load(tmp_path)


def test_one_layer_at_a_time(tmp_path, monkeypatch):
    """While a layer is read, those before it are in the model, and no other has any weights."""
    from cupymoe.checkpoint import model as checkpoint_model

    write(tmp_path, "gemma4")
    held, models = [], []
    kept_init = transformers.Gemma4ForCausalLM.__init__
    kept_load = checkpoint_model.load

    def spy(*arguments):
        parameters = [name for name, _ in models[0].named_parameters() if ".experts." in name]
        held.append((len(weights_of(models[0])), parameters))
        return kept_load(*arguments)

    monkeypatch.setattr(
        transformers.Gemma4ForCausalLM,
        "__init__",
        lambda self, *a, **k: models.append(self) or kept_init(self, *a, **k),
    )
    monkeypatch.setattr(checkpoint_model, "load", spy)
    load(tmp_path)
    assert held == [(0, []), (2, [])]


def test_interrupted(tmp_path, monkeypatch):
    from cupymoe.checkpoint.model import ModelCheckpoint

    def interrupted(self, layer, *arguments):
        if layer == 1:
            raise KeyboardInterrupt
        return kept(self, layer, *arguments)

    write(tmp_path, "gemma4")
    kept = ModelCheckpoint.load_experts
    monkeypatch.setattr(ModelCheckpoint, "load_experts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path)
    monkeypatch.undo()
    load(tmp_path)


# --- linear layers that are quantised too -----------------------------------------------------------------------------


def quantise_attention(folder, model, kind, projections=("q_proj", "o_proj")):
    """Some linear layers of attention in the file stored as the kind says, and in the model what they stand for."""
    rng = np.random.default_rng(5)

    def edit(tensors):
        for path, module in model.named_modules():
            if path.endswith(tuple(f"self_attn.{name}" for name in projections)):
                stored = kind.write(rng, *module.weight.shape)
                del tensors[f"{path}.weight"]
                tensors.update({f"{path}.{name}": tensor for name, tensor in stored.tensors.items()})
                module.weight.data = torch.from_numpy(stored.weight).float()

    change(folder, edit)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind_name", [BITS_4, "ct int4 g32 zero", "ct int8", "ct nvfp4", "ct mxfp4", "modelopt nvfp4", "modelopt fp8"]
)
def test_linear_layers_are_dequantised(tmp_path, caplog, kind_name):
    kind = KINDS[kind_name]
    expected = write(tmp_path, "qwen3", kind_name)
    quantise_attention(tmp_path, expected, kind)
    with caplog.at_level(logging.INFO, "cupymoe"):
        model = load(tmp_path)
    for name in ("q_proj", "o_proj"):
        ours, theirs = (getattr(each.model.layers[2].self_attn, name).weight for each in (model, expected))
        assert torch.equal(ours, theirs)
    assert relative_error(model(tokens()).logits, expected(tokens()).logits.double()) < 1e-5
    (line,) = [line for line in caplog.messages if "beside the experts" in line]
    assert re.search("6 weights beside the experts are .*; they are dequantised to torch.float32", line)


def test_a_quantised_linear_layer_is_complete(tmp_path):
    expected = write(tmp_path, "qwen3", "ct nvfp4")
    quantise_attention(tmp_path, expected, KINDS["ct nvfp4"], ("q_proj",))
    name = "model.layers.0.self_attn.q_proj"
    kept = load_file(tmp_path / "model.safetensors")

    def refused(match, edit):
        save_file(kept, tmp_path / "model.safetensors")
        change(tmp_path, edit)
        with pytest.raises(CheckpointError, match=match):
            load(tmp_path)

    refused(rf"{name}\.weight_global_scale is missing; {name} is ", lambda t: t.pop(f"{name}.weight_global_scale"))
    refused(
        rf"{name}\.weight_scale must have shape \[64, 6\], got \[64, 5\]",
        lambda t: t.update({f"{name}.weight_scale": t[f"{name}.weight_scale"][:, :5]}),
    )
    refused(
        rf"{name}\.weight_global_scale must be finite and not negative, got nan",
        lambda t: t[f"{name}.weight_global_scale"].fill_(torch.nan),
    )
    refused(
        rf"{name}\.weight must have shape \[64, 96\], as config\.json says, got \[62, 96\]",
        lambda t: t.update({key: t[key][:62] for key in (f"{name}.weight_packed", f"{name}.weight_scale")}),
    )
    refused(
        rf"{name}\.bits is left over: nothing of the model reads it",
        lambda t: t.update({f"{name}.bits": torch.ones(2)}),
    )


@pytest.mark.parametrize(("kind_name", "ending"), [("gptq", "qweight"), ("awq", "qweight"), ("nf4", "weight")])
def test_linear_layers_that_are_not_read(tmp_path, kind_name, ending):
    expected = write(tmp_path, "qwen3", kind_name)
    load(tmp_path)
    quantise_attention(tmp_path, expected, KINDS[kind_name], ("q_proj",))
    match = rf"self_attn\.q_proj\.{ending}, beside the experts, must be unquantised .* which config\.json calls \w+ \w+"
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("ignored", "match"),
    [
        ([], r"q_proj\.weight_packed is missing; .* is compressed-tensors pack-quantized int4_g32"),
        (["re:.*self_attn.*"], "got F8_E4M3 of shape .*, which config.json calls unquantised"),
    ],
)
def test_codes_that_config_json_does_not_describe_are_not_cast(tmp_path, ignored, match):
    write(tmp_path, "qwen3")
    change_config(tmp_path, quantization_config={**KINDS[BITS_4].config, "ignore": ignored})
    name = "model.layers.0.self_attn.q_proj.weight"
    change(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("ending", ["k_proj.k_scale", "v_scale"])
def test_scales_of_a_quantised_cache_are_not_used(tmp_path, caplog, ending):
    expected = write(tmp_path, "qwen3")
    key = f"model.layers.0.self_attn.{ending}"
    change(tmp_path, lambda tensors: tensors.update({key: torch.tensor(0.5)}))
    with caplog.at_level(logging.INFO, "cupymoe"):
        model = load(tmp_path)
    assert relative_error(model(tokens()).logits, expected(tokens()).logits.double()) < 1e-5
    assert any("1 scales of a KV cache are not used" in line for line in caplog.messages)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "edit"),
    [
        (r"model\.norm\.weight is missing \(1 keys are", lambda t: t.pop("model.norm.weight")),
        (
            r"experts\.1\.up_proj\.weight_scale is missing",
            lambda t: t.pop("model.layers.2.mlp.experts.1.up_proj.weight_scale"),
        ),
        (
            r"model\.extra\.weight is left over: nothing of the",
            lambda t: t.update({"model.extra.weight": torch.ones(2)}),
        ),
        (
            r"model\.norm\.weight must have shape \[96\], as config\.json says, got \[95\]",
            lambda t: t.update({"model.norm.weight": torch.ones(95)}),
        ),
        (
            r"layers with experts must be \[0, 2\], as config\.json says, got \[0\]",
            lambda t: [t.pop(key) for key in [*t] if "layers.2.mlp.experts" in key],
        ),
    ],
)
def test_files_that_are_not_the_model_s(tmp_path, match, edit):
    write(tmp_path, "qwen3")
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"architectures must name one of transformers' models, got \['MyMoE'\]", {"architectures": ["MyMoE"]}),
        (r"architectures must name one of transformers' models, got \[\]", {"architectures": ...}),
        (r"weight_packed is left over", {"quantization_config": ...}),
    ],
)
def test_a_config_that_is_not_the_model_s(tmp_path, match, changes):
    write(tmp_path, "qwen3")
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path)


def test_what_from_pretrained_loads_is_its(tmp_path):
    qwen3_moe(KINDS[BITS_4]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="experts must be quantised, and none are: transformers' from_pretrained"):
        load(tmp_path)


def test_arguments(tmp_path):
    write(tmp_path, "qwen3")
    for dtype in (torch.int8, None):
        with pytest.raises(ValueError, match=f"dtype must be one of .* got {dtype}"):
            load_quantized(tmp_path, device="cpu", dtype=dtype)
    with pytest.raises(ValueError, match="device must have memory for the parameters, got meta"):
        load_quantized(tmp_path, device="meta")
    with pytest.raises(TypeError, match="path must be a str"):
        load_quantized(3)
    with pytest.raises(CheckpointError, match="none is there"):
        load_quantized(tmp_path / "nowhere", device="cpu")
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match="a whole model is read from safetensors, not from a GGUF file"):
        load_quantized(file, device="cpu")


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_on_gpu(tmp_path, name):
    expected = write(tmp_path, name).cuda()
    given = tokens().cuda()
    model = load_quantized(tmp_path, dtype=torch.float32)
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert relative_error(model(given).logits, expected(given).logits.double()) < 1e-4
    model = load_quantized(tmp_path)
    assert model.generate(given, max_new_tokens=4, do_sample=False).shape == (2, 11)
