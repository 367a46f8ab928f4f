"""The checkpoint of a whole model whose experts are quantised: its layers of experts, and everything beside them."""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.families import layer_of_model
from cupymoe.checkpoint.files import PathLike, key_files, on_disk, open_file, read_headers, read_tensor
from cupymoe.checkpoint.gguf import SUFFIX
from cupymoe.checkpoint.layer import load, open_layer
from cupymoe.checkpoint.layout import layer_keys, layer_of
from cupymoe.checkpoint.quantised.linear import dequantized, find_linears
from cupymoe.checkpoint.quantised.scheme import read_scheme
from cupymoe.experts import MoEExperts

_log = logging.getLogger("cupymoe")

# For whoever keeps keys and values in 8 bits, in ModelOpt's words and in compressed-tensors'.
_KV_CACHE_SCALE = re.compile(r".*\.self_attn\.(?:[kv]_proj\.)?[kv]_scale")


class ModelCheckpoint:
    """A checkpoint in safetensors, with every key of its experts accounted for and no tensor read.

    Args:
        path: as of :mod:`cupymoe.checkpoint`, with a ``config.json`` beside it; not a GGUF file.

    Raises:
        CheckpointError: a layer is not what :func:`cupymoe.checkpoint.load_layer` would read, no experts are quantised,
            or the index and the headers of the files disagree.
        TypeError: ``path`` is neither a str nor an ``os.PathLike``.
        ImportError: safetensors is not installed.
    """

    def __init__(self, path: PathLike) -> None:
        if on_disk(path).suffix == SUFFIX:
            raise CheckpointError(f"{path}: a whole model is read from safetensors, not from a GGUF file")
        self.path = path
        self._files = key_files(path)
        self._headers = read_headers(path, self._files)
        self._spelling, self._skeleton = layer_of_model(path)
        self._of_layer: dict[int, dict[str, Path]] = defaultdict(dict)
        for key, file in self._files.items():
            if (layer := layer_of(key)) is not None:
                self._of_layer[layer][key] = file
        self.layers = tuple(sorted(self._of_layer))
        """Numbers of the layers that have experts, in rising order."""
        self._others = {key: key for key in self._files}  # keys by name, beside the experts
        are_quantised = [self._take_experts_out(layer) for layer in self.layers]
        if not any(are_quantised):
            raise CheckpointError(
                f"{path}: experts must be quantised, and none are: transformers' from_pretrained loads this checkpoint"
            )

    def _take_experts_out(self, layer: int) -> bool:
        """Check a layer, and leave of its keys what is not of the experts; whether these are quantised."""
        files, spelling = self._of_layer[layer], self._spelling
        with open_layer(self.path, files, layer, spelling, self._skeleton) as (tensors, storages):
            prefixes = {key: prefix for key, prefix, _ in layer_keys(files, layer, spelling)}
            for tensor in tensors:
                del self._others[tensor.key]
                if not tensor.target.parameter.startswith(spelling.experts):  # a router, which may have been an alias
                    self._others[prefixes[tensor.key] + tensor.target.parameter] = tensor.key
            return bool(storages)

    def load_experts(self, layer: int, device: torch.device | str, dtype: torch.dtype) -> MoEExperts:
        """The experts of one layer, on ``device``; ``dtype`` is that of weights that are not quantised.

        Raises:
            CheckpointError: as of :func:`cupymoe.checkpoint.load_layer`.
        """
        module = copy.deepcopy(self._skeleton)
        load(module, self.path, self._of_layer[layer], layer, self._spelling, device, dtype)
        experts = module.get_submodule(self._spelling.experts.removesuffix("."))
        assert isinstance(experts, MoEExperts)
        return experts

    def load_others(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Every tensor beside the experts by name, on the CPU and mapped to its file.

        Weights of linear layers that are quantised are dequantised to ``dtype``, on ``device``. Scales of a quantised
        cache of keys and values are left out, because the model's cache is not quantised.

        Raises:
            CheckpointError: a weight is quantised in a way that config.json does not say, or that is read of experts
                only; a tensor of it is missing, misshapen, or holds what it must not; or a file can't be read.
        """
        keys = {name: key for name, key in self._others.items() if not _KV_CACHE_SCALE.fullmatch(name)}
        if len(keys) < len(self._others):
            _log.info("%s: %d scales of a KV cache are not used", self.path, len(self._others) - len(keys))
        linears = find_linears(self.path, keys, self._headers, read_scheme(self.path, self._files))
        if linears:
            stored = ", ".join(sorted({str(linear.storage) for linear in linears.values()}))
            _log.info(
                "%s: %d weights beside the experts are %s; they are dequantised to %s",
                self.path,
                len(linears),
                stored,
                dtype,
            )
        with ExitStack() as stack:
            handles = {file: stack.enter_context(open_file(file)) for file in sorted({*self._files.values()})}
            weights = {
                f"{module}.weight": dequantized(linear, handles, device, dtype) for module, linear in linears.items()
            }
            for module, linear in linears.items():
                for tensor in linear.tensors:
                    del keys[f"{module}.{tensor}"]
            plain = {name: read_tensor(self._files[key], handles[self._files[key]], key) for name, key in keys.items()}
        return plain | weights
