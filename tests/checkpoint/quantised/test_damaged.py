"""Files that are damaged in any one place are refused by name, whatever they are stored as; nothing half loads."""

import json
import re

import numpy as np
import pytest
import torch

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.quantised.layers import FAMILIES, FUSED, LAYER, PREFIX, Layer, fused, per_expert, write
from tests.checkpoint.quantised.stored import KINDS

GEMMA4 = FAMILIES["gemma4"]
OPTIONAL_OF_FUSED = ("input_scale", "input_global_scale", "_shape")


def cases():
    """(damage, kind, layout, key): each tensor of a down projection of each kind, damaged in every way."""
    for layout, names in ((per_expert, KINDS), (fused, FUSED)):
        for name in names:
            tensors = layout(KINDS[name], GEMMA4).tensors
            for key in tensors:
                if key.startswith((f"{PREFIX}experts.0.down_proj", f"{PREFIX}experts.down_proj")):
                    for how, is_damage in DAMAGES.items():
                        if is_damage(tensors[key], key):
                            yield how, name, layout.__name__, key


def _is_number(tensor, key):
    return tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _is_list(tensor, key):
    return tensor.ndim > 0 and tensor.numel() > 1 and not key.endswith("bitsandbytes__nf4")


DAMAGES = {
    "missing": lambda tensor, key: not key.endswith(OPTIONAL_OF_FUSED) or "experts.0." in key,
    "truncated": _is_list,
    "transposed": lambda tensor, key: tensor.ndim > 1 and tensor.shape[-1] != tensor.shape[-2],
    "doubled": _is_list,
    "another dtype": lambda tensor, key: True,
    "NaN": _is_number,
    "infinite": _is_number,
    "renamed": lambda tensor, key: True,
    "twice": lambda tensor, key: True,
}


def damage(how, tensors, key):
    tensor = tensors[key]
    if how == "missing":
        del tensors[key]
    elif how == "truncated":
        tensors[key] = tensor[..., :-1].contiguous()
    elif how == "transposed":
        tensors[key] = tensor.transpose(-1, -2).contiguous()
    elif how == "doubled":
        tensors[key] = torch.cat([tensor, tensor], -1)
    elif how == "another dtype":
        tensors[key] = tensor.float().double()
    elif how in ("NaN", "infinite"):
        tensors[key] = tensor.clone()
        tensors[key].view(-1)[-1] = float("nan" if how == "NaN" else "inf")
    elif how == "renamed":
        tensors[f"{key}s"] = tensors.pop(key)
    else:
        tensors[key.replace("experts.", "moe.experts.", 1)] = tensor.clone()


CASES = sorted(cases())


def test_they_are_many():
    assert len(CASES) > 400


@pytest.mark.parametrize(("name", "layout"), sorted({(name, layout) for _, name, layout, _ in CASES}))
def test_damaged_tensors(tmp_path, name, layout):
    kind = KINDS[name]
    whole = {"per_expert": per_expert, "fused": fused}[layout](kind, GEMMA4)
    for how, _, _, key in (case for case in CASES if case[1:3] == (name, layout)):
        layer = Layer(dict(whole.tensors), *whole[1:])
        damage(how, layer.tensors, key)
        path = write(tmp_path, kind, GEMMA4, layer)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load_layer(path, LAYER)
        text = str(caught.value)
        assert text.startswith(str(tmp_path)), (how, key)
        stem = key.rpartition("proj")[0] + "proj"
        if (how, name) == ("another dtype", "fp8 cut blocks"):  # a plain expert may mean that all are
            stem = "down_proj"
        assert stem.removeprefix(PREFIX) in text.replace(f"{PREFIX}moe.", PREFIX), (how, key, text)


SCALED = {
    "ct fp8 channel": ("weight_scale", -1.0),
    "ct fp8 block": ("weight_scale", -0.0),
    "fp8 tensor": ("weight_scale_inv", -1.0),
    "fp8 blocks": ("weight_scale_inv", -1e-3),
    "ct nvfp4": ("weight_scale", -1.0),
    "modelopt nvfp4": ("weight_scale", -0.0),
    "modelopt fp8": ("input_scale", -1.0),
}


@pytest.mark.parametrize("name", SCALED)
def test_scales_below_zero(tmp_path, name):
    tensor, value = SCALED[name]
    kind = KINDS[name]
    layer = per_expert(kind, GEMMA4)
    key = f"{PREFIX}experts.1.up_proj.{tensor}"
    layer.tensors[key].view(-1)[0] = value
    with pytest.raises(CheckpointError, match=re.escape(f"{key} must be finite and not negative, got {value}")):
        checkpoint.load_layer(write(tmp_path, kind, GEMMA4, layer), LAYER)


