"""What a checkpoint's config.json says of quantised weights: which modules, and how they are stored."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import DTYPES, PathLike, config_file, on_disk, open_file, read_json
from cupymoe.checkpoint.gguf import SUFFIX
from cupymoe.checkpoint.quantised.bitsandbytes import Nf4
from cupymoe.checkpoint.quantised.compressed_tensors import Floats8, MxFloats4, NvFloats4, PackedIntegers
from cupymoe.checkpoint.quantised.finegrained_fp8 import FineGrainedFp8
from cupymoe.checkpoint.quantised.fp8 import BLOCK
from cupymoe.checkpoint.quantised.ggml import Q4_0
from cupymoe.checkpoint.quantised.modelopt import ModelOptFp4, ModelOptFp8
from cupymoe.checkpoint.quantised.storage import Storage
from cupymoe.checkpoint.quantised.transposed import Awq, Gptq
from cupymoe.weights.format import FORMATS

_GROUPS = (32, 64, 128)


class Scheme(NamedTuple):
    """How the weights of a checkpoint are stored, as far as one may ask for them by the name of their module."""

    file: Path
    """That says so."""
    storage: Callable[[str], Storage | None]
    """How a module's weight is stored; None: unquantised. It raises a CheckpointError for what is not served."""


class _Settings(dict[str, Any]):
    """A part of a file's JSON, and what messages call it."""

    def __init__(self, file: Path, where: str, given: object) -> None:
        if not isinstance(given, dict):
            raise CheckpointError(f"{file}: {where} must be an object, got {given!r}")
        super().__init__(given)
        self.file, self.where = file, where

    def part(self, name: str) -> _Settings:
        return _Settings(self.file, f"{self.where}.{name}", self.get(name))

    def refuse(self, name: str, allowed: object, why: str = "") -> CheckpointError:
        return CheckpointError(
            f"{self.file}: {self.where}.{name} must be {allowed}, got {self.get(name)!r}{why and f': {why}'}"
        )

    def one_of(self, name: str, *allowed: Any, default: Any = None) -> Any:
        """A setting that must be one of those allowed, of their types too; ``default`` where it is not there."""
        given = self.get(name, default)
        for each in allowed:
            if type(given) is type(each) and given == each:
                return given
        raise self.refuse(name, f"one of {[*allowed]}")

    def names(self, *names: str) -> list[str]:
        """Lists of strings that may be there, joined."""
        result: list[str] = []
        for name in names:
            given = self.get(name) or []
            if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
                raise self.refuse(name, "a list of names")
            result += given
        return result


def read_scheme(path: PathLike, files: Mapping[str, Path]) -> Scheme | None:
    """What the ``config.json`` beside a checkpoint says of quantised weights, or ModelOpt's ``hf_quant_config.json``;
    None if they say nothing, or are not there. A GGUF file speaks for itself.

    Args:
        path: the checkpoint.
        files: the file of each of its keys.

    Raises:
        CheckpointError: it is not one that is known, or contradicts itself.
    """
    file = config_file(path)
    if on_disk(path).suffix == SUFFIX:
        return Scheme(on_disk(path), _gguf(files))
    given: list[tuple[str, Any]] = []
    if file.exists():
        config = read_json(file)
        text = config.get("text_config")
        parts = (("", config), ("text_config.", text if isinstance(text, dict) else {}))
        given = [
            (f"{prefix}quantization_config", part["quantization_config"])
            for prefix, part in parts
            if part.get("quantization_config") is not None
        ]
    if not given:
        file = file.with_name("hf_quant_config.json")
        if not file.exists():
            return None
        settings = _Settings(file, "quantization", read_json(file).get("quantization"))
        return Scheme(file, _modelopt(settings))
    where, first = given[0]
    if any(other != first for _, other in given[1:]):
        raise CheckpointError(f"{file}: {given[0][0]} and {given[1][0]} must be the same where both are there")
    settings = _Settings(file, where, first)
    method = settings.one_of("quant_method", *_METHODS)
    try:
        return Scheme(file, _METHODS[method](settings))
    except re.error as error:
        raise CheckpointError(
            f"{file}: {where} has {error.pattern!r}, which is no valid regular expression: {error}"
        ) from error


# --- names of modules -------------------------------------------------------------------------------------------------


def _names_of(module: str) -> list[str]:
    """A module of the experts and those that it is in, the experts as a whole the last."""
    names = [module]
    while re.search(r"\.(?:experts|moe)\.", names[-1]):
        names.append(names[-1].rpartition(".")[0])
    return names


def _in_layers(name: str) -> str:
    """A name from ``layers.N.`` on: what stands before differs between a file and its config."""
    return name[match.start() :] if (match := re.search(r"\blayers\.\d", name)) else name


