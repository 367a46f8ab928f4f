"""Experts in the words of a checkpoint: the tensors that its files would hold if these were their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from cupymoe.checkpoint.families import layer_of_model
from cupymoe.checkpoint.files import PathLike, key_files
from cupymoe.checkpoint.layer import open_layer
from cupymoe.checkpoint.quantised.compressed_tensors import storage_of
from cupymoe.checkpoint.quantised.weights import export_weights, rows_of
from cupymoe.weights import QuantizedWeight


def export_experts(experts: nn.Module, like: PathLike, layer: int) -> dict[str, torch.Tensor]:
    """The experts' tensors as a layer of a checkpoint holds its own: same keys, dtypes, shapes and storage.

    Weights that were loaded from that layer are given back bit for bit. What they leave open is the layer's: the scales
    of activations, and those of scales that are quantised themselves. The files have to be there; nothing is written.

    Args:
        experts: with ``gate_up_proj`` and ``down_proj``, each a :class:`cupymoe.QuantizedWeight` where the layer's is
            quantised, in the same format, or else a tensor: a :class:`cupymoe.MoEExperts`, say, or a
            :class:`cupymoe.QuantizedExperts`.
        like: the checkpoint, as for :func:`cupymoe.checkpoint.load_layer`; its ``config.json`` must be there.
        layer: N of ``layers.N.``

    Returns:
        Tensors on the CPU by key, those of the experts alone.

    Raises:
        CheckpointError: as of :func:`cupymoe.checkpoint.load_layer`.
        ValueError: a weight is not of the shape or the format that the layer's is, or the layer's storage can't hold
            it: scales of rows, say, where that has one for a whole tensor.
        TypeError: ``layer`` is not an int.
        ImportError: safetensors is not installed.
    """
    spelling, skeleton = layer_of_model(like)
    with open_layer(like, key_files(like), layer, spelling, skeleton) as (tensors, storages), torch.no_grad():
        tensors = [tensor for tensor in tensors if tensor.target.parameter.startswith(spelling.experts)]
        weights: dict[str, QuantizedWeight] = {}
        exported: dict[str, torch.Tensor] = {}
        for parameter in dict.fromkeys(tensor.target.parameter for tensor in tensors):
            name = parameter.removeprefix(spelling.experts)
            shape = tuple(skeleton.get_parameter(parameter).shape)
            given: Any = getattr(experts, name, None)
            storage = storages.get(parameter)
            is_right = isinstance(given, torch.Tensor) if storage is None else isinstance(given, QuantizedWeight)
            if not is_right or tuple(given.shape) != shape:
                raise ValueError(
                    f"experts.{name} must be {storage or 'unquantised'} of shape {[*shape]}, as {like} has it, got "
                    f"{type(given).__name__} of shape {[*getattr(given, 'shape', ())]}"
                )
            if storage is not None:
                if given.format != storage.format:
                    raise ValueError(
                        f"experts.{name} must be {storage.format.name}, as {like} has it, got {given.format.name}"
                    )
                weights[parameter] = given
                continue
            for tensor in tensors:
                if tensor.target.parameter == parameter:
                    is_beside = bool(tensor.target.tensor)
                    part = tensor.read() if is_beside else given[tensor.target.part].to("cpu", tensor.torch_dtype)
                    exported[tensor.key] = part.clone(memory_format=torch.contiguous_format)
        return exported | export_weights(tensors, storages, weights)


def to_compressed_tensors(experts: nn.Module, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Quantised experts as compressed-tensors stores them, one by one, for whoever reads such files.

    Codes and scales are the same bits; but NVFP4's global scale is stored as its reciprocal, which may round it by one
    unit of float32's last place.

    Args:
        experts: with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I], both a :class:`cupymoe.QuantizedWeight`,
            in any format but nf4.
        prefix: what the keys begin with, up to an expert's number: ``"model.language_model.layers.0.experts."``, say.

    Returns:
        Tensors on the CPU by key, ``<prefix><id>.{gate,up,down}_proj.weight_packed`` and so on; and the
        ``quantization_config`` of config.json, which quantises experts of any layer so and nothing else.

    Raises:
        ValueError: a weight is unquantised or in nf4, or has scales that compressed-tensors can't hold: blocks of rows
            that belong to gate and to up, or rows of one tensor with NVFP4 scales of their own.
    """
    tensors: dict[str, torch.Tensor] = {}
    groups: dict[str, Any] = {}
    for name, projections in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        weight = getattr(experts, name, None)
        if not isinstance(weight, QuantizedWeight):
            raise ValueError(f"experts.{name} must be a cupymoe.QuantizedWeight, got {type(weight).__name__}")
        storage, settings = storage_of(weight.format)
        groups[name] = {
            "targets": [rf"re:.*\.experts\.\d+\.({'|'.join(projections)})$"],
            "weights": settings,
            "format": storage.family.rpartition(" ")[2],
        }
        num_experts, n, _ = weight.shape
        size = n // len(projections)
        for expert in range(num_experts):
            for part, projection in enumerate(projections):
                try:
                    written = storage.export(rows_of(weight, expert, slice(part * size, (part + 1) * size)), {})
                except ValueError as error:
                    raise ValueError(f"experts.{name}, {projection} of expert {expert}: {error}") from error
                tensors |= {f"{prefix}{expert}.{projection}.{tensor}": each for tensor, each in written.items()}
    formats = {group["format"] for group in groups.values()}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
    return tensors, config
