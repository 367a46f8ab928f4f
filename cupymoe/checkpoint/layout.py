"""The names that a layer's tensors have in checkpoints, and where each tensor goes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cupymoe.checkpoint.files import CheckpointError, PathLike

_LAYER_KEY = re.compile(
    r"(?P<prefix>(?:(?:model\.)?(?:language_model\.)?|language_model\.model\.)layers\.(?:0|[1-9][0-9]*)\.)(?P<name>.+)"
)
# Any spelling of a key of a router or of experts: what a family doesn't know is refused by name, never passed over.
_KEY_OF_A_LAYER = re.compile(r"(?:^|\.)layers\.(?P<layer>[0-9]+)\.(?:.*\.)?(?:router|experts|moe)(?:\.|$)")


class Layout(NamedTuple):
    """One of the ways in which a family's checkpoints hold the experts of a layer."""

    prefix: str
    """What the names of their tensors begin with, behind ``layers.N.``"""
    single: tuple[str, str, str] | None = None
    """Of layouts with one tensor for each projection of each expert, the names of its gate, up and down behind
    ``<id>.``; None: the tensors are the parameters of all experts, and have their names."""


class Spelling(NamedTuple):
    """How the checkpoints of a family of models spell what is read of a layer."""

    layouts: tuple[Layout, ...]
    """Of the experts; a layer has one of them. The first is the one that messages name where a layer has none."""
    places: str
    """Where all that is read stands behind ``layers.N.``, for messages."""
    experts: str = ""
    """Path of the experts in the module that is read, ending with a dot; empty: they are that module."""
    aliases: Mapping[str, str] = {}
    """Other names of tensors beside the experts, and the parameters that they are."""
    foreign: frozenset[str] = frozenset()
    """Names of the tensors of other modules that have a part ``router``, ``experts`` or ``moe``, and are not read."""

    def is_read(self, key: str, layer: int) -> bool:
        """Whether a key of the layer is one of a router or of experts, in whichever spelling, and no other module's."""
        if layer_of(key) != layer:
            return False
        parts = _LAYER_KEY.fullmatch(key)
        return parts is None or parts["name"] not in self.foreign


class Slot(NamedTuple):
    """Where a tensor goes: a parameter of the module that is read, or the part of it that belongs to one expert."""

    name: str
    """The same for every spelling of the tensor."""
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


def match(path: PathLike, files: Mapping[str, Path], layer: int, spelling: Spelling, module: nn.Module) -> list[Found]:
    """Every key of the layer, with nothing missing and nothing left over.

    Args:
        path: what messages call the checkpoint.
        files: the file of each key of the checkpoint.
        layer: whose keys.
        spelling: of the layer.
        module: what is read, with parameters of the shapes that they must have.
    """
    experts: Any = module.get_submodule(spelling.experts.removesuffix("."))
    names = _names(spelling, module, experts)
    places = f"[model.][language_model.]layers.{layer}.{spelling.places}"
    found: dict[str, Found] = {}
    layouts: dict[Layout, str] = {}
    prefixes: dict[str, str] = {}
    for key, file in files.items():
        if not spelling.is_read(key, layer):
            continue
        parts = _LAYER_KEY.fullmatch(key)
        if parts is None or parts["name"] not in names:
            raise CheckpointError(
                f"{file}: {key} is left over: nothing of a layer with {experts.down_proj.shape[0]} unquantised experts "
                f"reads it; its tensors are read from {places}"
            )
        layout, slot = names[parts["name"]]
        prefixes.setdefault(parts["prefix"], key)
        if layout is not None:
            layouts.setdefault(layout, key)
        if slot.name in found:
            raise CheckpointError(f"{file}: {key} is {slot.name} a second time: {found[slot.name].key} is it too")
        found[slot.name] = Found(key, file, slot)
    if not found:
        there = sorted({number for number in map(layer_of, files) if number is not None})
        raise CheckpointError(f"{path}: no {places} key is there; layers that have one: {there}")
    for what, keys in (("layouts of the experts", layouts), ("prefixes of a layer", prefixes)):
        if len(keys) > 1:
            first, second, *_ = keys.values()
            raise CheckpointError(f"{path}: {first} and {second} are two {what}; one is allowed")
    (prefix,), taken = prefixes, next(iter(layouts), spelling.layouts[0])
    if taken.single and (not experts.activation.is_gated or experts.activation.is_interleaved):
        raise CheckpointError(
            f"{experts.activation.name} does not read [gate | up], so {taken.single[0]} and {taken.single[1]} of "
            "single experts have no place; the fused layout (gate_up_proj) is allowed"
        )
    wanted: dict[str, str] = {}
    for name, (layout, slot) in names.items():
        if layout in (None, taken):
            wanted.setdefault(slot.name, prefix + name)
    if missing := [key for name, key in wanted.items() if name not in found]:
        raise CheckpointError(
            f"{path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} keys are: {missing[:8]})"
        )
    return [found[name] for name in wanted]


def _names(spelling: Spelling, module: nn.Module, experts: Any) -> dict[str, tuple[Layout | None, Slot]]:
    """Every name that may stand behind ``layers.N.``: the layout that it belongs to, if any, and where its tensor goes.
    Those of one slot stand in the order in which messages prefer them."""
    names: dict[str, tuple[Layout | None, Slot]] = {}
    of_experts: dict[str, Slot] = {}
    for name, parameter in module.named_parameters():
        slot = Slot(name, name, (), tuple(parameter.shape))
        if name.startswith(spelling.experts):
            of_experts[name.removeprefix(spelling.experts)] = slot
        else:
            names[name] = None, slot
    for alias, name in spelling.aliases.items():
        names[alias] = names[name]
    for layout in spelling.layouts:
        slots = _single_slots(layout.single, spelling.experts, experts) if layout.single else of_experts
        names |= {layout.prefix + name: (layout, slot) for name, slot in slots.items()}
    return names


def _single_slots(projections: tuple[str, str, str], path: str, experts: Any) -> dict[str, Slot]:
    """Where the tensors of single experts go, by name behind the layout's prefix."""
    gate, up, down = projections
    num_experts, size, width = experts.down_proj.shape
    slots: dict[str, Slot] = {}
    for expert in range(num_experts):
        for projection, parameter, part, shape in (
            (gate, "gate_up_proj", (expert, slice(0, width)), (width, size)),
            (up, "gate_up_proj", (expert, slice(width, None)), (width, size)),
            (down, "down_proj", (expert,), (size, width)),
        ):
            name = f"{expert}.{projection}"
            slots[name] = Slot(path + name, path + parameter, part, shape)
    return slots
