"""Tiny checkpoints in every layout, and what a loaded layer must be."""

import dataclasses
import json

import torch
from safetensors.torch import save_file

from cupymoe import Gemma4MoE, Gemma4MoEConfig
from tests.helpers import randomize

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


def fused_behind_moe(state):
    return {f"moe.{name}" if name.startswith("experts.") else name: tensor for name, tensor in state.items()}


def per_expert(state, behind=""):
    result = {name: tensor for name, tensor in state.items() if name.startswith("router.")}
    for expert, (gate_up, down) in enumerate(zip(state[GATE_UP], state[DOWN], strict=True)):
        gate, up = gate_up.chunk(2)
        for name, tensor in (("gate", gate), ("up", up), ("down", down)):
            result[f"{behind}experts.{expert}.{name}_proj.weight"] = tensor.contiguous()
    return result


def per_expert_behind_moe(state):
    return per_expert(state, "moe.")


LAYOUTS = (fused, older, fused_behind_moe, per_expert, per_expert_behind_moe)


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


def without(*names):
    return lambda tensors: [tensors.pop(f"{PREFIX}3.{name}") for name in names]


def with_(name, tensor):
    return lambda tensors: tensors.update({f"{PREFIX}3.{name}": tensor})
