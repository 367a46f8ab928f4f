"""Gemma 4 MoE layers out of safetensors checkpoints: memory-mapped, one layer at a time, and strict.

A path is a ``.safetensors`` file, a ``model.safetensors.index.json``, or a folder with either, on this machine: nothing
is downloaded. Every function here raises a :class:`CheckpointError` for a path where there is neither a file nor a
folder, and a TypeError for what is neither a str nor an ``os.PathLike``.

The keys of layer N start with ``[model.][language_model.]layers.N.`` or ``language_model.model.layers.N.``, all alike;
then come ``router.proj.weight``, ``router.scale``, ``router.per_expert_scale`` (or ``moe.per_expert_scale``), and the
experts in exactly one layout:

- fused: ``experts.gate_up_proj`` [E, 2I, H] and ``experts.down_proj`` [E, H, I]; older: ``moe.`` for ``experts.``
- per expert: ``experts.<id>.{gate,up,down}_proj.weight`` [I, H], [I, H], [H, I]; or behind ``moe.``

Every key of a layer with a part ``router``, ``experts`` or ``moe`` is accounted for in the files' headers before the
first tensor is read. Whatever is missing, left over, misshapen or quantised is a :class:`CheckpointError` that names
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cupymoe.checkpoint.files import (
    INDEX,
    SINGLE,
    CheckpointError,
    PathLike,
    header_keys,
    key_files,
    on_disk,
    open_file,
    read_json,
    read_tensor,
)
from cupymoe.checkpoint.layout import Found, Slot, layer_of, match, skeleton
from cupymoe.config import Gemma4MoEConfig
from cupymoe.modules import Gemma4MoE
from cupymoe.parameters import check_writable

__all__ = ["CheckpointError", "check_index", "layers", "load_into", "load_layer", "num_hidden_layers", "read_config"]

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def layers(path: PathLike) -> tuple[int, ...]:
    """Numbers of the layers that have a key with a part ``router``, ``experts`` or ``moe``, in rising order.

    Raises:
        CheckpointError: there is no checkpoint at ``path``, or one of its files can't be read.
        ImportError: safetensors is not installed.
    """
    return tuple(sorted({layer for layer in map(layer_of, key_files(path)) if layer is not None}))


def read_config(path: PathLike) -> Gemma4MoEConfig:
    """Sizes and activation out of the ``config.json`` beside the checkpoint, flat or under ``text_config``.

    Every field of :class:`cupymoe.Gemma4MoEConfig` must be in it, ``hidden_activation`` too: nothing is filled in.

    Raises:
        CheckpointError: the file is not there or not JSON, or a field is missing or not valid.
    """
    file, given = _read_fields(path)
    names = Gemma4MoEConfig.__dataclass_fields__
    if missing := [name for name in names if name not in given]:
        raise CheckpointError(f"{file}: {', '.join(missing)} must be there and is not assumed; got {given}")
    try:
        return Gemma4MoEConfig(**{name: given[name] for name in names})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def num_hidden_layers(path: PathLike) -> int | None:
    """How many layers ``config.json`` says that there are; None if it doesn't say.

    Raises:
        CheckpointError: the file is not there or not JSON, or the number is not a positive integer.
    """
    file, given = _read_fields(path)
    count = given.get("num_hidden_layers")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise CheckpointError(f"{file}: num_hidden_layers must be a positive integer, got {count!r}")
    return count


def _read_fields(path: PathLike) -> tuple[Path, dict[str, Any]]:
    """The ``config.json`` beside the checkpoint, and what it says of the text model."""
    path = on_disk(path)
    file = (path if path.is_dir() else path.parent) / "config.json"
    given = read_json(file)
    given = given.get("text_config", given)
    if not isinstance(given, dict):
        raise CheckpointError(f"{file}: an object text_config must be there and is not assumed; got {given}")
    return file, given


def check_index(path: PathLike) -> None:
    """See that an index, given or a folder's own, and all files beside it agree on who holds which router and experts.

    :func:`load_layer` opens the files of its layer only; that others hold more than the index says is seen here.

    Raises:
        CheckpointError: they don't agree, or a file can't be read; the message names the keys.
        ImportError: safetensors is not installed.
    """
    files = key_files(path)
    index = Path(path) / INDEX if Path(path).is_dir() else Path(path)
    if index.suffix != ".json" or not index.exists():
        return
    listed = {(key, file) for key, file in files.items() if layer_of(key) is not None}
    # A single file beside an index is another copy of all, which key_files refuses unless one of the two is named.
    beside = {file for file in index.parent.glob("*.safetensors") if file.name != SINGLE}
    held = {
        (key, file) for file in beside | {*files.values()} for key in header_keys(file) if layer_of(key) is not None
    }
    differences = [f"{key} is in {file.name}, where the index does not list it" for key, file in sorted(held - listed)]
    differences += [f"{key} is not in {file.name}, where the index lists it" for key, file in sorted(listed - held)]
    if differences:
        raise CheckpointError(
            f"{index}: it and the files must agree, got {len(differences)} differences: {'; '.join(differences[:8])}"
        )


def load_layer(
    path: PathLike,
    layer: int,
    config: Gemma4MoEConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Gemma4MoE:
    """Router and experts of one layer.

    A fused tensor goes from the file to ``device`` as it is; those of single experts are copied into one tensor that is
    allocated once. On the CPU a tensor that needs neither cast nor copy stays mapped to the file: don't overwrite the
    file while the module lives. ``per_expert_scale`` stays the router's parameter, which applies it, once.

    Args:
        path: the checkpoint, as the module says.
        layer: N of ``layers.N.``
        config: sizes and activation; None reads ``config.json`` (:func:`read_config`).
        device: where the parameters go; not the meta device, which would lose them.
        dtype: bfloat16, float16, float32 or float64; None keeps the checkpoint's, which must be one for the layer.
        backend: of the experts, as for :func:`cupymoe.fused_experts`.

    Raises:
        CheckpointError: a key is missing, left over, misshapen, of a dtype that is none of the four, there twice, or
            the experts are in two layouts; or one of the files can't be read.
        ValueError: ``dtype`` is none of the four, or ``device`` is the meta device.
        TypeError: ``layer`` is not an int.
        ImportError: safetensors is not installed.
    """
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be one of {[*_DTYPES.values()]} or None, got {dtype}")
    if torch.device(device).type == "meta":
        raise ValueError(f"device must have memory for the parameters, got {device}")
    files = key_files(path)
    moe = skeleton(read_config(path) if config is None else config, backend)
    state: dict[str, torch.Tensor] = {}
    with _checked(path, files, layer, moe.config) as tensors:
        wanted = _common_dtype(tensors) if dtype is None else dtype
        for tensor in tensors:
            name, part, _ = tensor.slot
            if not part:
                state[name] = tensor.read().to(device, wanted)
                continue
            if name not in state:
                state[name] = torch.empty(moe.get_parameter(name).shape, device=device, dtype=wanted)
            state[name][part].copy_(tensor.read())
    moe.load_state_dict(state, strict=True, assign=True)
    return moe


def load_into(moe: Gemma4MoE, path: PathLike, layer: int) -> None:
    """Copy one layer into the parameters that ``moe`` has, on their device and in their dtype.

    Nothing is written unless the whole layer is as ``moe.config`` says, and so are the parameters.

    Raises:
        CheckpointError: as of :func:`load_layer`.
        ValueError: a parameter is not there or not of the shape that ``moe.config`` says, or it is on the meta device,
            where a copy would be lost.
        TypeError: a parameter is a DTensor or another tensor that is not plain memory, or its dtype is none of
            bfloat16, float16, float32 and float64; or ``layer`` is not an int.
        ImportError: safetensors is not installed.
    """
    parameters = _parameters(moe)
    with _checked(path, key_files(path), layer, moe.config) as tensors, torch.no_grad():
        # All are mapped before the first is copied: one that can't be is seen while nothing is written yet.
        mapped = [(parameters[tensor.slot.parameter][tensor.slot.part], tensor.read()) for tensor in tensors]
        for destination, source in mapped:
            destination.copy_(source)


def _parameters(moe: Gemma4MoE) -> dict[str, torch.Tensor]:
    """Every parameter of a layer by name, seen to be one that a checkpoint can be copied into."""
    parameters: dict[str, torch.Tensor] = {}
    for name, wanted in skeleton(moe.config).named_parameters():
        try:
            parameters[name] = moe.get_parameter(name)
        except AttributeError as error:
            raise ValueError(f"moe must have the parameter {name}: {error}") from error
        check_writable(name, parameters[name])
        if parameters[name].shape != wanted.shape:
            raise ValueError(
                f"{name} must have shape {[*wanted.shape]}, as moe.config says, got {[*parameters[name].shape]}"
            )
    return parameters


class _Tensor(NamedTuple):
    """A tensor of an open file that has been checked and not been read."""

    key: str
    file: Path
    slot: Slot
    dtype: torch.dtype
    handle: Any

    def read(self) -> torch.Tensor:
        """On the CPU, mapped to the file."""
        return read_tensor(self.file, self.handle, self.key)


@contextmanager
def _checked(
    path: PathLike, key_files: dict[str, Path], layer: int, config: Gemma4MoEConfig
) -> Iterator[list[_Tensor]]:
    """The layer's tensors, unread, after every check; the files are open until the context ends."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer must be an int, the N of layers.N., got {layer!r}")
    found = match(path, key_files, layer, config)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(open_file(file)) for file in sorted({each.file for each in found})}
        _check_headers(path, layer, found, {file: set(handle.keys()) for file, handle in handles.items()})
        yield [_check_tensor(each, handles[each.file]) for each in found]


