"""MoE layers out of safetensors and GGUF checkpoints: memory-mapped, one layer at a time, and strict.

:func:`load_layer` and :func:`load_into` read routers and experts of Gemma 4, :func:`load_experts` the experts of
Qwen3-MoE, Mixtral and GPT-OSS.

A path is a ``.safetensors`` file, a ``model.safetensors.index.json``, a folder with either, or a ``.gguf`` file, on
this machine: nothing is downloaded. Every function here raises a :class:`CheckpointError` for a path where there is
neither a file nor a folder, and a TypeError for what is neither a str nor an ``os.PathLike``.

The keys of layer N start with ``[model.][language_model.]layers.N.`` or ``language_model.model.layers.N.``, all alike.
Then come, for Gemma 4, ``router.proj.weight``, ``router.scale``, ``router.per_expert_scale`` (or
``moe.per_expert_scale``), and the experts in exactly one layout:

- fused: ``experts.gate_up_proj`` [E, 2I, H] and ``experts.down_proj`` [E, H, I]; older: ``moe.`` for ``experts.``
- per expert: ``experts.<id>.{gate,up,down}_proj.weight`` [I, H], [I, H], [H, I]; or behind ``moe.``

For the others come the experts alone, in one layout of theirs:

- Qwen3-MoE: ``mlp.experts.<id>.{gate,up,down}_proj.weight``, or fused behind ``mlp.experts.``
- Mixtral: ``block_sparse_moe.experts.<id>.{w1,w3,w2}.weight``, which are gate, up and down, or fused behind
  ``mlp.experts.``
- GPT-OSS: ``mlp.experts.gate_up_proj`` [E, H, 2I], ``gate_up_proj_bias`` [E, 2I], ``down_proj`` [E, I, H] and
  ``down_proj_bias`` [E, H]

GGUF files have ``blk.N.ffn_gate_up_exps.weight``, ``ffn_down_exps.weight`` and so on.

Experts may be quantised, in the ways that docs/checkpoints.md lists: ``quantization_config`` in config.json says how,
the files must hold it, and the weight becomes a :class:`cupymoe.QuantizedWeight`. :func:`export_experts` is the way
back.

Every key of a layer with a part ``router``, ``experts`` or ``moe`` is accounted for in the files' headers before the
first tensor is read. Whatever is missing, left over, misshapen or stored in a way that is not known is a
:class:`CheckpointError` that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.export import export_experts, to_compressed_tensors
from cupymoe.checkpoint.families import GEMMA4, gemma4_skeleton, read_config, read_experts
from cupymoe.checkpoint.files import (
    INDEX,
    SINGLE,
    PathLike,
    header_keys,
    key_files,
    read_fields,
)
from cupymoe.checkpoint.layer import load, open_layer
from cupymoe.checkpoint.layout import layer_of
from cupymoe.checkpoint.quantised.storage import Storage
from cupymoe.checkpoint.quantised.weights import read_weights
from cupymoe.checkpoint.tensors import check_destination
from cupymoe.config import Gemma4MoEConfig
from cupymoe.experts import MoEExperts
from cupymoe.modules import Gemma4MoE
from cupymoe.parameters import check_writable
from cupymoe.weights import QuantizedWeight

__all__ = [
    "CheckpointError",
    "check_index",
    "export_experts",
    "layers",
    "load_experts",
    "load_into",
    "load_layer",
    "num_hidden_layers",
    "read_config",
    "to_compressed_tensors",
]


def layers(path: PathLike) -> tuple[int, ...]:
    """Numbers of the layers that have a key with a part ``router``, ``experts`` or ``moe``, in rising order.

    Raises:
        CheckpointError: there is no checkpoint at ``path``, or one of its files can't be read.
        ImportError: safetensors is not installed.
    """
    return tuple(sorted({layer for layer in map(layer_of, key_files(path)) if layer is not None}))


def num_hidden_layers(path: PathLike) -> int | None:
    """How many layers ``config.json`` says that there are; None if it doesn't say.

    Raises:
        CheckpointError: the file is not there or not JSON, or the number is not a positive integer.
    """
    file, given = read_fields(path)
    count = given.get("num_hidden_layers")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        raise CheckpointError(f"{file}: num_hidden_layers must be a positive integer, got {count!r}")
    return count


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
            f"{index}: the index must list what its files hold, got {len(differences)} differences: "
            f"{'; '.join(differences[:8])}"
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
        dtype: bfloat16, float16, float32 or float64, of all that is not quantised; None keeps the checkpoint's, which
            must be one for the layer.
        backend: of the experts, as for :func:`cupymoe.fused_experts`.

    Raises:
        CheckpointError: a key is missing, left over, misshapen, of a dtype that is none of the four, there twice, or
            the experts are in two layouts; they are not quantised as config.json says, or in a way that is not
            served, or hold numbers that they must not; or one of the files can't be read.
        ValueError: ``dtype`` is none of the four, or ``device`` is the meta device.
        TypeError: ``layer`` is not an int.
        ImportError: safetensors is not installed.
    """
    check_destination(device, dtype)
    files = key_files(path)
    moe = gemma4_skeleton(read_config(path) if config is None else config, backend)
    load(moe, path, files, layer, GEMMA4, device, dtype)
    return moe


