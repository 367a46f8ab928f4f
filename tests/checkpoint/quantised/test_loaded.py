"""Quantised layers are loaded to the bit, whatever they are stored as, and exported to the bytes of their files."""

import pytest
import torch
from safetensors.torch import save

from cupymoe import Gemma4MoE, checkpoint, reference
from cupymoe.weights import QuantizedWeight
from tests.checkpoint.quantised.layers import EXPERTS, FAMILIES, LAYER, PREFIX, fused, per_expert, write
from tests.checkpoint.quantised.stored import KINDS

GEMMA4 = FAMILIES["gemma4"]


def load(path, family):
    if family.model_type == "gemma4_text":
        return checkpoint.load_layer(path, LAYER).experts
    return checkpoint.load_experts(path, LAYER)


def assert_is_layer(experts, kind, layer):
    for name, weight in layer.weights.items():
        loaded = getattr(experts, name)
        assert isinstance(loaded, QuantizedWeight)
        assert loaded.format.name == kind.format
        assert torch.equal(loaded.dequantize(torch.float64), weight), name


def assert_exports(experts, path, layer):
    exported = checkpoint.export_experts(experts, path, LAYER)
    assert exported.keys() == layer.tensors.keys()
    for key, tensor in layer.tensors.items():
        assert save({"": exported[key]}) == save({"": tensor.contiguous()}), key  # dtype, shape and bytes


OTHERS = [family for family in FAMILIES if family != "gemma4"]
EVERY = [*((name, "gemma4") for name in KINDS), *(("ct int4 g32 zero", family) for family in OTHERS)]


@pytest.mark.parametrize(("name", "family"), EVERY)
def test_per_expert(tmp_path, name, family):
    kind, family = KINDS[name], FAMILIES[family]
    layer = per_expert(kind, family)
    path = write(tmp_path, kind, family, layer)
    experts = load(path, family)
    assert_is_layer(experts, kind, layer)
    assert_exports(experts, path, layer)


@pytest.mark.parametrize(("name", "family"), [each for each in EVERY if KINDS[each[0]].is_fused])
@pytest.mark.parametrize("dotted", [False, True])
def test_fused(tmp_path, name, family, dotted):
    kind, family = KINDS[name], FAMILIES[family]
    layer = fused(kind, family, dotted=dotted)
    path = write(tmp_path, kind, family, layer)
    experts = load(path, family)
    assert_is_layer(experts, kind, layer)
    assert_exports(experts, path, layer)


@pytest.mark.parametrize("name", ["ct int4 g32 zero", "ct fp8 channel", "ct nvfp4", "ct mxfp4", "modelopt nvfp4"])
def test_per_expert_and_fused_agree(tmp_path, name):
    """The same weights in both spellings give the same buffers."""
    kind = KINDS[name]
    layer = per_expert(kind, GEMMA4)
    names = {key.partition("experts.0.down_proj.")[2] for key in layer.tensors if "experts.0.down_proj." in key}
    if "weight_scale_2" in names or "weight_global_scale" in names:  # one for gate and up together
        for expert in range(EXPERTS):
            scale = next(each for each in names if each in ("weight_scale_2", "weight_global_scale"))
            stem = f"{PREFIX}experts.{expert}."
            layer.tensors[f"{stem}up_proj.{scale}"] = layer.tensors[f"{stem}gate_proj.{scale}"].clone()
    stacked = {}
    for tensor in names:
        gate, up, down = (
            torch.stack([layer.tensors[f"{PREFIX}experts.{e}.{role}_proj.{tensor}"] for e in range(EXPERTS)])
            for role in ("gate", "up", "down")
        )
        is_of_rows = gate.ndim == 3
        gate_up = torch.cat([gate, up], 1) if is_of_rows else gate
        if tensor == "weight_shape":
            gate_up = torch.tensor([EXPERTS, 2 * kind.intermediate_size, kind.hidden_size])
            down = torch.tensor([EXPERTS, kind.hidden_size, kind.intermediate_size])
        stacked[f"{PREFIX}experts.gate_up_proj.{tensor}"] = gate_up
        stacked[f"{PREFIX}experts.down_proj.{tensor}"] = down
    one = load(write(tmp_path / "one", kind, GEMMA4, layer), GEMMA4).state_dict()
    whole = load(write(tmp_path / "all", kind, GEMMA4, layer._replace(tensors=stacked)), GEMMA4).state_dict()
    assert one.keys() == whole.keys()
    assert all_equal(one, whole)


@pytest.mark.parametrize(
    "name",
    [
        "ct int4 g32",
        "ct int4 g64 zero",
        "ct int8",
        "ct fp8 channel",
        "ct fp8 block",
        "ct nvfp4",
        "ct mxfp4",
        "awq",
        "nf4",
    ],
)
def test_gemma_4_s_depth(tmp_path, name):
    """704 is 5.5 times 128, 11 times 64, and no multiple of 128."""
    kind = KINDS[name]._replace(hidden_size=128, intermediate_size=704)
    layer = per_expert(kind, GEMMA4)
    path = write(tmp_path, kind, GEMMA4, layer)
    experts = load(path, GEMMA4)
    assert_is_layer(experts, kind, layer)
    assert_exports(experts, path, layer)


