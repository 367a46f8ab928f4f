"""The quantised weights of a layer, from the tensors of its files and back: one expert after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.quantised.storage import BadTensorError, NaturalWeight, Storage
from cupymoe.checkpoint.tensors import Tensor
from cupymoe.weights import QuantizedWeight, WeightFormat, pack_codes
from cupymoe.weights.checks import check_range

_BUFFERS = ("codes", "scales", "zeros", "row_scales")


class _One(NamedTuple):
    """The tensors of one expert's weight, or of all experts' where ``expert`` is None."""

    parameter: str
    expert: int | None
    rows: slice
    tensors: dict[str, Tensor]


def read_weights(
    tensors: Sequence[Tensor], storages: Mapping[str, Storage], module: nn.Module, device: torch.device | str
) -> dict[str, QuantizedWeight]:
    """The weights of the parameters that ``storages`` names.

    Args:
        tensors: of a layer, checked against their rules; those of other parameters are passed over.
        storages: how each parameter is stored.
        module: whose parameters these are; only their shapes are looked at.
        device: where the weights go. They are also unpacked there.

    Raises:
        CheckpointError: a tensor holds what it must not; the message names it.
    """
    weights: dict[str, QuantizedWeight] = {}
    for one in _by_weight(tensors, storages):
        storage = storages[one.parameter]
        num_experts, n, k = module.get_parameter(one.parameter).shape
        rows = len(range(n)[one.rows])
        opened = {name: tensor.read() for name, tensor in one.tensors.items()}
        for expert in range(num_experts) if one.expert is None else (one.expert,):
            given = {name: each.to(device) for name, each in _of_expert(one, opened, expert).items()}
            of = f" of expert {expert}" if one.expert is None else ""
            try:
                natural = storage.read(given, (rows, k))
            except BadTensorError as error:
                tensor = one.tensors[error.name]
                raise CheckpointError(f"{tensor.file}: {tensor.key}{of} {error.complaint}") from error
            if natural.scales is not None:
                try:
                    check_range(storage.format, natural.scales)
                except ValueError as error:
                    named = sorted(one.tensors.items(), key=lambda item: "scale" not in item[0])
                    _, tensor = named[0]
                    raise CheckpointError(f"{tensor.file}: {tensor.key}{of} is of a weight whose {error}") from error
            if one.parameter not in weights:
                weights[one.parameter] = allocate(storage.format, (num_experts, n, k), natural, device)
            put(weights[one.parameter], expert, one.rows, natural)
    return weights


def export_weights(
    tensors: Sequence[Tensor], storages: Mapping[str, Storage], weights: Mapping[str, QuantizedWeight]
) -> dict[str, torch.Tensor]:
    """The tensors that a layer's files would hold if these were its weights, on the CPU, by key.

    Args:
        tensors: of the layer, as of :func:`read_weights`; what the weights leave open is theirs.
        storages: how each parameter is stored.
        weights: the parameters' own, in the formats of ``storages``.

    Raises:
        ValueError: a weight can't be stored so; the message names it.
    """
    exported: dict[str, torch.Tensor] = {}
    for one in _by_weight(tensors, storages):
        weight, storage = weights[one.parameter], storages[one.parameter]
        opened = {name: tensor.read() for name, tensor in one.tensors.items()}
        written = {one.tensors[name].key: each.clone() for name, each in opened.items()}
        for expert in range(weight.shape[0]) if one.expert is None else (one.expert,):
            like = _of_expert(one, opened, expert)
            try:
                parts = storage.export(rows_of(weight, expert, one.rows), like)
            except ValueError as error:
                raise ValueError(f"{one.parameter}, expert {expert}: {error}") from error
            for name, part in parts.items():
                key, rule = one.tensors[name].key, one.tensors[name].target.rule
                if one.expert is None and not rule.whole:
                    written[key][expert] = part
                else:
                    written[key] = part
        exported |= written
    return exported


def _by_weight(tensors: Sequence[Tensor], storages: Mapping[str, Storage]) -> Iterator[_One]:
    """The tensors of each quantised weight that the files hold."""
    grouped: dict[tuple[str, int | None, int], _One] = {}
    for tensor in tensors:
        target = tensor.target
        if not target.tensor or target.parameter not in storages:
            continue
        expert, rows = None, slice(None)
        for index in target.part:
            if isinstance(index, slice):
                rows = index
            else:
                expert = index
        one = grouped.setdefault((target.parameter, expert, rows.start or 0), _One(target.parameter, expert, rows, {}))
        one.tensors[target.tensor] = tensor
    yield from grouped.values()


def _of_expert(one: _One, opened: Mapping[str, torch.Tensor], expert: int) -> dict[str, torch.Tensor]:
    """The tensors of one expert, where those of all may be fused."""
    if one.expert is not None:
        return dict(opened)
    return {name: tensor if one.tensors[name].target.rule.whole else tensor[expert] for name, tensor in opened.items()}


def allocate(
    format: WeightFormat, shape: tuple[int, int, int], natural: NaturalWeight, device: torch.device | str
) -> QuantizedWeight:
    """A weight ``[E, n, k]`` for natural ones such as this to be put into; what pads its rows is zero."""
    scale_dtype = None if natural.scales is None else natural.scales.dtype
    weight = QuantizedWeight(format, shape, scale_dtype=scale_dtype, device=device)
    for padded in (weight.scales, weight.zeros):
        if padded is not None:
            padded.view(torch.uint8).zero_()
    return weight


def put(weight: QuantizedWeight, expert: int, rows: slice, natural: NaturalWeight) -> None:
    """Write some rows of one expert, which whoever read them has checked."""
    weight.codes[expert, rows] = pack_codes(weight.format, natural.codes[None])[0]
    factors = weight.group_scales, weight.group_zeros, weight.row_scales
    for target, source in zip(factors, natural[1:], strict=True):
        if target is not None:
            assert source is not None
            if target.itemsize == 1:  # torch copies rows of bytes, and not of every 8-bit float, on every device
                target, source = target.view(torch.uint8), source.view(torch.uint8)
            target[expert, rows] = source


def rows_of(weight: QuantizedWeight, expert: int, rows: slice) -> NaturalWeight:
    """Some rows of one expert, on the CPU."""
    part = QuantizedWeight(weight.format, (1, *weight.shape[1:]), device="meta")
    for name in _BUFFERS:
        buffer = getattr(weight, name)
        setattr(part, name, None if buffer is None else buffer[expert, rows][None].cpu())
    factors = (part.group_scales, part.group_zeros, part.row_scales)
    return NaturalWeight(part.natural_codes()[0], *(None if each is None else each[0] for each in factors))