def load_experts(
    path: PathLike,
    layer: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> MoEExperts:
    """The experts of one layer of Qwen3-MoE, Mixtral or GPT-OSS, without its router.

    Which model it is, sizes and activation are read from ``config.json``. The parameters are laid out as in the
    checkpoint, GPT-OSS's transposed, and come to the device as :func:`load_layer` says.

    Args:
        path: the checkpoint, as the module says.
        layer: N of ``layers.N.``
        device: where the parameters go; not the meta device, which would lose them.
        dtype: bfloat16, float16, float32 or float64, of what is not quantised; None keeps the checkpoint's, which must
            be one for the experts.
        backend: as for :func:`cupymoe.fused_experts`.

    Raises:
        CheckpointError: as of :func:`load_layer`; or ``config.json`` is not there, is of another model, or a field of
            it is missing or not valid.
        ValueError: ``dtype`` is none of the four, ``device`` is the meta device, or there is no such backend.
        TypeError: ``layer`` is not an int.
        ImportError: safetensors is not installed.
    """
    check_destination(device, dtype)
    files = key_files(path)
    spelling, experts = read_experts(path, backend)
    load(experts, path, files, layer, spelling, device, dtype)
    return experts


def load_into(moe: Gemma4MoE, path: PathLike, layer: int) -> None:
    """Copy one layer into the parameters that ``moe`` has, on their device and in their dtype.

    Nothing is written unless the whole layer is as ``moe.config`` says, and so are the parameters.

    Raises:
        CheckpointError: as of :func:`load_layer`.
        ValueError: a parameter is not there or not of the shape that ``moe.config`` says, or not quantised as the
            checkpoint's is, or it is on the meta device, where a copy would be lost.
        TypeError: a parameter is a DTensor or another tensor that is not plain memory, or its dtype is none of
            bfloat16, float16, float32 and float64; or ``layer`` is not an int.
        ImportError: safetensors is not installed.
    """
    skeleton = gemma4_skeleton(moe.config)
    with open_layer(path, key_files(path), layer, GEMMA4, skeleton) as (tensors, storages), torch.no_grad():
        parameters = _parameters(moe, skeleton, storages)
        # All are mapped, or read, before the first is copied: one that can't be is seen while nothing is written yet.
        mapped = [
            (parameters[tensor.target.parameter][tensor.target.part], tensor.read())
            for tensor in tensors
            if not tensor.target.tensor
        ]
        for name, weight in read_weights(tensors, storages, skeleton, "cpu").items():
            mapped += zip(_buffers(moe, name, weight), weight.buffers(), strict=True)
        for destination, source in mapped:
            destination.copy_(source)


def _parameters(moe: Gemma4MoE, skeleton: Gemma4MoE, storages: Mapping[str, Storage]) -> dict[str, torch.Tensor]:
    """Every unquantised parameter of a layer by name, seen to be one that a checkpoint can be copied into."""
    parameters: dict[str, torch.Tensor] = {}
    for name, wanted in skeleton.named_parameters():
        if name in storages:
            continue
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


def _buffers(moe: Gemma4MoE, name: str, weight: QuantizedWeight) -> list[torch.Tensor]:
    """Those of the quantised weight of this name, seen to be ones that ``weight`` can be copied into."""
    path, _, attribute = name.rpartition(".")
    held = getattr(moe.get_submodule(path), attribute, None)
    if not isinstance(held, QuantizedWeight):
        raise ValueError(f"{name} must be quantised as {weight.format.name}, like the checkpoint's, got a plain weight")
    for buffer, wanted in weight.named_buffers():
        own = getattr(held, buffer)
        if held.format != weight.format or own.dtype != wanted.dtype or own.shape != wanted.shape:
            raise ValueError(
                f"{name} must be {weight.format.name} with {buffer} {wanted.dtype} {[*wanted.shape]}, got "
                f"{held.format.name} with {None if own is None else (own.dtype, [*own.shape])}"
            )
        if own.is_meta:
            raise ValueError(f"{name} must not be on the meta device, where a copy into it would be lost")
    return list(held.buffers())
