"""Quantised experts for the tests in vLLM: checkpoints, and vLLM's layers that its own loader fills from them.

A layer is vLLM's ``RoutedExperts``, which needs no accelerator. Checkpoints are those of the tests of
``cupymoe.checkpoint``: written number by number, with the weights that they stand for in float64.
"""

import importlib
import pkgutil
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe

from cupymoe import MoEActivation, reference
from tests.checkpoint.quantised import stored as written
from tests.helpers import random_routing
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import applied

E, H, I, K = 4, 256, 128, 2  # experts, hidden and intermediate size, experts of a token  # noqa: E741
NAME = "model.layers.0.mlp.experts"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def compressed(format, weights, activations=None):
    """A config.json's quantization_config, of compressed-tensors."""
    group = {"targets": ["Linear"], "format": format, "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": [],
        "config_groups": {"group_0": group},
    }


def int4(group_size, symmetric=True, **settings):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": symmetric}
    return compressed("pack-quantized", {**weights, **settings})


def floats(strategy, **activations):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    of_tokens = {"num_bits": 8, "type": "float", "strategy": {"channel": "token"}.get(strategy, "tensor")}
    return compressed("float-quantized", weights, {**of_tokens, "dynamic": True, "symmetric": True, **activations})


def fp8(blocks=None, scheme="dynamic"):
    return {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": blocks}


class Kind(NamedTuple):
    """Of a checkpoint: its config, who writes one of its weights, and the format that this is in."""

    config: dict
    write: object
    format: str


KINDS = {
    "int4 g32": Kind(int4(32), written.pack_quantized(32), "int4_g32"),
    "int4 g64": Kind(int4(64), written.pack_quantized(64), "int4_g64"),
    "int4 g128": Kind(int4(128), written.pack_quantized(128), "int4_g128"),
    "int4 g32 zero": Kind(int4(32, symmetric=False), written.pack_quantized(32, zeros=True), "int4_g32_zero"),
    "int4 g32 static order": Kind(int4(32, actorder="static"), written.pack_quantized(32), "int4_g32"),
    "int8": Kind(
        compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
        written.packed_int8,
        "int8",
    ),
    "ct fp8 channel": Kind(floats("channel"), written.fp8("channel"), "fp8"),
    "ct fp8 tensor": Kind(floats("tensor"), written.fp8("tensor"), "fp8"),
    "ct fp8 tensor static": Kind(
        floats("tensor", dynamic=False), written.fp8("tensor", activation="input_scale"), "fp8"
    ),
    "ct fp8 block": Kind(floats("block"), written.fp8("block"), "fp8_g128"),
    "fp8 tensor": Kind(fp8(), written.fp8("tensor", scalar_shape=()), "fp8"),
    "fp8 tensor static": Kind(
        fp8(scheme="static"), written.fp8("tensor", scalar_shape=(), activation="input_scale"), "fp8"
    ),
    "fp8 block": Kind(fp8([128, 128]), written.fp8("block", scale_name="weight_scale_inv"), "fp8_g128"),
}
OF_INT4 = [name for name, kind in KINDS.items() if kind.format.startswith("int4")]


class Checkpoint(NamedTuple):
    tensors: dict
    """By name, as a layer's part of a file has them."""
    gate_up: torch.Tensor
    """``[E, 2I, H]`` float64"""
    down: torch.Tensor


def checkpoint(kind, seed=0, intermediate=I):
    rng = np.random.default_rng(seed)
    tensors, weights = {}, {"gate_proj": [], "up_proj": [], "down_proj": []}
    for expert in range(E):
        for projection, each in weights.items():
            n, k = (H, intermediate) if projection == "down_proj" else (intermediate, H)
            of_one = KINDS[kind].write(rng, n, k)
            each.append(torch.from_numpy(of_one.weight))
            tensors |= {f"{expert}.{projection}.{name}": tensor for name, tensor in of_one.tensors.items()}
    gate, up, down = (torch.stack(each) for each in weights.values())
    return Checkpoint(tensors, torch.cat((gate, up), dim=1), down)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    """vLLM's choice of a backend of its own, which there is none of on this machine: Marlin, unless set otherwise."""
    chosen = SimpleNamespace(fp8=Fp8MoeBackend.MARLIN)
    replacements = {
        "select_fp8_moe_backend": lambda *_, **__: (chosen.fp8, modular_kernel.FusedMoEExpertsModular),
        "select_wna16_moe_backend": lambda *_, **__: (WNA16MoEBackend.MARLIN, modular_kernel.FusedMoEExpertsModular),
        "check_moe_marlin_supports_config": lambda *_, **__: True,
        "check_moe_marlin_supports_layer": lambda *_, **__: True,
    }
    names = [name for _, name, _ in pkgutil.iter_modules(compressed_tensors_moe.__path__)]
    kinds = [name for name in names if "_wna16" in name or "_w8a8_fp8" in name or name == "compressed_tensors_moe"]
    modules = [importlib.import_module(f"{compressed_tensors_moe.__name__}.{name}") for name in kinds]
    for module in (vllm_fp8, *modules):
        for name, replacement in replacements.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    return chosen


@pytest.fixture
def served_here(registered, backend):
    """The plug-in, in a vLLM that would take Marlin."""


def moe_config(**changes):
    sizes = {"num_experts": E, "num_local_experts": E, "num_logical_experts": E, "hidden_dim": H}
    return vllm_layers.moe_config(**{**sizes, "intermediate_size": I, "experts_per_token": K, **changes})


def config_of(settings):
    return quantization.get_quantization_config(settings["quant_method"]).from_config(settings)


def new_layer(settings, placement="linear", **changes):
    """vLLM's layer, with the parameters of a checkpoint in it."""
    moe = moe_config(**changes)
    experts = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=K,
        global_num_experts=moe.num_experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=moe.moe_parallel_config,
        placement_strategy=placement,
        enable_eplb=False,
    )
    with torch.device(moe.device):
        return RoutedExperts(NAME, moe.in_dtype, moe, config_of(settings), experts)


def load(layer, tensors):
    """Give vLLM's loader the tensors by their names in a file."""
    return list(layer.load_weights(iter(tensors.items())))


def loaded(kind, file=None, placement="linear", **changes):
    """A layer that is ready to be called."""
    file = file or checkpoint(kind)
    layer = new_layer(KINDS[kind].config, placement, **changes)
    load(layer, file.tensors)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


class Tokens(NamedTuple):
    hidden_states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def random_tokens(count=16, dtype=torch.float32, device="cpu"):
    weights, index = random_routing(count, E, K, "cpu")
    return Tokens(*(each.to(device) for each in (torch.randn(count, H, dtype=dtype), index, weights)))


def called(layer, tokens):
    return applied(layer.quant_method, layer, *tokens)


def truth(file, tokens, activation=MoEActivation.GELU_TANH):
    device = tokens.hidden_states.device
    weights = file.gate_up.to(device), file.down.to(device)
    return reference.experts(tokens.hidden_states.double(), *weights, tokens.index, tokens.weights, activation)
