"""The tensors of one layer: seen to be what they must be in the headers of the files, then read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import DTYPES, PathLike, open_file, read_tensor
from cupymoe.checkpoint.layout import Found, Spelling, Stored, Target, match


class Tensor(NamedTuple):
    """A tensor of an open file that has been checked and not been read."""

    key: str
    file: Path
    target: Target
    dtype: str
    """In the words of safetensors."""
    handle: Any

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of a tensor that is not quantised."""
        return DTYPES[self.dtype]

    def read(self) -> torch.Tensor:
        """On the CPU, mapped to the file."""
        return read_tensor(self.file, self.handle, self.key)


@contextmanager
def checked(
    path: PathLike,
    files: Mapping[str, Path],
    layer: int,
    spelling: Spelling,
    module: nn.Module,
    stored: Stored,
) -> Iterator[list[Tensor]]:
    """The layer's tensors, unread, after every check; the files are open until the context ends.

    Args:
        path: what messages call the checkpoint.
        files: the file of each key of the checkpoint.
        layer: N of ``layers.N.``
        spelling: of the layer.
        module: what is read, with parameters of the shapes that they must have.
        stored: how the experts are.
    """
    found = match(path, files, layer, spelling, module, stored)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(open_file(file)) for file in sorted({each.file for each in found})}
        listed = {(key, file) for key, file, _ in found}
        for file, handle in handles.items():
            keys = handle.keys()
            _check_header(path, file, {key for key in keys if spelling.is_read(key, layer)}, listed)
        tensors = [check_tensor(each, handles[each.file]) for each in found]
        _check_alike(tensors)
        yield tensors


def check_destination(device: torch.device | str, dtype: torch.dtype | None) -> None:
    """Where and in which dtype parameters can be loaded.

    Raises:
        ValueError: ``dtype`` is neither None nor one of weights, or ``device`` is the meta device.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {[*DTYPES.values()]} or None, got {dtype}")
    if torch.device(device).type == "meta":
        raise ValueError(f"device must have memory for the parameters, got {device}")


def _check_header(path: PathLike, file: Path, held: set[str], listed: set[tuple[str, Path]]) -> None:
    """The index and the header of one file agree on the layer."""
    for key in sorted(key for key, its_file in listed if its_file == file):
        if key not in held:
            raise CheckpointError(f"{file}: {key} is missing: the index {path} lists it")
    for key in sorted(held):
        if (key, file) not in listed:
            raise CheckpointError(f"{file}: {key} is left over: the index {path} does not list it")


def check_tensor(found: Found, handle: Any) -> Tensor:
    """A tensor of an open file whose header is as its target's rule says.

    Raises:
        CheckpointError: it is not.
    """
    key, file, target = found
    header = handle.get_slice(key)
    dtype, shape = header.get_dtype(), header.get_shape()
    rule = target.rule
    if dtype not in rule.dtypes:
        raise CheckpointError(
            f"{file}: {key} must have dtype {', '.join(rule.dtypes)}, got {dtype}"
            f"{'' if target.tensor else ' (as an unquantised weight)'}"
        )
    if not any(_is_shape(shape, each) for each in rule.shapes):
        allowed = " or ".join(str([*each]) for each in rule.shapes)
        raise CheckpointError(f"{file}: {key} must have shape {allowed}, got {shape}")
    return Tensor(key, file, target, dtype, handle)


def _is_shape(given: list[int], allowed: tuple[int, ...]) -> bool:
    """Whether a shape is the one that is allowed, where -1 is any size."""
    return len(given) == len(allowed) and all(wanted in (-1, size) for size, wanted in zip(given, allowed, strict=True))


def _check_alike(tensors: list[Tensor]) -> None:
    """The tensors of quantised weights have one dtype all over a parameter: it is the parameter's."""
    first: dict[tuple[str, str], Tensor] = {}
    for tensor in tensors:
        other = first.setdefault((tensor.target.parameter, tensor.target.tensor), tensor)
        if tensor.target.tensor and tensor.dtype != other.dtype:
            raise CheckpointError(
                f"{tensor.file}: {tensor.key} must have {other.key}'s dtype {other.dtype}, got {tensor.dtype}"
            )


def common_dtype(tensors: list[Tensor]) -> torch.dtype | None:
    """The one dtype of all tensors that are not quantised; None where there is none of them.

    Raises:
        CheckpointError: they have several.
    """
    plain = [tensor for tensor in tensors if not tensor.target.tensor]
    if not plain:
        return None
    first = plain[0]
    for tensor in plain:
        if tensor.dtype != first.dtype:
            raise CheckpointError(
                f"{tensor.file}: {tensor.key} must have {first.key}'s dtype {first.torch_dtype} as long as no dtype "
                f"is asked for, got {tensor.torch_dtype}"
            )
    return first.torch_dtype