def _any_name(rule: Callable[[str], bool]) -> Callable[[str], bool]:
    """Whether a rule holds for a module of the experts or for those that it is in."""
    cached = functools.cache(rule)
    return lambda module: any(map(cached, _names_of(module)))


def _are_targets(targets: list[str]) -> Callable[[str], bool]:
    """compressed-tensors' rule: names, or regular expressions behind ``re:``."""
    patterns = [re.compile(target[3:]) for target in targets if target.startswith("re:")]
    names = {_in_layers(target) for target in targets}
    return _any_name(lambda name: _in_layers(name) in names or any(pattern.match(name) for pattern in patterns))


def _are_kept(keys: list[str]) -> Callable[[str], bool]:
    """transformers' rule for modules that are not to be converted; or a key is some of the name's parts, in a row."""
    patterns = [re.compile(rf"(?:{key})(?:(?<=\.)|(?=\.|$))") for key in keys]
    return _any_name(
        lambda name: any(pattern.match(name) for pattern in patterns) or any(f".{key}." in f".{name}." for key in keys)
    )


def _are_excluded(globs: list[str]) -> Callable[[str], bool]:
    """ModelOpt's rule."""
    return _any_name(lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs))


def _unless(is_plain: Callable[[str], bool], storage: Storage) -> Callable[[str], Storage | None]:
    return lambda module: None if is_plain(module) else storage


def _gguf(files: Mapping[str, Path]) -> Callable[[str], Storage | None]:
    def storage(module: str) -> Storage | None:
        key = f"{module}.weight"
        if key not in files:
            return None
        with open_file(files[key]) as handle:
            dtype = handle.get_slice(key).get_dtype()
        if dtype == "Q4_0":
            return Q4_0(FORMATS["int4_g32"])
        if dtype not in DTYPES:
            raise CheckpointError(f"{files[key]}: {key} must be of type Q4_0, {', '.join(DTYPES)}, got {dtype}")
        return None

    return storage


# --- the methods ------------------------------------------------------------------------------------------------------


def _compressed_tensors(settings: _Settings) -> Callable[[str], Storage | None]:
    groups = settings.part("config_groups")
    is_ignored = _are_targets(settings.names("ignore"))
    if settings.get("sparsity_config"):
        settings.part("sparsity_config").one_of("format", "dense")
    if settings.get("transform_config"):
        raise settings.refuse("transform_config", "empty", "hidden states would have to be rotated, too")
    by_group = [(groups.part(name), groups.part(name).names("targets")) for name in groups]
    is_target = [_are_targets(targets) for _, targets in by_group]

    def storage(module: str) -> Storage | None:
        if is_ignored(module):
            return None
        taken = [group for (group, _), is_its in zip(by_group, is_target, strict=True) if is_its(module)]
        # The class of a module comes second: experts are taken for the linear layers that they were before.
        taken = taken or [group for group, targets in by_group if "Linear" in targets]
        if len(taken) > 1:
            raise CheckpointError(
                f"{settings.file}: {module} must be in one of {settings.where}.config_groups, got "
                f"{[group.where for group in taken]}"
            )
        return _compressed_weights(settings, taken[0]) if taken else None

    return storage


def _compressed_weights(settings: _Settings, group: _Settings) -> Storage | None:
    """How compressed-tensors stores the weights of one of its config_groups."""
    if group.get("weights") is None:
        return None
    named = group if group.get("format") is not None else settings
    format = named.one_of(
        "format",
        "pack-quantized",
        "float-quantized",
        "naive-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
    )
    return _compressed_storage(format, group.part("weights"))


def compressed_storage(format: str, weights: Mapping[str, Any], file: str) -> Storage:
    """How compressed-tensors stores weights in one of its formats.

    Args:
        format: its name there, one that is read.
        weights: their settings, as a group of ``config_groups`` has them.
        file: what messages call the place that they are from.

    Raises:
        CheckpointError: it is not served; the message says which setting is not.
    """
    return _compressed_storage(format, _Settings(Path(file), "weights", weights))


