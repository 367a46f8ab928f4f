"""Tiny checkpoints of Qwen3-MoE, Mixtral and GPT-OSS in every spelling, with their routers and config.json."""

import json

import torch
from safetensors.torch import save_file

from cupymoe import MoEExperts
from tests.helpers import randomize

E, H, I, K = 6, 32, 24, 2  # noqa: E741
PREFIX = "model.layers."
LAYERS = (0, 3)
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

CONFIGS = {
    "qwen3_moe": {
        "hidden_size": H,
        "num_experts": E,
        "moe_intermediate_size": I,
        "intermediate_size": 40,
        "hidden_act": "silu",
        "num_experts_per_tok": K,
    },
    "mixtral": {
        "hidden_size": H,
        "num_local_experts": E,
        "intermediate_size": I,
        "hidden_act": "silu",
        "num_experts_per_tok": K,
    },
    "gpt_oss": {
        "hidden_size": H,
        "num_local_experts": E,
        "intermediate_size": I,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "num_experts_per_tok": K,
    },
}

ROUTERS = {
    "qwen3_moe": {"mlp.gate.weight": (E, H)},
    "mixtral": {"block_sparse_moe.gate.weight": (E, H)},
    "gpt_oss": {"mlp.router.weight": (E, H), "mlp.router.bias": (E,)},
}


def make_experts(model_type, seed, dtype=torch.bfloat16):
    torch.manual_seed(seed)
    settings = {"bias": True, "transposed": True} if model_type == "gpt_oss" else {}
    activation = "swigluoai" if model_type == "gpt_oss" else "silu"
    return randomize(MoEExperts(E, H, I, activation, **settings)).to(dtype)


def fused(state):
    return {f"mlp.experts.{name}": tensor for name, tensor in state.items()}


def single(state, prefix, gate, up, down):
    result = {}
    for expert, (gate_up, down_proj) in enumerate(zip(state["gate_up_proj"], state["down_proj"], strict=True)):
        for name, tensor in zip((gate, up, down), (*gate_up.chunk(2), down_proj), strict=True):
            result[f"{prefix}{expert}.{name}.weight"] = tensor.contiguous()
    return result


def by_role(state):
    return single(state, "mlp.experts.", "gate_proj", "up_proj", "down_proj")


def by_number(state):
    return single(state, "block_sparse_moe.experts.", "w1", "w3", "w2")


SPELLINGS = (
    ("qwen3_moe", by_role),
    ("qwen3_moe", fused),
    ("mixtral", by_number),
    ("mixtral", fused),
    ("gpt_oss", fused),
)


def tensors_of(model_type, layout, prefix=PREFIX, dtype=torch.bfloat16):
    """A checkpoint's tensors; the experts of layer n are make_experts(model_type, n)."""
    result = {f"{prefix}1.mlp.gate_proj.weight": torch.ones(2, H), "lm_head.weight": torch.ones(4, H)}
    for layer in LAYERS:
        for name, shape in ROUTERS[model_type].items():
            result[f"{prefix}{layer}.{name}"] = torch.ones(shape)
        for name, tensor in layout(make_experts(model_type, layer, dtype).state_dict()).items():
            result[f"{prefix}{layer}.{name}"] = tensor.detach()
    return result


def write_config(folder, model_type, /, nested=False, **changes):
    """config.json; a change to ... takes a field away."""
    fields = {"model_type": model_type, **CONFIGS.get(model_type, {}), **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({"text_config": fields} if nested else fields))


def write(folder, model_type, tensors, shards=1):
    """Files with the keys dealt out over them, an index if they are several, and config.json."""
    folder.mkdir(exist_ok=True)
    write_config(folder, model_type)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: names[i % shards] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key in weight_map if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_is_layer(experts, model_type, layer, dtype=torch.bfloat16):
    expected = make_experts(model_type, layer).to(dtype)
    assert experts.activation is expected.activation
    assert (experts.has_bias, experts.is_transposed) == (expected.has_bias, expected.is_transposed)
    assert experts.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in experts.state_dict().items():
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected.state_dict()[name]), name
