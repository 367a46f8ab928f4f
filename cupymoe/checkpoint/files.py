"""Which file holds which key, and the files themselves: headers parsed, tensors mapped."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cupymoe.checkpoint import gguf
from cupymoe.checkpoint.errors import CheckpointError

PathLike = str | os.PathLike[str]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""Of unquantised tensors, in the words of safetensors."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SPLIT = re.compile(r"(?P<name>.+)-[0-9]{5}-of-(?P<count>[0-9]{5})\.gguf")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/(?!.*\.(?:safetensors|json)$)[A-Za-z0-9][\w.-]*")


def on_disk(path: PathLike) -> Path:
    """The path that a caller gave, once it is seen to be a file or a folder.

    Raises:
        CheckpointError: neither is there.
        TypeError: ``path`` is neither a str nor an ``os.PathLike``.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or an os.PathLike that leads to a checkpoint, got {path!r}")
    text = os.fspath(path)
    if text and (os.path.isfile(text) or os.path.isdir(text)):
        return Path(text)
    name = text or "an empty path"  # which Path would take for the working folder
    advice = ""
    if _HUB_ID.fullmatch(text):
        advice = f"; cupymoe downloads nothing: huggingface_hub.snapshot_download({text!r}) gives a model's folder"
    raise CheckpointError(f"{name}: a checkpoint must be a file or a folder on disk, and none is there{advice}")


def key_files(path: PathLike) -> dict[str, Path]:
    """The file that holds each key: as the index says, or else as the headers of all files say."""
    path = on_disk(path)
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if (path / INDEX).exists():
            if path / SINGLE in files:
                raise CheckpointError(f"{path}: {SINGLE} and {INDEX} are both there; give the one that is meant")
            path = path / INDEX
        elif not files:
            raise CheckpointError(f"{path}: neither {INDEX} nor a .safetensors file is there")
    if path.suffix == ".json":
        return _weight_map(path)
    if path.suffix == gguf.SUFFIX:
        files = _splits(path)
    result: dict[str, Path] = {}
    for file in files:
        for key in header_keys(file):
            if key in result:
                raise CheckpointError(f"{file}: {key} is there twice: {result[key]} has it too")
            result[key] = file
    return result


def _splits(path: Path) -> list[Path]:
    """A GGUF file and those that it was split into, which are named by their number and how many they are."""
    parts = _SPLIT.fullmatch(path.name)
    if parts is None:
        return [path]
    count = int(parts["count"])
    files = [path.with_name(f"{parts['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: the file is missing; {path} is one of {count} parts")
    return files


def header_keys(file: Path) -> list[str]:
    """The keys of one safetensors file."""
    with open_file(file) as handle:
        return list(handle.keys())


class Header(NamedTuple):
    """What a file says of one of its tensors."""

    file: Path
    dtype: str
    """In the words of safetensors."""
    shape: tuple[int, ...]


def read_headers(path: PathLike, files: Mapping[str, Path]) -> dict[str, Header]:
    """Dtype and shape of every key.

    Args:
        path: what messages call the checkpoint.
        files: the file of each key of the checkpoint.

    Raises:
        CheckpointError: a file lacks a key or has one that ``files`` does not say it has, or can't be read.
    """
    result: dict[str, Header] = {}
    for file in sorted({*files.values()}):
        with open_file(file) as handle:
            for key in list(handle.keys()):
                if files.get(key) != file:
                    raise CheckpointError(f"{file}: {key} is left over: the index {path} does not list it")
                header = handle.get_slice(key)
                result[key] = Header(file, header.get_dtype(), (*header.get_shape(),))
    for key, file in files.items():
        if key not in result:
            raise CheckpointError(f"{file}: {key} is missing: the index {path} lists it")
    return result


def _weight_map(index: Path) -> dict[str, Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(
            f"{index}: a .json path must be an index: weight_map must be an object that maps keys to file names, got "
            f"{weight_map!r}"
        )
    return {key: index.parent / name for key, name in weight_map.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: must be a JSON object, got {type(content).__name__}")
    return content


def config_file(path: PathLike) -> Path:
    """Where the ``config.json`` beside the checkpoint is, if there is one."""
    path = on_disk(path)
    return (path if path.is_dir() else path.parent) / "config.json"


def read_fields(path: PathLike) -> tuple[Path, dict[str, Any]]:
    """The ``config.json`` beside the checkpoint, and what it says of the text model."""
    file = config_file(path)
    given = read_json(file)
    given = given.get("text_config", given)
    if not isinstance(given, dict):
        raise CheckpointError(f"{file}: an object text_config must be there, with no default; got {given}")
    return file, given


def open_file(file: Path) -> Any:
    """A ``safetensors.safe_open``, or a GGUF file as one: a context manager."""
    if file.suffix == gguf.SUFFIX:
        return gguf.GgufFile(file)
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("checkpoints are read with safetensors: pip install 'cupymoe[checkpoint]'") from error
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error


def read_tensor(file: Path, handle: Any, key: str) -> torch.Tensor:
    """A tensor of an open file, on the CPU and mapped to the file: its bytes are read when they are used."""
    unreadable: tuple[type[Exception], ...] = (OSError, RuntimeError)  # torch raises the latter where it can't map
    if file.suffix != gguf.SUFFIX:
        from safetensors import SafetensorError

        unreadable += (SafetensorError,)
    try:
        tensor: torch.Tensor = handle.get_tensor(key)
    except unreadable as error:
        raise CheckpointError(f"{file}: {key} can't be read: {error}") from error
    return tensor
