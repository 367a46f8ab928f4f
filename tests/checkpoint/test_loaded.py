"""What is loaded: every layout, prefix and dtype gives the same module."""

import pytest
import safetensors
import torch
from torch.distributed.fsdp import fully_shard

from cupymoe import Gemma4MoEConfig, checkpoint, reference
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.helpers import (
    CONFIG,
    DOWN,
    GATE_UP,
    LAYERS,
    LAYOUTS,
    PREFIX,
    E,
    H,
    I,
    assert_is_layer,
    fused,
    make_moe,
    per_expert,
    tensors_of,
    write,
    write_shards,
)
from tests.helpers import UNFIT, oracle, random_experts, randomize, transformers_config, transformers_gemma4


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
    for tower in ("vision_tower.encoder", "audio_tower"):
        tensors[f"model.{tower}.layers.7.mlp.gate_proj.weight"] = torch.ones(1)
    tensors["model.language_model.layers.8.mlp.shared_experts.gate_proj.weight"] = torch.ones(1)
    tensors["model.mtp_layers.9.experts.down_proj"] = torch.ones(1)
    assert checkpoint.layers(write(tmp_path, tensors)) == (2,)
    assert_is_layer(checkpoint.load_layer(tmp_path, 2), 2)


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


@pytest.mark.parametrize("layer", ["0", 0.0, True, None])
def test_a_layer_is_an_int(tmp_path, layer):
    path = write(tmp_path, tensors_of())
    message = rf"layer must be an int, the N of layers.N., got {layer!r}"
    with pytest.raises(TypeError, match=message):
        checkpoint.load_layer(path, layer)
    with pytest.raises(TypeError, match=message):
        checkpoint.load_into(make_moe(0), path, layer)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nth", [1, 3, 5])
def test_load_into_writes_nothing_if_a_tensor_can_not_be_read(tmp_path, monkeypatch, layout, nth):
    path, moe = write(tmp_path, tensors_of(layout)), make_moe(99)
    original, read = safetensors.safe_open, []

    class Failing:
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
            read.append(key)
            if len(read) == nth:
                raise OSError("Input/output error")
            return self._handle.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Failing)
    with pytest.raises(CheckpointError, match=r"model.safetensors: \S+ can't be read: Input/output error"):
        checkpoint.load_into(moe, path, 3)
    assert len(read) == nth
    assert_is_layer(moe, 99)


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("name", ["router.scale", DOWN])
def test_load_into_refuses_what_a_copy_would_not_fill(tmp_path, kind, name):
    make, error, message = UNFIT[kind]
    moe = make_moe(99)
    before = {key: value.clone() for key, value in moe.state_dict().items()}
    owner, _, attribute = name.rpartition(".")
    unfit = torch.nn.Parameter(make(before[name]), requires_grad=False)
    moe.get_submodule(owner).register_parameter(attribute, unfit)
    with pytest.raises(error, match=f"{name} must .*{message}"):
        checkpoint.load_into(moe, write(tmp_path, tensors_of()), 3)
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items() if key != name)


def test_load_into_refuses_shards(tmp_path, mesh):
    moe = fully_shard(make_moe(99), mesh=mesh)
    with pytest.raises(TypeError, match=r"router.scale must be a plain tensor, .* got a DTensor"):
        checkpoint.load_into(moe, write(tmp_path, tensors_of()), 3)
    assert torch.equal(moe.router.scale.full_tensor(), make_moe(99).router.scale)


@pytest.mark.parametrize("shape", [(E - 1, H, I), (2, E, H, I)])
def test_load_into_refuses_parameters_of_another_shape(tmp_path, shape):
    moe = make_moe(99)
    moe.experts.down_proj = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"experts.down_proj must have shape \[6, 32, 24\], as moe.config says, got"):
        checkpoint.load_into(moe, write(tmp_path, tensors_of()), 3)
    assert torch.equal(moe.router.scale, make_moe(99).router.scale)
    assert not moe.experts.down_proj.any()


def test_load_into_needs_every_parameter(tmp_path):
    moe = make_moe(99)
    moe.router.proj = torch.nn.Sequential(moe.router.proj)
    with pytest.raises(ValueError, match=r"moe must have the parameter router.proj.weight: "):
        checkpoint.load_into(moe, write(tmp_path, tensors_of()), 3)
    assert torch.equal(moe.router.scale, make_moe(99).router.scale)


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_load_layer_refuses_the_meta_device(tmp_path, device):
    with pytest.raises(ValueError, match="device must have memory for the parameters, got meta"):
        checkpoint.load_layer(write(tmp_path, tensors_of()), 3, device=device)


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
