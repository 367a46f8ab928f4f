"""config.json: read whole, nothing filled in."""

import dataclasses

import pytest

from cupymoe import checkpoint
from cupymoe.checkpoint import CheckpointError
from tests.checkpoint.helpers import CONFIG, tensors_of, write, write_config


@pytest.mark.parametrize("nested", [True, False], ids=["text_config", "flat"])
def test_config_is_read(tmp_path, nested):
    write_config(tmp_path, nested, hidden_activation="silu", rms_norm_eps=1e-5)
    expected = dataclasses.replace(CONFIG, hidden_activation="silu", rms_norm_eps=1e-5)
    assert checkpoint.read_config(tmp_path) == expected
    (tmp_path / "model.safetensors.index.json").touch()
    assert checkpoint.read_config(tmp_path / "model.safetensors.index.json") == expected


@pytest.mark.parametrize("nested", [True, False], ids=["text_config", "flat"])
@pytest.mark.parametrize("name", dataclasses.asdict(CONFIG))
def test_config_fills_nothing_in(tmp_path, nested, name):
    write_config(tmp_path, nested, **{name: ...})
    with pytest.raises(CheckpointError, match=rf"config.json: {name} must be there, (since it has|with) no default"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, r"config.json: num_experts must be a positive integer, got None"),
        ({"num_experts": True}, r"config.json: num_experts must be a positive integer, got True"),
        ({"rms_norm_eps": None}, r"config.json: rms_norm_eps must be a finite number, at least 0, got None"),
        ({"hidden_activation": "quick_gelu"}, r"config.json: Unknown MoE activation: 'quick_gelu'"),
        ({"hidden_activation": ["gelu"]}, r"config.json: hidden_activation must be a string, got \['gelu'\]"),
    ],
)
def test_config_is_validated(tmp_path, changes, message):
    write_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("nested", [True, False], ids=["text_config", "flat"])
def test_the_number_of_layers_is_read(tmp_path, nested):
    write_config(tmp_path, nested)
    assert checkpoint.num_hidden_layers(tmp_path) is None
    write_config(tmp_path, nested, num_hidden_layers=30)
    (tmp_path / "model.safetensors").touch()
    assert checkpoint.num_hidden_layers(tmp_path / "model.safetensors") == 30


@pytest.mark.parametrize("count", ["30", 0, 2.5, True])
def test_the_number_of_layers_is_validated(tmp_path, count):
    write_config(tmp_path, num_hidden_layers=count)
    with pytest.raises(CheckpointError, match=rf"num_hidden_layers must be a positive integer, got {count!r}"):
        checkpoint.num_hidden_layers(tmp_path)


def test_config_of_another_shape(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": null}')
    with pytest.raises(CheckpointError, match="an object text_config must be there"):
        checkpoint.read_config(tmp_path)


def test_a_given_config_is_taken(tmp_path):
    path = write(tmp_path, tensors_of())
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: not a readable JSON file"):
        checkpoint.load_layer(path, 0)
    config = dataclasses.replace(CONFIG, hidden_activation="gelu")
    assert checkpoint.load_layer(path, 0, config, backend="reference").experts.backend == "reference"
    assert checkpoint.load_layer(path, 0, config).config == config
