"""The names that a layer's tensors have in checkpoints, and where each tensor goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from cupymoe.checkpoint.files import CheckpointError, PathLike
from cupymoe.config import Gemma4MoEConfig
from cupymoe.modules import Gemma4MoE

_LAYER_KEY = re.compile(
    r"(?P<prefix>(?:(?:model\.)?(?:language_model\.)?|language_model\.model\.)layers\.(?P<layer>0|[1-9][0-9]*)\.)"
    r"(?P<name>(?:router|experts|moe)\..+)"
)
# Any spelling of such a key: what _LAYER_KEY doesn't know is refused by name, never passed over.
_KEY_OF_A_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>[0-9]+)\.(?:.*\.)?(?:router|experts|moe)(?:\.|$)")
_FUSED = re.compile(r"(?P<prefix>experts\.|moe\.|moe\.experts\.)(?P<name>gate_up_proj|down_proj)")
_PER_EXPERT = re.compile(
    r"(?P<prefix>experts\.|moe\.experts\.)(?P<name>(?:0|[1-9][0-9]*)\.(?:gate|up|down)_proj\.weight)"
)


class Slot(NamedTuple):
    """Where a tensor goes: a parameter of Gemma4MoE, or the part of it that belongs to one expert."""

    parameter: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]


class Found(NamedTuple):
    """A key of a layer, its file, and where its tensor goes."""

    key: str
    file: Path
    slot: Slot


def layer_of(key: str) -> int | None:
    """The layer that a key belongs to if it is one of a router or of experts, in whichever spelling."""
    match = _KEY_OF_A_LAYER.search(key)
    return int(match["layer"]) if match else None


def skeleton(config: Gemma4MoEConfig, backend: str = "auto") -> Gemma4MoE:
    """The module without memory for its parameters."""
    with torch.device("meta"):
        return Gemma4MoE(config, backend)


def match(path: PathLike, files: Mapping[str, Path], layer: int, config: Gemma4MoEConfig) -> list[Found]:
    """Every key of the layer, with nothing missing and nothing left over.

    Args:
        path: what messages call the checkpoint.
        files: the file of each key of the checkpoint.
        layer: whose keys.
        config: what a layer must have.
    """
    # By canonical name, which is Gemma4MoE's or experts.<id>.*
    found: dict[str, tuple[str, Path]] = {}
    layouts: dict[tuple[bool, str], str] = {}
    prefixes: dict[str, str] = {}
    for key, file in files.items():
        if layer_of(key) != layer:
            continue
        parts = _LAYER_KEY.fullmatch(key)
        if parts is None:
            raise CheckpointError(
                f"{file}: {key} is left over: a layer's router and experts are read from "
                f"[model.][language_model.]layers.{layer}.{{router,experts,moe}}.*"
            )
        name = parts["name"]
        prefixes.setdefault(parts["prefix"], key)
        if experts := _FUSED.fullmatch(name) or _PER_EXPERT.fullmatch(name):
            name = f"experts.{experts['name']}"
            layouts.setdefault((experts.re is _PER_EXPERT, experts["prefix"]), key)
        elif name == "moe.per_expert_scale":
            name = "router.per_expert_scale"
        if name in found:
            raise CheckpointError(f"{file}: {key} is {name} a second time: {found[name][0]} is it too")
        found[name] = key, file
    if not found:
        there = sorted({number for number in map(layer_of, files) if number is not None})
        raise CheckpointError(
            f"{path}: no [model.][language_model.]layers.{layer}.{{router,experts,moe}}.* key is there; layers that "
            f"have one: {there}"
        )
    for what, keys in (("layouts of the experts", layouts), ("prefixes of a layer", prefixes)):
        if len(keys) > 1:
            first, second, *_ = keys.values()
            raise CheckpointError(f"{path}: {first} and {second} are two {what}; one is allowed")
    per_expert, experts_prefix = next(iter(layouts), (False, "experts."))
    slots = _slots(config, per_expert)
    for name, (key, file) in found.items():
        if name not in slots:
            raise CheckpointError(
                f"{file}: {key} is left over: nothing of a layer with {config.num_experts} unquantised experts reads it"
            )
    if missing := [name for name in slots if name not in found]:
        (prefix,) = prefixes
        names = [prefix + re.sub(r"^experts\.", experts_prefix, name) for name in missing]
        raise CheckpointError(f"{path}: {names[0]} is missing ({len(names)} of {len(slots)} keys are: {names[:8]})")
    return [Found(*found[name], slot) for name, slot in slots.items()]


def _slots(config: Gemma4MoEConfig, per_expert: bool) -> dict[str, Slot]:
    """Where each tensor of a complete layer goes, by canonical name."""
    slots = {name: Slot(name, (), tuple(value.shape)) for name, value in skeleton(config).named_parameters()}
    if not per_expert:
        return slots
    activation, size, width = config.activation, config.hidden_size, config.moe_intermediate_size
    if not activation.is_gated or activation.is_interleaved:
        raise CheckpointError(
            f"{activation.name} does not read [gate | up], so gate_proj and up_proj of single experts have no place; "
            "the fused layout (experts.gate_up_proj) is allowed"
        )
    gate_up, down = slots.pop("experts.gate_up_proj").parameter, slots.pop("experts.down_proj").parameter
    for expert in range(config.num_experts):
        slots[f"experts.{expert}.gate_proj.weight"] = Slot(gate_up, (expert, slice(0, width)), (width, size))
        slots[f"experts.{expert}.up_proj.weight"] = Slot(gate_up, (expert, slice(width, None)), (width, size))
        slots[f"experts.{expert}.down_proj.weight"] = Slot(down, (expert,), (size, width))
    return slots