def single(name, ending, change):
    """A change of one tensor of expert 2."""
    layer = per_expert(KINDS[name], GEMMA4)
    key = f"{PREFIX}experts.2.gate_proj.{ending}"
    layer.tensors[key] = change(layer.tensors[key].clone())
    return KINDS[name], layer, key


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def state(**changes):
    def change(tensor):
        fields = {**json.loads(bytes(tensor.tolist())), **changes}
        return torch.from_numpy(np.frombuffer(json.dumps(fields).encode(), np.uint8).copy())

    return change


NAN = torch.tensor(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
VALUES = {
    "NaN code": ("ct fp8 channel", "weight", put((3, 5), NAN), "must have no code that is NaN, got 1 of 6144"),
    "NaN code of blocks": ("fp8 blocks", "weight", put((3, 5), NAN), "must have no code that is NaN"),
    "NaN e4m3 scale": ("ct nvfp4", "weight_scale", put((0, 0), NAN), "must be finite and not negative, got nan"),
    "NaN e8m0 scale": ("ct mxfp4", "weight_scale", put((1, 1), 255), "must be finite, got nan"),
    "a divisor of zero": ("ct nvfp4", "weight_global_scale", put(0, 0.0), "must be finite, got inf"),
    "a scale too large": (
        "ct int4 g32",
        "weight_scale",
        put((0, 0), 1000.0),
        "is of a weight whose scales must be at most 42.5 in magnitude in int4_g32, so that no weight is beyond 340",
    ),
    "another shape": ("ct int4 g32", "weight_shape", put(0, 63), "must be the weight's [64, 96], got 63"),
    "act-order": (
        "gptq",
        "g_idx",
        lambda tensor: tensor.flip(0),
        "must name the groups in their order, got an act-order",
    ),
    "not symmetric": ("gptq", "qzeros", put((0, 0), 0x77777776), "must be 8 where config.json says sym, got 7"),
    "a spoilt zero": ("gptq zero", "qzeros", put((0, 0), -1), "must be zero points up to 15, got 16"),
    "another table": ("nf4", "weight.quant_map", put(3, 0.5), "must be bitsandbytes' table of nf4"),
    "another block": (
        "nf4",
        "weight.quant_state.bitsandbytes__nf4",
        state(blocksize=128),
        "must say {'quant_type': 'nf4', 'blocksize': 64, 'shape': [64, 128]}, got",
    ),
    "another shape of nf4": ("nf4", "weight.quant_state.bitsandbytes__nf4", state(shape=[128, 64]), "must say {"),
    "no JSON": ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda tensor: tensor[1:].clone(), "must be JSON"),
    "no offset": (
        "nf4 nested",
        "weight.quant_state.bitsandbytes__nf4",
        state(nested_offset=None),
        "nested_offset, got None",
    ),
    "another dtype of one": (
        "ct int4 g32",
        "weight_scale",
        lambda tensor: tensor.half(),
        f"must have {PREFIX}experts.0.gate_proj.weight_scale's dtype BF16, got F16",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path, case):
    name, ending, change, message = VALUES[case]
    kind, layer, key = single(name, ending, change)
    with pytest.raises(CheckpointError, match=re.escape(f"{key} ") + ".*" + re.escape(message)):
        checkpoint.load_layer(write(tmp_path, kind, GEMMA4, layer), LAYER)


def test_an_act_order_that_config_does_not_name(tmp_path):
    kind = KINDS["ct int4 g32"]
    layer = per_expert(kind, GEMMA4)
    key = f"{PREFIX}experts.0.up_proj.weight_g_idx"
    layer.tensors[key] = torch.zeros(96, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=re.escape(f"{key} is left over: nothing of a layer with 4 experts q")):
        checkpoint.load_layer(write(tmp_path, kind, GEMMA4, layer), LAYER)


def test_load_into_writes_nothing_of_a_damaged_layer(tmp_path):
    kind = KINDS["ct int4 g32"]
    moe = checkpoint.load_layer(write(tmp_path, kind, GEMMA4, per_expert(kind, GEMMA4)), LAYER)
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    layer = per_expert(kind, GEMMA4, seed=1)
    layer.tensors[f"{PREFIX}experts.3.down_proj.weight_scale"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"experts.3.down_proj.weight_scale must be finite"):
        checkpoint.load_into(moe, write(tmp_path, kind, GEMMA4, layer), LAYER)
    assert all(torch.equal(before[name], tensor) for name, tensor in moe.state_dict().items())
