"""Checkpoints: every layout gives the same module, nothing is read that was not asked for, every odd key is named."""

import dataclasses
import json
import re
import sys
from collections import Counter

import pytest
import safetensors
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from cupymoe import Gemma4MoE, Gemma4MoEConfig, MoEActivation, checkpoint, reference
from cupymoe.backends.reference import ReferenceBackend
from cupymoe.checkpoint import CheckpointError
from cupymoe.cli import verify
from cupymoe.verification import routing
from tests.helpers import oracle, random_experts, randomize, transformers_config, transformers_gemma4

CONFIG = Gemma4MoEConfig(
    hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)
E, H, I = 6, 32, 24  # noqa: E741
PREFIX = "model.language_model.layers."
LAYERS = (0, 3, 11)
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def make_moe(seed, config=CONFIG, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    return randomize(Gemma4MoE(config)).to(dtype)


# --- layouts: the state_dict of a Gemma4MoE in the names of a checkpoint ----------------------------------------------


def fused(state):
    return dict(state)


def older(state):
    names = {GATE_UP: "moe.gate_up_proj", DOWN: "moe.down_proj", "router.per_expert_scale": "moe.per_expert_scale"}
    return {names.get(name, name): tensor for name, tensor in state.items()}


def per_expert(state, behind=""):
    result = {name: tensor for name, tensor in state.items() if name.startswith("router.")}
    for expert, (gate_up, down) in enumerate(zip(state[GATE_UP], state[DOWN], strict=True)):
        gate, up = gate_up.chunk(2)
        for name, tensor in (("gate", gate), ("up", up), ("down", down)):
            result[f"{behind}experts.{expert}.{name}_proj.weight"] = tensor.contiguous()
    return result


def per_expert_behind_moe(state):
    return per_expert(state, "moe.")


LAYOUTS = (fused, older, per_expert, per_expert_behind_moe)


def tensors_of(layout=fused, prefix=PREFIX, layers=LAYERS, dtype=torch.bfloat16):
    """A checkpoint's tensors, dense ones among them; layer n is make_moe(n)."""
    result = {"model.language_model.embed_tokens.weight": torch.ones(4, H)}
    for layer in layers:
        result[f"{prefix}{layer}.mlp.gate_proj.weight"] = torch.ones(2, H)
        for name, tensor in layout(make_moe(layer, dtype=dtype).state_dict()).items():
            result[f"{prefix}{layer}.{name}"] = tensor.detach()
    return result


def write_config(folder, nested=True, **changes):
    fields = {**dataclasses.asdict(CONFIG), **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({"text_config": fields, "x": 1} if nested else fields))


def write(folder, tensors):
    """One file and its config.json."""
    folder.mkdir(exist_ok=True)
    write_config(folder)
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder, tensors, count=3):
    """Keys dealt out over ``count`` files, so that a layer spans them; and the index."""
    folder.mkdir(exist_ok=True)
    write_config(folder)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {key: names[i % count] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in weight_map if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def assert_is_layer(moe, layer, dtype=torch.bfloat16):
    expected = make_moe(layer).to(dtype).state_dict()
    assert {name: value.shape for name, value in moe.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    for name, tensor in moe.state_dict().items():
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected[name]), name


# --- what is loaded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_every_layout_gives_the_same_module(tmp_path, layout, sharded, device):
    path = (write_shards if sharded else write)(tmp_path, tensors_of(layout))
    assert checkpoint.layers(path) == LAYERS
    for layer in LAYERS:
        moe = checkpoint.load_layer(path, layer, device=device)
        assert all(parameter.device.type == device.type for parameter in moe.parameters())
        assert all(parameter.requires_grad for parameter in moe.parameters())
        assert_is_layer(moe.cpu(), layer)


@pytest.mark.parametrize("prefix", ["model.language_model.layers.", "model.layers.", "language_model.layers.",
                                    "language_model.model.layers.", "layers."])  # fmt: skip
def test_prefixes(tmp_path, prefix):
    path = write(tmp_path, tensors_of(prefix=prefix))
    assert checkpoint.layers(path) == LAYERS
    assert_is_layer(checkpoint.load_layer(path, 3), 3)


def test_other_towers_layers_are_not_ours(tmp_path):
    tensors = tensors_of(layers=(2,))
    tensors["model.vision_tower.encoder.layers.7.router.scale"] = torch.ones(1)
    tensors["model.layers.8.mlp.experts.gate_up_proj"] = torch.ones(1)
    assert checkpoint.layers(write(tmp_path, tensors)) == (2,)


def test_a_path_is_a_file_an_index_or_a_folder(tmp_path):
    single, shards = write(tmp_path / "single", tensors_of()), write_shards(tmp_path / "shards", tensors_of())
    for path in (
        single,
        str(single),
        single / "model.safetensors",
        shards,
        shards / "model.safetensors.index.json",
    ):
        assert_is_layer(checkpoint.load_layer(path, 11), 11)
    (shards / "model.safetensors.index.json").unlink()
    assert_is_layer(checkpoint.load_layer(shards, 11), 11)


@pytest.mark.parametrize("layout", [fused, per_expert])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtype_asked_for(tmp_path, layout, dtype):
    path = write(tmp_path, tensors_of(layout))
    assert_is_layer(checkpoint.load_layer(path, 0, dtype=dtype), 0, dtype)


def test_a_dtype_of_its_own_needs_one_asked_for(tmp_path):
    tensors = tensors_of(layers=(0,))
    key = f"{PREFIX}0.router.per_expert_scale"
    tensors[key] = tensors[key].float()
    path = write(tmp_path, tensors)
    with pytest.raises(
        CheckpointError,
        match=r"model.safetensors: \S*router.\S* must have \S+'s dtype torch.\w+ as long as no dtype is asked",
    ):
        checkpoint.load_layer(path, 0)
    assert_is_layer(checkpoint.load_layer(path, 0, dtype=torch.bfloat16), 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_dtype_must_be_served(tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"dtype must be one of .*bfloat16.* or None, got {dtype}"):
        checkpoint.load_layer(tmp_path, 0, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_into_fills_a_module_in_place(tmp_path, layout, device):
    path = write_shards(tmp_path, tensors_of(layout))
    moe = make_moe(99).to(device, torch.float32)
    pointers = [parameter.data_ptr() for parameter in moe.parameters()]
    checkpoint.load_into(moe, path, 3)
    assert [parameter.data_ptr() for parameter in moe.parameters()] == pointers
    assert_is_layer(moe.cpu(), 3, torch.float32)


def test_load_into_writes_nothing_of_a_bad_layer(tmp_path):
    tensors = tensors_of()
    tensors[f"{PREFIX}3.{DOWN}"] = torch.ones(E, H, I + 1)
    moe = make_moe(99)
    with pytest.raises(CheckpointError, match="down_proj"):
        checkpoint.load_into(moe, write(tmp_path, tensors), 3)
    assert_is_layer(moe, 99)


def test_load_into_refuses_the_meta_device(tmp_path):
    with torch.device("meta"):
        moe = Gemma4MoE(CONFIG)
    with pytest.raises(ValueError, match=r"router.scale must not be on the meta device: load_layer makes"):
        checkpoint.load_into(moe, write(tmp_path, tensors_of()), 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_per_expert_scale_is_applied_once(tmp_path, layout):
    """Where it is 2 the output is twice that without a scale: not the same, not four times."""
    tensors = tensors_of(layout, layers=(0,), dtype=torch.float64)
    (key,) = (key for key in tensors if key.endswith("per_expert_scale"))
    tensors[key] = torch.full((E,), 2.0, dtype=torch.float64)
    moe = checkpoint.load_layer(write(tmp_path, tensors), 0)
    states = torch.randn(20, H, dtype=torch.float64)
    weights, index = reference.route(moe.router.logits(states), CONFIG.top_k_experts)
    once = reference.experts(states, moe.experts.gate_up_proj, moe.experts.down_proj, index, 2 * weights,
                             CONFIG.activation)  # fmt: skip
    torch.testing.assert_close(moe(states), once, rtol=1e-6, atol=1e-6)


def test_a_transformers_model_s_own_checkpoint(tmp_path):
    """What save_pretrained writes, config.json too, read back: the outputs are that model's."""
    modeling = transformers_gemma4()
    model = modeling.Gemma4ForCausalLM(
        transformers_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    )
    randomize(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert checkpoint.layers(tmp_path) == (0, 1)
    states = torch.randn(9, H)
    for number, layer in enumerate(model.model.layers):
        moe = checkpoint.load_layer(tmp_path, number)
        assert moe.config == Gemma4MoEConfig.from_transformers(model.config)
        _, weights, index = layer.router(states)
        torch.testing.assert_close(moe(states), layer.experts(states, index, weights), rtol=1e-5, atol=1e-5)


def test_gate_is_the_first_half_whatever_the_layout(tmp_path):
    case = random_experts(dtype=torch.float64)
    state = make_moe(0, dtype=torch.float64).state_dict()
    state[GATE_UP], state[DOWN] = case.gate_up_proj, case.down_proj
    tensors = {f"{PREFIX}0.{name}": tensor for name, tensor in per_expert(state).items()}
    moe = checkpoint.load_layer(write(tmp_path, tensors), 0)
    output = moe.experts(case.hidden_states, case.top_k_index, case.top_k_weights)
    torch.testing.assert_close(output, oracle(case))


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Counts the tensors that are read, by key."""
    counter = Counter()
    original = safetensors.safe_open

    class Counted:
        def __init__(self, *args, **kwargs):
            self._handle = original(*args, **kwargs)

        def __enter__(self):
            self._handle.__enter__()
            return self

        def __exit__(self, *error):
            return self._handle.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def get_tensor(self, key):
            counter[key] += 1
            return self._handle.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    return counter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_layer_is_read_and_each_tensor_once(tmp_path, reads, layout):
    path = write_shards(tmp_path, tensors_of(layout))
    assert checkpoint.layers(path) == LAYERS
    assert not reads
    checkpoint.load_layer(path, 3)
    assert reads == dict.fromkeys((f"{PREFIX}3.{name}" for name in layout(make_moe(3).state_dict())), 1)


def test_nothing_is_read_of_a_bad_layer(tmp_path, reads):
    tensors = tensors_of()
    tensors[f"{PREFIX}3.experts.bias"] = torch.ones(1)
    with pytest.raises(CheckpointError):
        checkpoint.load_layer(write(tmp_path, tensors), 3)
    assert not reads


def test_only_the_shards_of_the_layer_are_opened(tmp_path):
    """One layer of a model of which no other file has been downloaded."""
    tensors = tensors_of()
    weight_map = {key: "three.safetensors" if ".layers.3." in key else "rest.safetensors" for key in tensors}
    save_file({key: tensors[key] for key in weight_map if ".layers.3." in key}, tmp_path / "three.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_is_layer(checkpoint.load_layer(tmp_path, 3, CONFIG), 3)
    with pytest.raises(CheckpointError, match=r"rest.safetensors: not a readable safetensors file: No such file"):
        checkpoint.load_layer(tmp_path, 0, CONFIG)


def test_fused_tensors_stay_mapped_and_the_file_is_never_written(tmp_path):
    path = write(tmp_path, tensors_of())
    file = path / "model.safetensors"
    before = file.read_bytes()
    moe = checkpoint.load_layer(path, 3)
    if sys.platform == "linux":
        address = moe.experts.down_proj.data_ptr()
        with open("/proc/self/maps") as maps:
            mapped = [line.split() for line in maps if str(file) in line]
        bounds = [[int(bound, 16) for bound in line[0].split("-")] for line in mapped]
        assert any(first <= address < end for first, end in bounds)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


# --- what is refused --------------------------------------------------------------------------------------------------


def without(*names):
    return lambda tensors: [tensors.pop(f"{PREFIX}3.{name}") for name in names]


def with_(name, tensor):
    return lambda tensors: tensors.update({f"{PREFIX}3.{name}": tensor})


def rename(old, new):
    return lambda tensors: tensors.update({f"{PREFIX}3.{new}": tensors.pop(f"{PREFIX}3.{old}")})


EXPERT_4 = [f"experts.4.{name}_proj.weight" for name in ("gate", "up", "down")]
REFUSED = {
    "missing router.proj": (fused, without("router.proj.weight"), "3.router.proj.weight is missing (1 of 5 keys"),
    "missing router.scale": (fused, without("router.scale"), "3.router.scale is missing"),
    "missing scale": (per_expert, without("router.per_expert_scale"), "3.router.per_expert_scale is missing"),
    "missing older scale": (older, without("moe.per_expert_scale"), "3.router.per_expert_scale is missing"),
    "missing gate_up": (fused, without(GATE_UP), "3.experts.gate_up_proj is missing"),
    "missing older down": (older, without("moe.down_proj"), "3.moe.down_proj is missing"),
    "missing experts": (fused, without(GATE_UP, DOWN), "3.experts.gate_up_proj is missing (2 of 5 keys"),
    "missing projection": (per_expert, without(EXPERT_4[1]), "3.experts.4.up_proj.weight is missing (1 of 21 keys"),
    "gap in the ids": (per_expert, without(*EXPERT_4), "3.experts.4.gate_proj.weight is missing (3 of 21 keys"),
    "gap behind moe": (
        per_expert_behind_moe,
        without("moe.experts.0.down_proj.weight"),
        "3.moe.experts.0.down_proj.weight is missing",
    ),
    "an expert too many": (
        per_expert,
        with_("experts.6.up_proj.weight", torch.ones(I, H)),
        "3.experts.6.up_proj.weight is left over: nothing of a layer with 6 unquantised experts reads it",
    ),
    "id with a zero": (per_expert, rename(EXPERT_4[0], "experts.04.gate_proj.weight"), "04.gate_proj.weight is left"),
    "left-over router": (fused, with_("router.norm.weight", torch.ones(H)), "3.router.norm.weight is left over"),
    "left-over bias": (fused, with_("experts.gate_up_proj_bias", torch.ones(1)), "gate_up_proj_bias is left over"),
    "left-over moe": (fused, with_("moe.shared.weight", torch.ones(1)), "3.moe.shared.weight is left over"),
    "weight_scale": (
        per_expert,
        with_("experts.0.up_proj.weight_scale", torch.ones(1)),
        "3.experts.0.up_proj.weight_scale is left over",
    ),
    "weight_packed": (
        per_expert,
        rename("experts.0.up_proj.weight", "experts.0.up_proj.weight_packed"),
        "3.experts.0.up_proj.weight_packed is left over",
    ),
    "a LoRA's base layer": (fused, rename(GATE_UP, "experts.base_layer.gate_up_proj"), "gate_up_proj is left over"),
    "shape of gate_up": (
        fused,
        with_(GATE_UP, torch.ones(E, H, 2 * I)),
        "3.experts.gate_up_proj must have shape [6, 48, 32], got [6, 32, 48]",
    ),
    "fewer experts": (
        fused,
        with_(DOWN, torch.ones(E - 1, H, I)),
        "3.experts.down_proj must have shape [6, 32, 24], got [5, 32, 24]",
    ),
    "shape of one expert": (
        per_expert,
        with_(EXPERT_4[2], torch.ones(I, H)),
        "3.experts.4.down_proj.weight must have shape [32, 24], got [24, 32]",
    ),
    "shape of a scale": (fused, with_("router.per_expert_scale", torch.ones(1)), "scale must have shape [6], got [1]"),
    "int8": (
        fused,
        with_(DOWN, torch.ones(E, H, I, dtype=torch.int8)),
        "3.experts.down_proj must have dtype BF16, F16, F32, F64, got I8",
    ),
    "float8 without its scale": (
        per_expert,
        with_(EXPERT_4[0], torch.ones(I, H).to(torch.float8_e4m3fn)),
        "3.experts.4.gate_proj.weight must have dtype BF16, F16, F32, F64, got F8_E4M3",
    ),
    "scale twice": (
        fused,
        with_("moe.per_expert_scale", torch.ones(E)),
        "is router.per_expert_scale a second time",
    ),
    "experts twice": (fused, with_("moe.down_proj", torch.ones(E, H, I)), "is experts.down_proj a second time"),
    "fused and per expert": (
        per_expert,
        with_(GATE_UP, torch.ones(E, 2 * I, H)),
        "are two layouts of the experts; one is allowed",
    ),
    "two fused layouts": (fused, rename(DOWN, "moe.down_proj"), "are two layouts of the experts; one is allowed"),
    "two per-expert layouts": (per_expert, rename(EXPERT_4[0], f"moe.{EXPERT_4[0]}"), "are two layouts of the experts"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_refused_by_name(tmp_path, case, sharded):
    layout, corrupt, message = REFUSED[case]
    tensors = tensors_of(layout)
    corrupt(tensors)
    path = (write_shards if sharded else write)(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        checkpoint.load_layer(path, 3)
    text = str(caught.value)
    assert text.startswith(str(tmp_path))
    assert f"{PREFIX}3." in text
    assert_is_layer(checkpoint.load_layer(path, 0), 0)  # the other layers are not concerned


def test_the_same_layer_under_two_prefixes(tmp_path):
    tensors = tensors_of()
    tensors["model.layers.3.router.scale"] = torch.ones(H)
    with pytest.raises(CheckpointError, match=r"layers.3.router.scale is router.scale a second time: .* is it too"):
        checkpoint.load_layer(write(tmp_path, tensors), 3)


def test_a_layer_that_is_not_there(tmp_path):
    message = r"no \[model.\]\[language_model.\]layers.4.\{router,experts,moe\}.\* key is there; .*: \[0, 3, 11\]"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_layer(write(tmp_path, tensors_of()), 4)


@pytest.mark.parametrize("activation", ["swigluoai", "gelu_tanh_no_mul"])
def test_single_experts_need_a_gate_beside_an_up(tmp_path, activation):
    config = dataclasses.replace(CONFIG, hidden_activation=activation)
    with pytest.raises(CheckpointError, match=r"does not read \[gate \| up\]"):
        checkpoint.load_layer(write(tmp_path, tensors_of(per_expert)), 3, config)


def test_an_ungated_fused_layer(tmp_path):
    config = dataclasses.replace(CONFIG, hidden_activation="gelu_tanh_no_mul")
    moe = make_moe(1, config)
    save_file({f"layers.0.{name}": tensor for name, tensor in moe.state_dict().items()}, tmp_path / "x.safetensors")
    loaded = checkpoint.load_layer(tmp_path / "x.safetensors", 0, config)
    assert torch.equal(loaded.experts.gate_up_proj, moe.experts.gate_up_proj)
    assert loaded.experts.gate_up_proj.shape == (E, I, H)


# --- files that are not what they say ---------------------------------------------------------------------------------


def edit_index(folder, edit):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))


def test_index_and_headers_must_agree(tmp_path):
    key = f"{PREFIX}3.{DOWN}"
    path = write_shards(tmp_path, tensors_of())
    edit_index(path, lambda weight_map: weight_map.update({key: weight_map[f"{PREFIX}3.{GATE_UP}"]}))
    with pytest.raises(CheckpointError, match=rf"{key} is (missing|left over)"):
        checkpoint.load_layer(path, 3)


def test_a_key_that_the_index_does_not_list(tmp_path):
    tensors = {**tensors_of(), f"{PREFIX}3.experts.down_proj_scale": torch.ones(1)}
    path = write_shards(tmp_path, tensors)
    edit_index(path, lambda weight_map: weight_map.pop(f"{PREFIX}3.experts.down_proj_scale"))
    with pytest.raises(CheckpointError, match=r"down_proj_scale is left over: .* does not say that it is there"):
        checkpoint.load_layer(path, 3)


def test_a_key_in_two_files_of_a_folder(tmp_path):
    path = write(tmp_path, tensors_of())
    save_file({f"{PREFIX}3.{DOWN}": torch.ones(1)}, path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more.safetensors: .*3.experts.down_proj is there twice: .*model"):
        checkpoint.load_layer(path, 3)


def test_a_file_beside_an_index(tmp_path):
    write_shards(tmp_path, tensors_of())
    save_file(tensors_of(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="are both there; give the one that is meant"):
        checkpoint.layers(tmp_path)
    assert checkpoint.layers(tmp_path / "model.safetensors") == LAYERS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "not a readable safetensors file"),
        ("model.safetensors", "", "not a readable safetensors file"),
        ("model.safetensors.index.json", "{", "not a readable JSON file"),
        ("model.safetensors.index.json", "[]", "must be a JSON object, got list"),
        ("model.safetensors.index.json", "{}", "weight_map must be an object that maps keys to file names, got None"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "weight_map must be an object"),
        ("pytorch_model.bin", "", "neither model.safetensors.index.json nor a .safetensors file is there"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.layers(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "folder"])
def test_paths_that_are_not_there(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"{name}: not a readable .*No such file"):
        checkpoint.layers(tmp_path / name)


def test_without_safetensors(tmp_path, monkeypatch):
    path = write(tmp_path, tensors_of())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'cupymoe\[checkpoint\]'"):
        checkpoint.load_layer(path, 0)


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False], ids=["text_config", "flat"])
def test_config_is_read(tmp_path, nested):
    write_config(tmp_path, nested, hidden_activation="silu", rms_norm_eps=1e-5)
    expected = dataclasses.replace(CONFIG, hidden_activation="silu", rms_norm_eps=1e-5)
    assert checkpoint.read_config(tmp_path) == expected
    assert checkpoint.read_config(tmp_path / "model.safetensors.index.json") == expected


@pytest.mark.parametrize("nested", [True, False], ids=["text_config", "flat"])
@pytest.mark.parametrize("name", dataclasses.asdict(CONFIG))
def test_config_fills_nothing_in(tmp_path, nested, name):
    write_config(tmp_path, nested, **{name: ...})
    with pytest.raises(CheckpointError, match=rf"config.json: {name} must be there and is not assumed"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, r"config.json: num_experts must be a positive integer, got None"),
        ({"hidden_activation": "quick_gelu"}, r"config.json: Unknown MoE activation: 'quick_gelu'"),
        ({"hidden_activation": ["gelu"]}, r"config.json: .*unhashable"),
    ],
)
def test_config_is_validated(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_config(tmp_path)


def test_config_of_another_shape(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": null}')
    with pytest.raises(CheckpointError, match="an object text_config must be there"):
        checkpoint.read_config(tmp_path)


def test_a_given_config_is_taken(tmp_path):
    path = write(tmp_path, tensors_of())
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not a readable JSON file"):
        checkpoint.load_layer(path, 0)
    config = dataclasses.replace(CONFIG, hidden_activation="gelu")
    assert checkpoint.load_layer(path, 0, config, backend="reference").experts.backend == "reference"
    assert checkpoint.load_layer(path, 0, config).config == config


# --- cupymoe verify --checkpoint --------------------------------------------------------------------------------------


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