def all_equal(one, other):
    return save({key: value.contiguous() for key, value in one.items()}) == save(
        {key: value.contiguous() for key, value in other.items()}
    )


@pytest.mark.parametrize("name", KINDS)
def test_unpacked_on_the_device(tmp_path, name, device):
    """The same buffers, and the same bytes from an export, as on the CPU."""
    kind = KINDS[name]
    layer = per_expert(kind, GEMMA4)
    path = write(tmp_path, kind, GEMMA4, layer)
    moe = checkpoint.load_layer(path, LAYER, device=device)
    assert all(buffer.device.type == device.type for buffer in moe.buffers())
    assert all_equal(moe.experts.cpu().state_dict(), load(path, GEMMA4).state_dict())
    moe = checkpoint.load_layer(path, LAYER, device=device)
    checkpoint.load_into(moe, path, LAYER)
    assert_exports(moe.experts, path, layer)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_exported_is_imported_again(tmp_path, name):
    kind = KINDS[name]
    layer = per_expert(kind, GEMMA4)
    path = write(tmp_path / "first", kind, GEMMA4, layer)
    experts = load(path, GEMMA4)
    exported = checkpoint.export_experts(experts, path, LAYER)
    again = load(write(tmp_path / "again", kind, GEMMA4, layer._replace(tensors=exported)), GEMMA4)
    assert all_equal(experts.state_dict(), again.state_dict())


@pytest.mark.parametrize("name", ["ct int4 g64 zero", "fp8 cut blocks", "ct mxfp4", "nf4 nested"])
def test_load_into(tmp_path, name):
    """Another layer into the memory of the first."""
    kind = KINDS[name]
    moe = checkpoint.load_layer(write(tmp_path, kind, GEMMA4, per_expert(kind, GEMMA4)), LAYER)
    addresses = [buffer.data_ptr() for buffer in moe.buffers()]
    other = per_expert(kind, GEMMA4, seed=1)
    checkpoint.load_into(moe, write(tmp_path, kind, GEMMA4, other), LAYER)
    assert_is_layer(moe.experts, kind, other)
    assert [buffer.data_ptr() for buffer in moe.buffers()] == addresses


def test_load_into_asks_for_the_same_format(tmp_path):
    int4, fp8 = KINDS["ct int4 g32"], KINDS["ct fp8 channel"]
    moe = checkpoint.load_layer(write(tmp_path, int4, GEMMA4, per_expert(int4, GEMMA4)), LAYER)
    path = write(tmp_path, fp8, GEMMA4, per_expert(fp8, GEMMA4))
    with pytest.raises(ValueError, match=r"experts.\w+_proj must be fp8 with codes torch.uint8 .*, got int4_g32 with"):
        checkpoint.load_into(moe, path, LAYER)
    with pytest.raises(ValueError, match=r"experts.\w+_proj must be quantised as fp8, like the checkpoint"):
        checkpoint.load_into(Gemma4MoE(moe.config).bfloat16(), path, LAYER)
    loaded = checkpoint.load_layer(path, LAYER)
    loaded.experts.down_proj.to("meta")
    with pytest.raises(ValueError, match=r"experts.down_proj must not be on the meta device"):
        checkpoint.load_into(loaded, path, LAYER)


def test_export_asks_for_the_same_format(tmp_path):
    int4, fp8 = KINDS["ct int4 g32"], KINDS["ct fp8 channel"]
    experts = load(write(tmp_path, int4, GEMMA4, per_expert(int4, GEMMA4)), GEMMA4)
    path = write(tmp_path, fp8, GEMMA4, per_expert(fp8, GEMMA4))
    with pytest.raises(ValueError, match=r"experts.\w+ must be fp8, as .* has it, got int4_g32"):
        checkpoint.export_experts(experts, path, LAYER)
    with pytest.raises(ValueError, match=r"experts.\w+ must be compressed-tensors float-quantized .*, got NoneType"):
        checkpoint.export_experts(torch.nn.Linear(1, 1), path, LAYER)


def test_scales_of_rows_do_not_fit_one_of_a_tensor(tmp_path):
    channel, tensor = KINDS["ct fp8 channel"], KINDS["ct fp8 tensor"]
    experts = load(write(tmp_path, channel, GEMMA4, per_expert(channel, GEMMA4)), GEMMA4)
    path = write(tmp_path, tensor, GEMMA4, per_expert(tensor, GEMMA4))
    with pytest.raises(ValueError, match=r"_proj, expert 0: .* can't hold the row_scales of this weight"):
        checkpoint.export_experts(experts, path, LAYER)


def test_loaded_experts_compute(tmp_path):
    kind, family = KINDS["ct int4 g32"], FAMILIES["qwen3"]
    layer = per_expert(kind, family)
    experts = load(write(tmp_path, kind, family, layer), family)
    states = torch.randn(5, kind.hidden_size, dtype=torch.float64)
    index = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [-1, 2]])
    weights = torch.rand(5, 2, dtype=torch.float64)
    expected = reference.experts(states, layer.gate_up_proj, layer.down_proj, index, weights, experts.activation)
    torch.testing.assert_close(experts(states, index, weights), expected)
