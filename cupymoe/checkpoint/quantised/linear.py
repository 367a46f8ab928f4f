"""Quantised weights of linear layers beside the experts, which are dequantised: no kernel here computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import DTYPES, Header, PathLike
from cupymoe.checkpoint.layout import Found, Target
from cupymoe.checkpoint.quantised.compressed_tensors import MxFloats4, PackedIntegers
from cupymoe.checkpoint.quantised.fp4 import Fp4Storage
from cupymoe.checkpoint.quantised.fp8 import Fp8Storage
from cupymoe.checkpoint.quantised.scheme import Scheme
from cupymoe.checkpoint.quantised.storage import BadTensorError, Storage
from cupymoe.checkpoint.tensors import check_tensor
from cupymoe.weights import QuantizedWeight

# What the name of a tensor of codes ends with.
_CODES = ("weight", "weight_packed", "qweight")
# Those whose codes lie in the weight's rows, and so say its shape.
_READ = (PackedIntegers, Fp8Storage, Fp4Storage, MxFloats4)
_ITEMSIZES = {"U8": 1, "I32": 4, "F8_E4M3": 1}


class QuantisedLinear(NamedTuple):
    """The weight ``[n, k]`` of a linear layer as files hold it."""

    storage: Storage
    shape: tuple[int, int]
    tensors: dict[str, Found]
    """In the words of the storage."""


def find_linears(
    path: PathLike, keys: Mapping[str, str], headers: Mapping[str, Header], scheme: Scheme | None
) -> dict[str, QuantisedLinear]:
    """The quantised weights among some tensors, by the name of their module.

    Args:
        path: what messages call the checkpoint.
        keys: of the files, by name.
        headers: of every key.
        scheme: what config.json says.

    Raises:
        CheckpointError: config.json does not say how one is stored, or that is not read here; or a tensor is missing.
    """
    found: dict[str, QuantisedLinear] = {}
    for name, key in keys.items():
        module, _, ending = name.rpartition(".")
        header = headers[key]
        if ending not in _CODES or header.dtype in DTYPES:
            continue
        storage = scheme.storage(module) if scheme else None
        if not isinstance(storage, _READ) or len(header.shape) != 2:
            allowed = (
                f"unquantised ({', '.join(DTYPES)}) or stored by compressed-tensors, ModelOpt or transformers' fp8"
            )
            got = f"{header.dtype} of shape {[*header.shape]}, which config.json calls {storage or 'unquantised'}"
            raise CheckpointError(f"{header.file}: {key}, beside the experts, must be {allowed}, got {got}")
        n, per_row = header.shape
        shape = n, per_row * _ITEMSIZES.get(header.dtype, 1) * 8 // storage.format.bits
        found[module] = QuantisedLinear(storage, shape, _tensors(path, keys, headers, module, storage, shape))
    return found


def _tensors(
    path: PathLike,
    keys: Mapping[str, str],
    headers: Mapping[str, Header],
    module: str,
    storage: Storage,
    shape: tuple[int, int],
) -> dict[str, Found]:
    try:
        rules = storage.rules(shape)
    except ValueError as error:
        raise CheckpointError(f"{path}: {module} can't be {storage}: {error}") from error
    tensors: dict[str, Found] = {}
    for tensor, rule in rules.items():
        key = keys.get(f"{module}.{tensor}")
        if key is not None:
            tensors[tensor] = Found(key, headers[key].file, Target(module, module, (), rule, tensor))
        elif not rule.optional:
            raise CheckpointError(f"{path}: {module}.{tensor} is missing; {module} is {storage}")
    return tensors


def dequantized(
    linear: QuantisedLinear, handles: Mapping[Path, Any], device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """The weight ``[n, k]`` on the CPU in ``dtype``, which it is dequantised to on ``device``.

    Args:
        linear: what :func:`find_linears` found.
        handles: its files, open.
        device: where that is done.
        dtype: of the result.

    Raises:
        CheckpointError: a tensor is not of the dtype or the shape that it must have, or holds what it must not.
    """
    storage, shape, found = linear
    tensors = {name: check_tensor(each, handles[each.file]) for name, each in found.items()}
    try:
        natural = storage.read({name: tensor.read().to(device) for name, tensor in tensors.items()}, shape)
    except BadTensorError as error:
        tensor = tensors[error.name]
        raise CheckpointError(f"{tensor.file}: {tensor.key} {error.complaint}") from error
    codes, *factors = (None if part is None else part[None] for part in natural)
    assert codes is not None
    weight = QuantizedWeight.of(storage.format, codes, *factors)
    return weight.dequantize(dtype)[0].cpu()
