"""One layer of a checkpoint: its files opened and checked, a module without memory filled from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from cupymoe.checkpoint.files import PathLike
from cupymoe.checkpoint.layout import Spelling
from cupymoe.checkpoint.quantised.resolve import resolve
from cupymoe.checkpoint.quantised.storage import Storage
from cupymoe.checkpoint.quantised.weights import read_weights
from cupymoe.checkpoint.tensors import Tensor, checked, common_dtype
from cupymoe.weights.quantized import put_weight


class OpenLayer(NamedTuple):
    """A layer that has been checked and not been read."""

    tensors: list[Tensor]
    storages: dict[str, Storage]
    """How the parameters that are quantised are stored, by name."""


@contextmanager
def open_layer(
    path: PathLike, files: Mapping[str, Path], layer: int, spelling: Spelling, module: nn.Module
) -> Iterator[OpenLayer]:
    """The layer's tensors after every check that headers and config.json allow; the files are open until the context
    ends. Arguments are as of :func:`cupymoe.checkpoint.tensors.checked`."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"layer must be an int, the N of layers.N., got {layer!r}")
    stored = resolve(path, files, layer, spelling, module)
    with checked(path, files, layer, spelling, module, stored) as tensors:
        yield OpenLayer(tensors, stored.quantised)


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
    (None: the files') or the layout ask for them. A parameter that the files hold quantised becomes a
    :class:`cupymoe.QuantizedWeight`. Other arguments are as of :func:`open_layer`."""
    state: dict[str, torch.Tensor] = {}
    with open_layer(path, files, layer, spelling, module) as (tensors, storages):
        wanted = common_dtype(tensors) if dtype is None else dtype
        weights = read_weights(tensors, storages, module, device)
        for tensor in tensors:
            target = tensor.target
            if target.tensor:
                continue
            if not target.part:
                state[target.parameter] = tensor.read().to(device, wanted)
                continue
            if target.parameter not in state:
                shape = module.get_parameter(target.parameter).shape
                state[target.parameter] = torch.empty(shape, device=device, dtype=wanted)
            state[target.parameter][target.part].copy_(tensor.read())
    for name, weight in weights.items():
        path, _, attribute = name.rpartition(".")
        put_weight(module.get_submodule(path), attribute, weight)
        state |= {f"{name}.{buffer}": value for buffer, value in weight.state_dict().items()}
    module.load_state_dict(state, strict=True, assign=True)
