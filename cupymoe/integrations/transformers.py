"""cupymoe as an experts implementation of transformers: importing this module registers it as ``"cupymoe"``.

``from_pretrained(..., experts_implementation="cupymoe")`` and ``model.set_experts_implementation("cupymoe")`` then work
for every kind of experts that transformers has, gated or not, with biases or without, transposed or not, gate and up
interleaved or not, if their gating function is an activation of :class:`cupymoe.MoEActivation`; others are refused by
name (docs/models.md lists both). ``"cupymoe_invariant"`` computes the same with ``numerics="invariant"``: the bits of a
token do not depend on what else is in the batch, in training or inference (docs/invariance.md). What the calls keep for
the gradients is :func:`cupymoe.set_keep`'s to say.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cupymoe.checkpoint.files import PathLike
from cupymoe.checkpoint.model import ModelCheckpoint
from cupymoe.checkpoint.tensors import check_destination
from cupymoe.checks.settings import check_module
from cupymoe.customisation import is_wrapper, path_of
from cupymoe.experts import MoEExperts
from cupymoe.functional import fused_experts
from cupymoe.integrations import (
    NUMERICS_OF,
    are_experts_set_to_cupymoe,
    dtype_beside,
    keep_of,
)
from cupymoe.integrations.loading import load_model
from cupymoe.integrations.served import Served, activation_of, served
from cupymoe.parameters import DTYPES
from cupymoe.weights.quantize import quantize
from cupymoe.weights.quantized import QuantizedWeight, put_weight

__all__ = [
    "Served",
    "activation_of",
    "experts_forward",
    "load_quantized",
    "quantize_experts",
    "replace_routers",
    "served",
]

# Models have different names for the number of their experts.
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    numerics: str = "fast",
) -> torch.Tensor:
    """transformers' experts call: ``[T, H]``, ``[T, K]``, ``[T, K]`` -> ``[T, H]``, in the dtype of ``hidden_states``.

    An index of ``num_experts`` is transformers' mark for a pair of another rank; it contributes nothing.
    Computed in the dtype of the weights, as ``grouped_mm`` does where autocast left other hidden states.

    Raises:
        ValueError: the module has a property that cupymoe can't serve, its ``act_fn`` is none that it has, or its
            gating function (``_apply_gate``) computes none of cupymoe's activations; the message names the module's
            path and says what.
    """
    try:
        gate_up_proj, down_proj, gate_up_bias, down_bias, activation = served(self)
    except ValueError as error:
        raise ValueError(f"{path_of(self)}: {error}") from None
    dtype = hidden_states.dtype
    wanted = dtype_beside((gate_up_proj, down_proj, gate_up_bias, down_bias), dtype)
    if dtype != wanted:  # to() costs 1 us where it has nothing to do
        hidden_states = hidden_states.to(wanted)
    output = fused_experts(
        hidden_states,
        gate_up_proj,
        down_proj,
        top_k_index,
        top_k_weights,
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        numerics=numerics,
        keep=keep_of(self),
        global_num_experts=_global_num_experts(self, down_proj.shape[0]),
    )
    return output if output.dtype == dtype else output.to(dtype)


def _global_num_experts(experts: Any, num_experts: int) -> int | None:
    """How many experts the router chooses from, where expert parallelism leaves but ``num_experts`` of them here."""
    if "forward" not in vars(experts):  # transformers' parallel layers put theirs around the class's
        return None
    config = experts.config
    for name in _NUM_EXPERTS:
        count = getattr(config, name, None)
        if count is not None:
            return count if isinstance(count, int) and count > num_experts else None
    return None


def replace_routers(model: nn.Module) -> int:
    """Let every ``Gemma4TextRouter`` of a model compute as :class:`cupymoe.Gemma4Router`.

    The modules stay, with their parameters, adapters, hooks, parametrizations and shards, and so do their ``norm``,
    whose ``eps`` and hooks are obeyed, and their config, of which ``top_k_experts`` is read in each call;
    ``output_router_logits`` goes on to work. The experts chosen are transformers' but for exact ties, which go to the
    lower index (docs/numerics.md), and, up to 32 tokens on CUDA, for logits that differ by the last bit
    (docs/routing.md). With ``experts_implementation="cupymoe_invariant"`` they differ so for any number of tokens, and
    a router that is not its parameters alone (an adapter or a hook on ``proj``, autocast) is refused by its call.

    Returns:
        How many routers there are.

    Raises:
        ValueError: the model has none, or one whose ``forward`` was replaced; nothing was changed then.
    """
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    from cupymoe.integrations import gemma4

    found = {name: module for name, module in model.named_modules() if isinstance(module, Gemma4TextRouter)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no Gemma4TextRouter to replace")
    for name, router in found.items():
        gemma4.check_router(name or type(router).__name__, router)
    for router in found.values():
        gemma4.take_over(router)
    return len(found)


def quantize_experts(
    model: nn.Module,
    format: str,
    *,
    group_size: int | tuple[int, int] | None = None,
    scale_rule: str = "absmax",
) -> int:
    """Quantise the weights of every experts module of a model that cupymoe computes, in place and one after the other.

    The weights of a module are gone before the next one's are quantised, so that no more memory is taken than one
    module's. Biases, routers and everything else stay. A :class:`cupymoe.QuantizedWeight` takes the place of each
    parameter, with ``state_dict`` keys like ``experts.gate_up_proj.codes``; only ``experts_implementation="cupymoe"``
    computes with it.

    Adapters of PEFT come first: ``get_peft_model`` and :func:`cupymoe.integrations.peft.use_low_rank`, and then this,
    because PEFT adapts parameters, and there are none afterwards.

    Args:
        model: with ``experts_implementation="cupymoe"``, or holding :class:`cupymoe.MoEExperts`.
        format, group_size, scale_rule: as of :func:`cupymoe.quantize`; a pair of group sizes is that of the first
            weight and that of ``down_proj``.

    Returns:
        How many modules of experts were quantised.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it holds no such experts, or some that cupymoe does not serve, that are quantised already, that are
            shards or not there, or that have parametrizations; or PEFT would merge its adapters. The message names
            their path, and nothing was changed. Or the format does not fit a weight: the modules before it are
            quantised then.
    """
    check_module("model", model)
    found = {path: module for path, module in model.named_modules() if _is_ours(module)}
    if not found:
        raise ValueError(
            f"model must hold experts that cupymoe computes; {type(model).__name__} holds none: "
            'set experts_implementation="cupymoe"'
        )
    for path, experts in found.items():
        _check_quantizable(path or type(experts).__name__, experts)
    for path, wrapper in model.named_modules():
        if type(wrapper).__module__.startswith("peft.") and getattr(wrapper, "parameter_name", None) in _WEIGHTS:
            raise ValueError(
                f"{path}: adapters of quantised experts must be computed unmerged: call "
                "cupymoe.integrations.peft.use_low_rank(model) first"
            )
    for path, experts in found.items():
        gate_up_proj, down_proj, *_ = _weights_of(experts)
        try:
            quantized = quantize(gate_up_proj, down_proj, format, group_size=group_size, scale_rule=scale_rule)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        del gate_up_proj, down_proj
        for name, weight in zip(_weight_names(experts), quantized, strict=True):
            assert isinstance(weight, QuantizedWeight)
            put_weight(experts, name, weight)
    return len(found)


def load_quantized(
    path: PathLike, *, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> transformers.PreTrainedModel:
    """A model out of a checkpoint whose experts are quantised, which they stay: Gemma 4, Qwen3-MoE or Mixtral.

    It reads every storage in the table of docs/checkpoints.md that is found in safetensors, most of which
    ``from_pretrained`` can't load, or only by making the experts' weights plain: compressed-tensors, ModelOpt, FP8,
    and, with linear layers that are not quantised, GPTQ, AWQ and nf4. Linear layers beside the experts are dequantised
    where they are stored by one of the first three.

    Everything but the experts goes from the files to the device tensor by tensor, as ``from_pretrained`` loads it; then
    the experts, one layer after the other, so that no more memory is taken than the model's and one layer's. If that
    fails or is interrupted, there is no model.

    Args:
        path: a folder, a ``.safetensors`` file or an index, on this machine, with ``config.json`` beside it.
        device: where the model goes; not the meta device.
        dtype: bfloat16, float16, float32 or float64, of all that is not quantised.

    Returns:
        A model of the class that ``config.json`` names, in evaluation mode, with ``experts_implementation="cupymoe"``.
        Its experts hold a :class:`cupymoe.QuantizedWeight` in the place of each parameter that is quantised.

    Raises:
        CheckpointError: experts are not as :func:`cupymoe.checkpoint.load_layer` or
            :func:`cupymoe.checkpoint.load_experts` would read them, or none are quantised; a key of the model is
            missing, left over or misshapen; another weight is quantised in a way that is not read; or ``config.json``
            is not that of one of transformers' models. The message names the file or the key.
        ValueError: ``dtype`` is none of the four, or ``device`` is the meta device.
        TypeError: ``path`` is neither a str nor an ``os.PathLike``.
        ImportError: safetensors is not installed.
    """
    check_destination(device, None)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[*DTYPES]}, got {dtype}")
    return load_model(ModelCheckpoint(path), torch.device(device), dtype)


_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def _is_ours(module: Any) -> bool:
    return isinstance(module, MoEExperts) or are_experts_set_to_cupymoe(module)


def _weights_of(experts: Any) -> tuple[Any, ...]:
    return experts.projections() if isinstance(experts, MoEExperts) else served(experts)


def _weight_names(experts: Any) -> list[str]:
    """Of the first weight and of the second."""
    return [name for name in _WEIGHTS if isinstance(getattr(experts, name, None), nn.Parameter | QuantizedWeight)]


def _check_quantizable(path: str, experts: Any) -> None:
    try:
        weights = _weights_of(experts)[:2]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name, weight in zip(_weight_names(experts), weights, strict=True):
        if isinstance(weight, QuantizedWeight):
            raise ValueError(f"{path} must have plain weights, got {name} in {weight.format.name}")
        if weight.is_meta or is_wrapper(type(weight)) or not weight.numel():
            raise ValueError(
                f"{path}.{name} must be a whole tensor in memory, got a {type(weight).__name__} on {weight.device}"
            )
    if parametrize.is_parametrized(experts):
        raise ValueError(
            f"{path} must have no parametrizations, which would be lost, got some of {type(experts).__name__}"
        )


def _register(registry: Any) -> None:
    for name, numerics in NUMERICS_OF.items():
        registry.register(name, functools.partial(experts_forward, numerics=numerics))


_register(ALL_EXPERTS_FUNCTIONS)
try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
except ImportError:
    pass
else:
    # They have a registry of their own.
    _register(ALL_FP8_EXPERTS_FUNCTIONS)
