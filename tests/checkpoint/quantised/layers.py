"""Tiny quantised checkpoints of Gemma 4, Qwen3-MoE and Mixtral, per expert and fused, and what they stand for."""

import json
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from tests.checkpoint.quantised.stored import KINDS, Kind

EXPERTS, LAYER = 4, 3
PREFIX = f"model.language_model.layers.{LAYER}."
BY_ROLE, BY_NUMBER = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")


class Family(NamedTuple):
    model_type: str
    single: str
    """What the names of single experts begin with."""
    names: tuple[str, str, str]
    fused: str
    num_experts: str
    intermediate_size: str


FAMILIES = {
    "gemma4": Family("gemma4_text", "experts.", BY_ROLE, "experts.", "num_experts", "moe_intermediate_size"),
    "gemma4 moe": Family("gemma4_text", "moe.experts.", BY_ROLE, "moe.", "num_experts", "moe_intermediate_size"),
    "qwen3": Family("qwen3_moe", "mlp.experts.", BY_ROLE, "mlp.experts.", "num_experts", "moe_intermediate_size"),
    "mixtral": Family(
        "mixtral", "block_sparse_moe.experts.", BY_NUMBER, "mlp.experts.", "num_local_experts", "intermediate_size"
    ),
}


class Layer(NamedTuple):
    """The tensors of a layer's experts by key, and both weights in float64."""

    tensors: dict[str, torch.Tensor]
    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor

    @property
    def weights(self):
        return {"gate_up_proj": self.gate_up_proj, "down_proj": self.down_proj}


def _stack(weights):
    return torch.from_numpy(np.stack(weights))


def per_expert(kind: Kind, family: Family, seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    hidden, width = kind.hidden_size, kind.intermediate_size
    tensors, gate_up, down = {}, [], []
    for expert in range(EXPERTS):
        written = [kind.write(rng, n, k) for n, k in ((width, hidden), (width, hidden), (hidden, width))]
        for name, stored in zip(family.names, written, strict=True):
            for tensor, value in stored.tensors.items():
                tensors[f"{PREFIX}{family.single}{expert}.{name}.{tensor}"] = value
        gate_up.append(np.concatenate([written[0].weight, written[1].weight]))
        down.append(written[2].weight)
    return Layer(tensors, _stack(gate_up), _stack(down))


def fused(kind: Kind, family: Family, seed: int = 0, dotted: bool = False) -> Layer:
    """Each weight as a whole, then stacked: ``gate_up_proj_packed``, or dotted ``gate_up_proj.weight_packed``."""
    rng = np.random.default_rng(seed)
    tensors, weights = {}, {}
    shapes = {
        "gate_up_proj": (2 * kind.intermediate_size, kind.hidden_size),
        "down_proj": (kind.hidden_size, kind.intermediate_size),
    }
    for name, shape in shapes.items():
        written = [kind.write(rng, *shape) for _ in range(EXPERTS)]
        for tensor in written[0].tensors:
            ending = f".{tensor}" if dotted else tensor.removeprefix("weight") if "weight" in tensor else f"_{tensor}"
            value = torch.stack([stored.tensors[tensor] for stored in written])
            if tensor == "weight_shape":
                value = torch.tensor([EXPERTS, *shape])
            tensors[f"{PREFIX}{family.fused}{name}{ending}"] = value
        weights[name] = _stack([stored.weight for stored in written])
    return Layer(tensors, **weights)


def router(kind: Kind) -> dict[str, torch.Tensor]:
    """Of Gemma 4."""
    torch.manual_seed(0)
    return {
        f"{PREFIX}router.proj.weight": torch.randn(EXPERTS, kind.hidden_size, dtype=torch.bfloat16),
        f"{PREFIX}router.scale": torch.rand(kind.hidden_size, dtype=torch.bfloat16),
        f"{PREFIX}router.per_expert_scale": torch.rand(EXPERTS, dtype=torch.bfloat16),
    }


def write(folder, kind: Kind, family: Family, layer: Layer, **quantization):
    """The files of a model with this one layer; ``quantization`` changes the quantization_config."""
    folder.mkdir(exist_ok=True)
    text = {
        "model_type": family.model_type,
        "hidden_size": kind.hidden_size,
        family.num_experts: EXPERTS,
        family.intermediate_size: kind.intermediate_size,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "silu",
        "top_k_experts": 2,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6,
    }
    config = {name: value for name, value in {**kind.config, **quantization}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps({"text_config": text, "quantization_config": config}))
    tensors = {**layer.tensors, **(router(kind) if family.model_type == "gemma4_text" else {})}
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


FUSED = [name for name, kind in KINDS.items() if kind.is_fused]
