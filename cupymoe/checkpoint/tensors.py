"""The tensors of one layer: seen to be what they must be in the headers of the files, then read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cupymoe.checkpoint.files import CheckpointError, PathLike, open_file, read_tensor
from cupymoe.checkpoint.layout import Found, Slot, Spelling, match

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Tensor(NamedTuple):
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
def checked(
    path: PathLike, files: Mapping[str, Path], layer: int, spelling: Spelling, module: nn.Module
) -> Iterator[list[Tensor]]:
    """The layer's tensors, unread, after every check; the files are open until the context ends.

    Args:
        path: what messages call the checkpoint.
        files: the file of each key of the checkpoint.
        layer: N of ``layers.N.``
        spelling: of the layer.
        module: what is read, with parameters of the shapes that they must have.
    """
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer must be an int, the N of layers.N., got {layer!r}")
    found = match(path, files, layer, spelling, module)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(open_file(file)) for file in sorted({each.file for each in found})}
        listed = {(key, file) for key, file, _ in found}
        for file, handle in handles.items():
            keys = handle.keys()
            _check_header(path, file, {key for key in keys if spelling.is_read(key, layer)}, listed)
        yield [_check_tensor(each, handles[each.file]) for each in found]


def load(
    module: nn.Module,
    path: PathLike,
    files: Mapping[str, Path],
    layer: int,
    spelling: Spelling,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Give a module without memory the parameters of a layer: those of the files, or copies where ``device``, ``dtype``
    (None: the files') or the layout ask for them. Other arguments are as of :func:`checked`."""
    state: dict[str, torch.Tensor] = {}
    with checked(path, files, layer, spelling, module) as tensors:
        wanted = _common_dtype(tensors) if dtype is None else dtype
        for tensor in tensors:
            _, name, part, _ = tensor.slot
            if not part:
                state[name] = tensor.read().to(device, wanted)
                continue
            if name not in state:
                state[name] = torch.empty(module.get_parameter(name).shape, device=device, dtype=wanted)
            state[name][part].copy_(tensor.read())
    module.load_state_dict(state, strict=True, assign=True)


def check_destination(device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Where and in which dtype parameters can be loaded.

    Raises:
        ValueError: ``dtype`` is neither None nor one of weights, or ``device`` is the meta device.
    """
    if dtype is not None and dtype not in _DTYPES.values():
        raise ValueError(f"dtype must be one of {[*_DTYPES.values()]} or None, got {dtype}")
    if torch.device(device).type == "meta":
        raise ValueError(f"device must have memory for the parameters, got {device}")


def _check_header(path: PathLike, file: Path, held: set[str], listed: set[tuple[str, Path]]) -> None:
    """The index and the header of one file agree on the layer."""
    for key in sorted(key for key, its_file in listed if its_file == file):
        if key not in held:
            raise CheckpointError(f"{file}: {key} is missing; {path} says that it is there")
    for key in sorted(held):
        if (key, file) not in listed:
            raise CheckpointError(f"{file}: {key} is left over: {path} does not say that it is there")


def _check_tensor(found: Found, handle: Any) -> Tensor:
    key, file, slot = found
    header = handle.get_slice(key)
    dtype, shape = header.get_dtype(), header.get_shape()
    if dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {key} must have dtype {', '.join(_DTYPES)}, got {dtype} (no quantised weights)")
    if tuple(shape) != slot.shape:
        raise CheckpointError(f"{file}: {key} must have shape {[*slot.shape]}, got {shape}")
    return Tensor(key, file, slot, _DTYPES[dtype], handle)


def _common_dtype(tensors: list[Tensor]) -> torch.dtype:
    first = tensors[0]
    for tensor in tensors:
        if tensor.dtype != first.dtype:
            raise CheckpointError(
                f"{tensor.file}: {tensor.key} must have {first.key}'s dtype {first.dtype} as long as no dtype is asked "
                f"for, got {tensor.dtype}"
            )
    return first.dtype
