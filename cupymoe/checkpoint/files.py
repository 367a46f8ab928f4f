"""Which file holds which key, and the files themselves: headers parsed, tensors mapped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint is not what it must be; the text names the key, the file, what was found and what is allowed."""


def key_files(path: PathLike) -> dict[str, Path]:
    """The file that holds each key: as the index says, or else as the headers of all files say."""
    path = Path(path)
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
    result: dict[str, Path] = {}
    for file in files:
        for key in header_keys(file):
            if key in result:
                raise CheckpointError(f"{file}: {key} is there twice: {result[key]} has it too")
            result[key] = file
    return result


def header_keys(file: Path) -> list[str]:
    """The keys of one safetensors file."""
    with open_file(file) as handle:
        return list(handle.keys())


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


def open_file(file: Path) -> Any:
    """A ``safetensors.safe_open``, which is a context manager."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("checkpoints are read with safetensors: pip install 'cupymoe[checkpoint]'") from error
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from error
