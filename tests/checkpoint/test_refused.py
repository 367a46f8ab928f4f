"""What is refused: every key that is missing, left over or misshapen, by name."""

import dataclasses
import re

import pytest
import torch
from safetensors.torch import save_file

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.helpers import (
    CONFIG,
    DOWN,
    GATE_UP,
    LAYERS,
    PREFIX,
    E,
    H,
    I,
    assert_is_layer,
    fused,
    make_moe,
    older,
    per_expert,
    per_expert_behind_moe,
    tensors_of,
    with_,
    without,
    write,
    write_shards,
)


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
    "missing experts": (
        fused,
        without(GATE_UP, DOWN),
        f"is missing (2 of 5 keys are: ['{PREFIX}3.experts.gate_up_proj', '{PREFIX}3.experts.down_proj'])",
    ),
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
        "are both router.per_expert_scale; one is allowed",
    ),
    "experts twice": (fused, with_("moe.down_proj", torch.ones(E, H, I)), "are both experts.down_proj; one is allowed"),
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
    with pytest.raises(CheckpointError, match=r"layers.3.router.scale and .* are both router.scale; one is allowed"):
        checkpoint.load_layer(write(tmp_path, tensors), 3)


def test_a_layer_of_two_prefixes(tmp_path):
    tensors = tensors_of()
    tensors["model.layers.3.router.scale"] = tensors.pop(f"{PREFIX}3.router.scale")
    with pytest.raises(CheckpointError, match=r"3.* and model.layers.3.router.scale are two prefixes of a layer"):
        checkpoint.load_layer(write(tmp_path, tensors), 3)


@pytest.mark.parametrize(
    "key",
    [
        "language_model.language_model.model.layers.3.router.scale",
        "model.model.layers.3.router.scale",
        f"{PREFIX}3.mlp.experts.gate_up_proj",
        f"{PREFIX}3.feed_forward.router.weight",
        f"{PREFIX}3.experts",
        "lm.layers.3.experts.down_proj",
        "model.vision_tower.encoder.layers.3.moe.gate_up_proj",
        f"{PREFIX}03.experts.down_proj",
    ],
)
def test_another_spelling_is_left_over(tmp_path, key):
    """Passing over experts whose name is not known is how serving stacks came to answer with padding."""
    path = write(tmp_path, {**tensors_of(), key: torch.ones(1)})
    with pytest.raises(CheckpointError, match=rf"safetensors: {key} is left over: .* are read from \[model.\]"):
        checkpoint.load_layer(path, 3)
    assert checkpoint.layers(path) == LAYERS
    assert_is_layer(checkpoint.load_layer(path, 0), 0)


def test_a_layer_that_is_not_there(tmp_path):
    message = r"no key \[model.\]\[language_model.\]layers.4.\{router,experts,moe\}.\* is there; .* are \[0, 3, 11\]"
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