def _check_headers(path: PathLike, layer: int, found: list[Found], keys_of: dict[Path, set[str]]) -> None:
    """The index and the headers agree on the layer."""
    for key, file, _ in found:
        if key not in keys_of[file]:
            raise CheckpointError(f"{file}: {key} is missing; {path} says that it is there")
    listed = {(key, file) for key, file, _ in found}
    for file, keys in keys_of.items():
        for key in keys:
            if layer_of(key) == layer and (key, file) not in listed:
                raise CheckpointError(f"{file}: {key} is left over: {path} does not say that it is there")


def _check_tensor(found: Found, handle: Any) -> _Tensor:
    key, file, slot = found
    header = handle.get_slice(key)
    dtype, shape = header.get_dtype(), header.get_shape()
    if dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {key} must have dtype {', '.join(_DTYPES)}, got {dtype} (no quantised weights)")
    if tuple(shape) != slot.shape:
        raise CheckpointError(f"{file}: {key} must have shape {[*slot.shape]}, got {shape}")
    return _Tensor(key, file, slot, _DTYPES[dtype], handle)


def _common_dtype(tensors: list[_Tensor]) -> torch.dtype:
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            raise CheckpointError(
                f"{tensor.file}: {tensor.key} must have {first.key}'s dtype {first.dtype} as long as no dtype is asked "
                f"for, got {tensor.dtype}"
            )
    return first.dtype
