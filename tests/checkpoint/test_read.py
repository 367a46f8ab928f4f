"""What is read: the asked layer, each tensor once, mapped."""

import json
import sys
from collections import Counter

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.helpers import (
    CONFIG,
    LAYERS,
    LAYOUTS,
    PREFIX,
    assert_is_layer,
    make_moe,
    tensors_of,
    write,
    write_shards,
)


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
