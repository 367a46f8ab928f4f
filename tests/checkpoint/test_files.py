"""Files that are not what they say."""

import json
import os
import re
import sys

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
    assert_is_layer,
    make_moe,
    tensors_of,
    write,
    write_shards,
)


def edit_index(folder, edit):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content["weight_map"])
    index.write_text(json.dumps(content))


def test_index_and_headers_must_agree(tmp_path):
    key = f"{PREFIX}3.{DOWN}"
    path = write_shards(tmp_path, tensors_of())
    edit_index(path, lambda weight_map: weight_map.update({key: weight_map[f"{PREFIX}3.{GATE_UP}"]}))
    with pytest.raises(CheckpointError, match=rf"{key} is (missing|left over)"):
        checkpoint.load_layer(path, 3)


@pytest.mark.parametrize("name", ["down_proj_scale", "down_proj_bias"])
def test_a_key_that_the_index_does_not_list(tmp_path, name):
    key = f"{PREFIX}3.experts.{name}"
    path = write_shards(tmp_path, {**tensors_of(), key: torch.ones(1)})
    edit_index(path, lambda weight_map: weight_map.pop(key))
    with pytest.raises(CheckpointError, match=rf"{name} is left over: the index .* does not list it"):
        checkpoint.load_layer(path, 3)


def test_an_index_that_lists_every_key(tmp_path):
    checkpoint.check_index(write_shards(tmp_path, tensors_of()))
    save_file({"unrelated": torch.ones(1)}, tmp_path / "more.safetensors")
    checkpoint.check_index(tmp_path)
    assert checkpoint.layers(tmp_path) == LAYERS


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda weight_map: [weight_map.pop(key) for key in list(weight_map) if f"{PREFIX}3." in key],
            rf"got 5 differences: {PREFIX}3.experts.down_proj is in model-\S+, where the index does not list it; ",
        ),
        (
            lambda weight_map: weight_map.update({f"{PREFIX}4.router.scale": weight_map[f"{PREFIX}3.router.scale"]}),
            rf"got 1 differences: {PREFIX}4.router.scale is not in model-\S+, where the index lists it",
        ),
    ],
    ids=["a layer unlisted", "a key too many"],
)
@pytest.mark.parametrize("named", ["", "model.safetensors.index.json"], ids=["folder", "index"])
def test_an_index_and_the_files_of_its_folder_must_agree(tmp_path, edit, message, named):
    path = write_shards(tmp_path, tensors_of())
    edit_index(path, edit)
    with pytest.raises(CheckpointError, match=rf"index.json: the index must list what its files hold, {message}"):
        checkpoint.check_index(path / named)


def test_a_single_file_beside_the_index_that_is_named(tmp_path):
    path = write_shards(tmp_path, tensors_of())
    write(path, tensors_of())
    checkpoint.check_index(path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="are both there; give the one that is meant"):
        checkpoint.check_index(path)


def test_a_shard_that_is_named_has_no_index_to_agree_with(tmp_path):
    checkpoint.check_index(write_shards(tmp_path, tensors_of()) / "model-00001-of-00003.safetensors")


@pytest.mark.parametrize("name", ["shards/model.safetensors", "größe.safetensors"])
def test_an_index_names_its_files_as_it_likes(tmp_path, name):
    tensors = tensors_of()
    (tmp_path / name).parent.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / name)
    content = json.dumps({"weight_map": dict.fromkeys(tensors, name)}, ensure_ascii=False)
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    checkpoint.check_index(tmp_path)
    assert_is_layer(checkpoint.load_layer(tmp_path, 3, CONFIG), 3)


def test_json_that_nests_too_deep(tmp_path):
    write(tmp_path, tensors_of())
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config.json: not a readable JSON file"):
        checkpoint.read_config(tmp_path)


def test_a_file_of_experts_that_the_index_does_not_name(tmp_path):
    path = write_shards(tmp_path, tensors_of())
    save_file({f"{PREFIX}3.{DOWN}": torch.ones(1)}, path / "more.safetensors")
    with pytest.raises(CheckpointError, match=rf"{PREFIX}3.{DOWN} is in more.safetensors, where the index does not"):
        checkpoint.check_index(path)


def test_a_json_file_that_is_no_index(tmp_path):
    write(tmp_path, tensors_of())
    with pytest.raises(CheckpointError, match=r"config.json: a .json path must be an index: weight_map must be"):
        checkpoint.layers(tmp_path / "config.json")


