"""The names that a layer's tensors have in checkpoints, and where each tensor goes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import DTYPES, PathLike
from cupymoe.checkpoint.quantised.storage import Rule, Storage

_LAYER_KEY = re.compile(
    r"(?P<prefix>(?:(?:(?:model\.)?(?:language_model\.)?|language_model\.model\.)layers|blk)\.(?:0|[1-9][0-9]*)\.)"
    r"(?P<name>.+)"
)
# Any spelling of a key of a router or of experts: what a family doesn't know is refused by name, never passed over.
_KEY_OF_A_LAYER = re.compile(
    r"(?:^|\.)layers\.(?P<layer>[0-9]+)\.(?:.*\.)?(?:router|experts|moe)(?:\.|$)"
    r"|(?:^|\.)blk\.(?P<block>[0-9]+)\.(?:.*_exps|ffn_gate_inp)(?:\.|$)"  # GGUF's words
)


class Layout(NamedTuple):
    """One of the ways in which a family's checkpoints hold the experts of a layer."""

    prefix: str
    """What the names of their tensors begin with, behind ``layers.N.``"""
    single: tuple[str, str, str] | None = None
    """Of layouts with one weight for each projection of each expert, the names of its gate, up and down behind
    ``<id>.``."""
    stacked: tuple[str, ...] | None = None
    """Of layouts with one weight for each projection of all experts, the names of gate, up and down, or of gate and up
    in one and down. Neither this nor ``single``: the weights are the parameters, and have their names."""

    @property
    def ending(self) -> str:
        """What the name of an unquantised weight goes on with."""
        return ".weight" if self.single or self.stacked else ""


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


class Place(NamedTuple):
    """A weight as files hold it: all of a parameter of the module that is read, or the part that is one expert's."""

    layouts: tuple[Layout, ...]
    """That have it: those that have one name in common are alike but for other names."""
    parameter: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]
    parts: int
    """How many projections the rows are of, one after the other: 2 where gate and up are fused."""


class Target(NamedTuple):
    """Where a tensor goes: a parameter of the module that is read, or the part of it that belongs to one expert."""

    name: str
    """The same for every spelling of the tensor."""
    parameter: str
    part: tuple[int | slice, ...]
    rule: Rule
    tensor: str = ""
    """Of a quantised weight, which of its tensors this is, in the words of its storage."""


class Stored(NamedTuple):
    """How the experts of a layer are stored, by the names of their parameters; those in neither are plain."""

    quantised: dict[str, Storage]
    left_plain: dict[str, Storage]
    """Plain parameters beside which there may be scales all the same, which nobody reads."""


class Found(NamedTuple):
    """A key of a layer, its file, and where its tensor goes."""

    key: str
    file: Path
    target: Target


def layer_of(key: str) -> int | None:
    """The layer that a key belongs to if it is one of a router or of experts, in whichever spelling."""
    match = _KEY_OF_A_LAYER.search(key)
    return int(match["layer"] or match["block"]) if match else None


def places(spelling: Spelling, module: nn.Module) -> dict[str, Place]:
    """Every weight of the experts in every layout, by its name behind ``layers.N.``, which ends where the names of the
    tensors that it consists of begin."""
    experts: Any = module.get_submodule(spelling.experts.removesuffix("."))
    num_experts, size, width = experts.down_proj.shape
    gate, up = slice(0, width), slice(width, None)
    has_halves = experts.activation.is_gated and not experts.activation.is_interleaved
    found: dict[str, Place] = {}

    def add(layout: Layout, name: str, parameter: str, part: tuple[int | slice, ...], *shape: int) -> None:
        parts = 2 if parameter == "gate_up_proj" and not part and has_halves else 1
        name = layout.prefix + name
        others = found[name].layouts if name in found else ()
        found[name] = Place((*others, layout), spelling.experts + parameter, part, shape, parts)

    for layout in spelling.layouts:
        if layout.single:
            for expert in range(num_experts):
                first, second, last = (f"{expert}.{name}" for name in layout.single)
                add(layout, first, "gate_up_proj", (expert, gate), width, size)
                add(layout, second, "gate_up_proj", (expert, up), width, size)
                add(layout, last, "down_proj", (expert,), size, width)
        elif layout.stacked:
            *firsts, last = layout.stacked
            if len(firsts) == 1:
                add(layout, firsts[0], "gate_up_proj", (), *experts.gate_up_proj.shape)
            else:
                add(layout, firsts[0], "gate_up_proj", (slice(None), gate), num_experts, width, size)
                add(layout, firsts[1], "gate_up_proj", (slice(None), up), num_experts, width, size)
            add(layout, last, "down_proj", (), num_experts, size, width)
        else:
            for name, parameter in experts.named_parameters():
                add(layout, name, name, (), *parameter.shape)
    return found


