"""transformers' models out of checkpoints whose experts it can't load quantised.

transformers loads all but the experts, with its own renaming, tying and initialisation of buffers, into a model whose
experts have no weights; those come in their place one layer after the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers.utils import GENERATION_CONFIG_NAME, logging

from cupymoe.checkpoint.errors import CheckpointError
from cupymoe.checkpoint.files import config_file
from cupymoe.checkpoint.model import ModelCheckpoint
from cupymoe.integrations import EXPERTS_IMPLEMENTATION, are_experts_set_to_cupymoe
from cupymoe.weights.quantized import QuantizedWeight, put_weight

_LAYER = re.compile(r"(?:^|\.)layers\.([0-9]+)\.")


def load_model(checkpoint: ModelCheckpoint, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model of a checkpoint; all else is as of :func:`cupymoe.integrations.transformers.load_quantized`, whose
    module has to be imported before."""
    model, experts = _without_experts(checkpoint, device, dtype)
    by_layer = _by_layer(checkpoint, experts)
    model.to(device)
    for layer in logging.tqdm(checkpoint.layers, desc="Loading experts"):
        loaded = checkpoint.load_experts(layer, device, dtype)
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(loaded, name)
            if isinstance(weight, QuantizedWeight):
                put_weight(by_layer[layer], name, weight)
            else:
                by_layer[layer].register_parameter(name, weight)
    return cast(transformers.PreTrainedModel, model)


def _without_experts(
    checkpoint: ModelCheckpoint, device: torch.device, dtype: torch.dtype
) -> tuple[Any, dict[str, nn.Module]]:
    """The model on the CPU, and its modules of experts, which have lost their weights."""
    folder = config_file(checkpoint.path).parent
    config = transformers.AutoConfig.from_pretrained(folder)
    for each in (config, config.get_text_config()):
        if hasattr(each, "quantization_config"):
            del each.quantization_config  # transformers would prepare for what it can't load
    cls = _model_class(checkpoint, config)
    experts: dict[str, nn.Module] = {}

    def init(self: Any, *args: Any, **settings: Any) -> None:
        cls.__init__(self, *args, **settings)
        for name, module in self.named_modules():
            if are_experts_set_to_cupymoe(module):
                experts[name] = module
                for weight in [*module._parameters]:
                    delattr(module, weight)
                module._is_hf_initialized = True  # so that transformers does not look for what it would initialise

    # A class of the same name, because transformers finds the renaming of keys by it; its model is of cls afterwards.
    hollow: Any = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    model, info = hollow.from_pretrained(
        None,
        config=config,
        state_dict=checkpoint.load_others(device, dtype),
        dtype=dtype,
        experts_implementation=EXPERTS_IMPLEMENTATION,
        generation_config=_generation_config(folder),
        ignore_mismatched_sizes=True,  # which are refused below, as all that is amiss
        output_loading_info=True,
    )
    model.__class__ = cls
    model.name_or_path = model.config.name_or_path = str(folder)
    _check_complete(checkpoint, info)
    return model, experts


def _model_class(checkpoint: ModelCheckpoint, config: transformers.PretrainedConfig) -> Any:
    """What the checkpoint's config.json says that it is of."""
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{config_file(checkpoint.path)}: architectures must name one of transformers' models, got {names}"
        )
    return cls


def _generation_config(folder: Path) -> transformers.GenerationConfig | None:
    if not (folder / GENERATION_CONFIG_NAME).exists():
        return None  # transformers makes one
    return transformers.GenerationConfig.from_pretrained(folder)


def _check_complete(checkpoint: ModelCheckpoint, info: dict[str, Any]) -> None:
    """Every key of the model was loaded, and no other."""
    for keys, what in (
        (info["missing_keys"], "missing"),
        (info["unexpected_keys"], "left over: nothing of the model reads it"),
    ):
        if keys:
            first, *_ = some = sorted(keys)[:8]
            raise CheckpointError(f"{checkpoint.path}: {first} is {what} ({len(keys)} keys are: {some})")
    for key, given, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{checkpoint.path}: {key} must have shape {[*wanted]}, as config.json says, got {[*given]}"
        )
    if info["error_msgs"]:
        raise CheckpointError(f"{checkpoint.path}: {info['error_msgs'][0]}")


def _by_layer(checkpoint: ModelCheckpoint, experts: dict[str, nn.Module]) -> dict[int, nn.Module]:
    """The model's experts by the number of their layer, seen to be in the layers that the checkpoint has."""
    by_layer = {int(match[1]): module for name, module in experts.items() if (match := _LAYER.search(name))}
    if len(by_layer) != len(experts) or {*by_layer} != {*checkpoint.layers}:
        raise CheckpointError(
            f"{checkpoint.path}: layers with experts must be {sorted(by_layer)}, as config.json says, got "
            f"{[*checkpoint.layers]}"
        )
    return by_layer
