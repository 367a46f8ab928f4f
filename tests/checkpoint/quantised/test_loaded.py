"""Quantised layers are loaded to the bit, whatever they are stored as, and exported to the bytes of their files."""

import pytest
import torch
from safetensors.torch import save

from cupymoe import checkpoint
from cupymoe.weights import QuantizedWeight
from tests.checkpoint.quantised.layers import FAMILIES, LAYER, fused, per_expert, write
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