def _compressed_storage(format: str, weights: _Settings) -> Storage:
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise weights.refuse("actorder", "null, 'weight' or 'static'", "an act-order has no place in a format")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    weights = _Settings(weights.file, weights.where, {**weights, "strategy": strategy})
    symmetric = weights.one_of("symmetric", True, False, default=True)
    if format == "pack-quantized":
        weights.one_of("type", "int", default="int")
        if weights.one_of("num_bits", 4, 8) == 8:
            weights.one_of("strategy", "channel")
            weights.one_of("symmetric", True, default=True)
            return PackedIntegers(FORMATS["int8"])
        weights.one_of("strategy", "group")
        group_size = weights.one_of("group_size", *_GROUPS)
        return PackedIntegers(FORMATS[f"int4_g{group_size}{'' if symmetric else '_zero'}"])
    weights.one_of("symmetric", True, default=True)
    weights.one_of("type", "float")
    if format in ("float-quantized", "naive-quantized"):
        weights.one_of("num_bits", 8)
        if weights.one_of("strategy", "channel", "tensor", "block") != "block":
            return Floats8(FORMATS["fp8"], strategy)
        weights.one_of("block_structure", [BLOCK, BLOCK])
        return Floats8(FORMATS["fp8_g128"], strategy)
    weights.one_of("num_bits", 4)
    if format == "nvfp4-pack-quantized":
        weights.one_of("strategy", "tensor_group", "group")
        weights.one_of("group_size", 16)
        return NvFloats4(FORMATS["nvfp4"])
    weights.one_of("strategy", "group")
    weights.one_of("group_size", 32)
    return MxFloats4(FORMATS["mxfp4"])


def _modelopt(settings: _Settings) -> Callable[[str], Storage | None]:
    algorithm = settings.one_of("quant_algo", "NVFP4", "FP8")
    storage: Storage = ModelOptFp8(FORMATS["fp8"], "tensor")
    if algorithm == "NVFP4":
        sized = [settings] if "group_size" in settings else []
        if "config_groups" in settings:
            groups = settings.part("config_groups")
            sized += [groups.part(name).part("weights") for name in groups]
        for each in sized:
            each.one_of("group_size", 16)
        storage = ModelOptFp4(FORMATS["nvfp4"])
    return _unless(_are_excluded(settings.names("ignore", "exclude_modules")), storage)


def _fp8(settings: _Settings) -> Callable[[str], Storage | None]:
    settings.one_of("fmt", "e4m3", default="e4m3")
    settings.one_of("expert_dtype", "fp8", None, default="fp8")
    settings.one_of("activation_scheme", "dynamic", "static", default="dynamic")
    if "weight_block_size" not in settings:
        raise settings.refuse("weight_block_size", f"[{BLOCK}, {BLOCK}] or null", "it must be there, with no default")
    blocks = settings.one_of("weight_block_size", [BLOCK, BLOCK], None)
    storage = FineGrainedFp8(FORMATS["fp8_g128" if blocks else "fp8"], "block" if blocks else "tensor")
    return _unless(_are_kept(settings.names("modules_to_not_convert", "ignored_layers")), storage)


def _gptq(settings: _Settings) -> Callable[[str], Storage | None]:
    settings.one_of("bits", 4)
    group_size = settings.one_of("group_size", *_GROUPS)
    symmetric = settings.one_of("sym", True, False)
    version = settings.one_of("checkpoint_format", "gptq", "gptq_v2", default="gptq")
    format = FORMATS[f"int4_g{group_size}{'' if symmetric else '_zero'}"]
    needs_order = settings.one_of("desc_act", True, False, default=False)
    stored = Gptq(format, zero_offset=1 if version == "gptq" else 0, needs_order=needs_order)
    changes = settings.part("dynamic") if settings.get("dynamic") else {}
    patterns = {name: re.compile(name.removeprefix("-:").removeprefix("+:")) for name in changes}

    def storage(module: str) -> Storage | None:
        for name, pattern in patterns.items():
            if pattern.match(module):
                if name.startswith("-:"):
                    return None
                raise settings.refuse("dynamic", f"without settings of its own for {module}")
        return stored

    return storage


def _awq(settings: _Settings) -> Callable[[str], Storage | None]:
    settings.one_of("bits" if "bits" in settings else "w_bit", 4)
    group_size = settings.one_of("group_size" if "group_size" in settings else "q_group_size", *_GROUPS)
    settings.one_of("zero_point", True)
    settings.one_of("version", "gemm", "GEMM", default="gemm")
    storage = Awq(FORMATS[f"int4_g{group_size}_zero"])
    return _unless(_are_kept(settings.names("modules_to_not_convert")), storage)


def _bitsandbytes(settings: _Settings) -> Callable[[str], Storage | None]:
    settings.one_of("load_in_4bit", True)
    settings.one_of("bnb_4bit_quant_type", "nf4")
    settings.one_of("bnb_4bit_quant_storage", "uint8", default="uint8")
    storage = Nf4(FORMATS["nf4"], is_nested=settings.one_of("bnb_4bit_use_double_quant", True, False, default=False))
    return _unless(_are_kept(settings.names("llm_int8_skip_modules")), storage)


_METHODS: Mapping[str, Callable[[_Settings], Callable[[str], Storage | None]]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _modelopt,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
}
"""By ``quant_method``."""