def match(
    path: PathLike,
    files: Mapping[str, Path],
    layer: int,
    spelling: Spelling,
    module: nn.Module,
    stored: Stored,
) -> list[Found]:
    """Every key of the layer, with nothing missing and nothing left over.

    Args:
        path: what messages call the checkpoint.
        files: the file of each key of the checkpoint.
        layer: whose keys.
        spelling: of the layer.
        module: what is read, with parameters of the shapes that they must have.
        stored: how the experts are.
    """
    experts: Any = module.get_submodule(spelling.experts.removesuffix("."))
    names = _names(path, spelling, module, stored)
    where = f"[model.][language_model.]layers.{layer}.{spelling.places}"
    found: dict[str, Found] = {}
    layouts, narrowed_by = spelling.layouts, ""  # those that the keys so far leave open, and the key that closed others
    contradiction: tuple[str, str] | None = None
    prefixes: dict[str, str] = {}
    for key, file in files.items():
        if not spelling.is_read(key, layer):
            continue
        parts = _LAYER_KEY.fullmatch(key)
        if parts is None or parts["name"] not in names:
            raise CheckpointError(
                f"{file}: {key} is left over: nothing of a layer with {experts.down_proj.shape[0]} "
                f"{_described(stored.quantised)} reads it; its tensors are read from {where}"
            )
        its_layouts, target = names[parts["name"]]
        prefixes.setdefault(parts["prefix"], key)
        if not its_layouts:
            pass
        elif not (common := tuple(layout for layout in layouts if layout in its_layouts)):
            contradiction = contradiction or (narrowed_by, key)
        elif common != layouts:
            layouts, narrowed_by = common, key
        if target.name in found:
            raise CheckpointError(f"{file}: {key} and {found[target.name].key} are both {target.name}; one is allowed")
        found[target.name] = Found(key, file, target)
    if not found:
        there = sorted({number for number in map(layer_of, files) if number is not None})
        raise CheckpointError(f"{path}: no key {where} is there; the layers that have one are {there}")
    if contradiction:
        first, second = contradiction
        raise CheckpointError(f"{path}: {first} and {second} are two layouts of the experts; one is allowed")
    if len(prefixes) > 1:
        first, second, *_ = prefixes.values()
        raise CheckpointError(f"{path}: {first} and {second} are two prefixes of a layer; one is allowed")
    (prefix,), taken = prefixes, layouts[0]
    apart = taken.single or taken.stacked
    if apart and len(apart) == 3 and (not experts.activation.is_gated or experts.activation.is_interleaved):
        raise CheckpointError(
            f"{apart[0]} and {apart[1]} must be one tensor, gate_up_proj: {experts.activation.name} does not read "
            "[gate | up], which is how two are joined"
        )
    # What is optional is there for all of a parameter or for none of it.
    optional = {(each.target.parameter, each.target.tensor) for each in found.values()}
    wanted: dict[str, str] = {}
    for name, (its_layouts, target) in names.items():
        if its_layouts and taken not in its_layouts:
            continue
        if not target.rule.optional or (target.parameter, target.tensor) in optional:
            wanted.setdefault(target.name, prefix + name)
    if missing := [key for name, key in wanted.items() if name not in found]:
        raise CheckpointError(
            f"{path}: {missing[0]} is missing ({len(missing)} of {len(wanted)} keys are: {missing[:8]})"
        )
    return [found[name] for name in wanted]


def layer_keys(files: Mapping[str, Path], layer: int, spelling: Spelling) -> Iterator[tuple[str, str, str]]:
    """The keys of a layer that are spelt as such: each with its prefix up to ``layers.N.``, and the name behind it."""
    for key in files:
        if spelling.is_read(key, layer) and (parts := _LAYER_KEY.fullmatch(key)):
            yield key, parts["prefix"], parts["name"]


def _described(storages: Mapping[str, Storage]) -> str:
    if not storages:
        return "unquantised experts"
    return f"experts quantised as {', '.join(f'{storage} ({name})' for name, storage in storages.items())}"


def _names(
    path: PathLike, spelling: Spelling, module: nn.Module, stored: Stored
) -> dict[str, tuple[tuple[Layout, ...], Target]]:
    """Every name that may stand behind ``layers.N.``: the layouts that have it, if any, and where its tensor goes.
    Those of one target stand in the order in which messages prefer them."""
    names: dict[str, tuple[tuple[Layout, ...], Target]] = {}
    for name, value in module.named_parameters():
        if not name.startswith(spelling.experts):
            names[name] = (), Target(name, name, (), Rule((*DTYPES,), (tuple(value.shape),)))
    for alias, name in spelling.aliases.items():
        names[alias] = names[name]
    for stem, place in places(spelling, module).items():
        layouts, parameter, part, shape, parts = place
        layout = layouts[0]
        # What a target is called must not depend on the layout's prefix.
        target_name = spelling.experts + stem.removeprefix(layout.prefix)
        is_plain = parameter not in stored.quantised
        if is_plain:
            target = Target(target_name + layout.ending, parameter, part, Rule((*DTYPES,), (shape,)))
            names[stem + layout.ending] = layouts, target
        storage = (stored.left_plain if is_plain else stored.quantised).get(parameter)
        if storage is not None and (layout.single or storage.is_fused):
            try:
                rules = storage.rules(shape, parts)
            except ValueError as error:
                raise CheckpointError(f"{path}: {target_name} can't be {storage}: {error}") from error
            for tensor, rule in rules.items():
                if is_plain and tensor == "weight":
                    continue
                rule = rule._replace(optional=rule.optional or is_plain)
                target = Target(f"{target_name}.{tensor}", parameter, part, rule, tensor)
                for ending in tensor_endings(layout, tensor):
                    names[stem + ending] = layouts, target
    return names


def tensor_endings(layout: Layout, tensor: str) -> tuple[str, ...]:
    """How the name of a quantised weight goes on with that of one of its tensors.

    A fused weight's own ``weight_packed`` is spelt ``gate_up_proj_packed`` or ``gate_up_proj.weight_packed``.
    """
    if layout.ending:
        return (f".{tensor}",)
    return tensor.removeprefix("weight") if tensor.startswith("weight") else f"_{tensor}", f".{tensor}"