def test_a_key_in_two_files_of_a_folder(tmp_path):
    path = write(tmp_path, tensors_of())
    save_file({f"{PREFIX}3.{DOWN}": torch.ones(1)}, path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more.safetensors: .*3.experts.down_proj is there twice: .*model"):
        checkpoint.load_layer(path, 3)


def test_a_file_beside_an_index(tmp_path):
    write_shards(tmp_path, tensors_of())
    save_file(tensors_of(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="are both there; give the one that is meant"):
        checkpoint.layers(tmp_path)
    assert checkpoint.layers(tmp_path / "model.safetensors") == LAYERS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "not a readable safetensors file"),
        ("model.safetensors", "", "not a readable safetensors file"),
        ("model.safetensors.index.json", "{", "not a readable JSON file"),
        ("model.safetensors.index.json", "[]", "must be a JSON object, got list"),
        ("model.safetensors.index.json", "{}", "weight_map must be an object that maps keys to file names, got None"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "weight_map must be an object"),
        ("pytorch_model.bin", "", "neither model.safetensors.index.json nor a .safetensors file is there"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.layers(tmp_path)


OF_A_PATH = {
    "layers": checkpoint.layers,
    "read_config": checkpoint.read_config,
    "num_hidden_layers": checkpoint.num_hidden_layers,
    "check_index": checkpoint.check_index,
    "load_layer": lambda path: checkpoint.load_layer(path, 0),
    "load_layer with a config": lambda path: checkpoint.load_layer(path, 0, CONFIG),
    "load_experts": lambda path: checkpoint.load_experts(path, 0),
    "load_into": lambda path: checkpoint.load_into(make_moe(0), path, 0),
}


@pytest.fixture(params=OF_A_PATH)
def of_a_path(request):
    """Every public function that is given a path."""
    return OF_A_PATH[request.param]


NOTHING = "a checkpoint must be a file or a folder on disk, and none is there"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "folder", "a/b/c", "\0", "x" * 300]
)
def test_a_path_that_is_not_there(tmp_path, of_a_path, name):
    path = tmp_path / name
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{path}: {NOTHING}')}$"):
        of_a_path(path)


@pytest.mark.parametrize("name", ["", "gemma", "./google/gemma", "a/b/c", "shards/model.safetensors"])
def test_a_relative_path_that_is_not_there(tmp_path, monkeypatch, of_a_path, name):
    """An empty one does not mean the working folder, whose checkpoint nobody named."""
    monkeypatch.chdir(write(tmp_path, tensors_of()))
    message = f"{name or 'an empty path'}: {NOTHING}"
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        of_a_path(name)


def test_a_hub_id_is_not_downloaded(tmp_path, monkeypatch, of_a_path):
    monkeypatch.chdir(tmp_path)
    name = "google/gemma-4-26B-A4B-it"
    advice = f"cupymoe downloads nothing: huggingface_hub.snapshot_download('{name}') gives a model's folder"
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{name}: {NOTHING}; {advice}')}$"):
        of_a_path(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_path_that_is_neither_a_file_nor_a_folder(tmp_path, of_a_path):
    """Opening a pipe would wait for somebody to write to it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=f"pipe: {NOTHING}"):
        of_a_path(tmp_path / "pipe")


@pytest.mark.parametrize("path", [None, 3, b"model.safetensors", ["model.safetensors"]], ids=str)
def test_what_is_no_path(of_a_path, path):
    message = f"path must be a str or an os.PathLike that leads to a checkpoint, got {path!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        of_a_path(path)


@pytest.mark.parametrize("function", ["layers", "check_index", "load_layer", "load_layer with a config", "load_into"])
def test_a_folder_without_a_checkpoint(tmp_path, function):
    with pytest.raises(CheckpointError, match=r"neither model.safetensors.index.json nor a .safetensors file is there"):
        OF_A_PATH[function](tmp_path)


@pytest.mark.parametrize("function", ["layers", "check_index", "load_layer", "load_layer with a config", "load_into"])
def test_a_file_of_another_kind(tmp_path, function):
    torch.save({f"{PREFIX}0.{DOWN}": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: not a readable safetensors file"):
        OF_A_PATH[function](tmp_path / "pytorch_model.bin")


def test_a_safetensors_file_may_have_any_name(tmp_path):
    """Those of huggingface_hub's cache are named after their hash."""
    write(tmp_path, tensors_of())
    (tmp_path / "model.safetensors").rename(tmp_path / "7c2f")
    assert_is_layer(checkpoint.load_layer(tmp_path / "7c2f", 3), 3)


def test_without_safetensors(tmp_path, monkeypatch):
    path = write(tmp_path, tensors_of())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'cupymoe\[checkpoint\]'"):
        checkpoint.load_layer(path, 0)
