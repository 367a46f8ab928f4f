"""LoRA adapters of PEFT on the experts, computed unmerged.

PEFT's ``target_parameters=["experts.gate_up_proj", "experts.down_proj"]`` works with cupymoe as it is: each call then
merges the adapters into a temporary copy of the experts' weights. :func:`use_low_rank` makes the calls of a model cost
the low-rank products instead; everything else (saving, loading, merging, several adapters) stays PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer
from torch import nn

from cupymoe.customisation import hooks_of, let_compute_as, own_forward, path_of
from cupymoe.experts import MoEExperts
from cupymoe.functional import lora_experts
from cupymoe.integrations import is_set_to_cupymoe, keep_of
from cupymoe.lora import LowRank

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def _arguments(experts: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]] | None:
    """The weights and the other settings of a call of experts that are ours to compute now: our module, or
    transformers' under ``"cupymoe"``; else None."""
    if isinstance(experts, MoEExperts):
        if experts.backend != "auto":
            return None
        gate_up_proj, down_proj, gate_up_bias, down_bias = experts.projections()
        activation, keep = experts.activation, experts.keep
    elif is_set_to_cupymoe(experts):
        from cupymoe.integrations.transformers import served

        try:
            gate_up_proj, down_proj, gate_up_bias, down_bias, activation = served(experts)
        except ValueError as error:
            raise ValueError(f"{path_of(experts)}: {error}") from None
        keep = keep_of(experts)
    else:
        return None
    settings = {"activation": activation, "gate_up_bias": gate_up_bias, "down_bias": down_bias, "keep": keep}
    return (gate_up_proj, down_proj), settings


def _names(wrapper: layer.ParamWrapper) -> list[str]:
    """Of the active adapters that are not merged."""
    return [] if wrapper.merged else [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _low_rank(wrapper: layer.ParamWrapper, name: str) -> LowRank:
    """One adapter, as views of PEFT's parameters.

    They are A ``[r * E, in]``, expert by expert, and B ``[out, r * E]``, with the experts innermost, also where the
    parameter that they adapt is the transpose of our weight. A dtype that is neither float32 nor the parameter's is
    cast to the latter.
    """
    a, b = (
        factor if factor.dtype == torch.float32 else factor.to(wrapper.get_param().dtype)
        for factor in (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight)
    )
    experts = wrapper.num_experts
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return LowRank(a, b, wrapper.scaling[name])


def _adapter(wrapper: layer.ParamWrapper) -> LowRank | None:
    """The active adapters as one of the sum of their ranks; None if there are none, or merged ones."""
    adapters = [_low_rank(wrapper, name) for name in _names(wrapper)]
    if len(adapters) < 2:
        return adapters[0] if adapters else None
    scaled = [adapter.b * adapter.scaling for adapter in adapters]
    return LowRank(torch.cat([adapter.a for adapter in adapters], 1), torch.cat(scaled, 2))


class ParamWrapper(layer.ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of one adapted parameter, whose forward does not merge.

    The wrappers of both parameters are nested, and the outer one computes for both. It bears the name of PEFT's class,
    which PEFT asks for.
    """

    def _wrappers(self) -> Iterator[layer.ParamWrapper]:
        wrapper: Any = self
        while isinstance(wrapper, layer.ParamWrapper):
            yield wrapper
            wrapper = wrapper.base_layer

    def largest_rank(self) -> int:
        """Of what the active adapters add to a parameter; 0 without any."""
        return max(sum(int(wrapper.r[name]) for name in _names(wrapper)) for wrapper in self._wrappers())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[T, H]`` of ``x`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, K].

        PEFT's own way for experts that cupymoe does not compute or that have hooks, disabled adapters, and keyword
        arguments.
        """
        experts: Any = self.get_base_layer()
        chain = [*self._wrappers()]
        wrappers = {wrapper.parameter_name: wrapper for wrapper in chain}
        plain = (
            not kwargs
            and len(args) == 2
            and not any(wrapper.disable_adapters for wrapper in chain)
            and not any(hooks_of(module) or "forward" in vars(module) for module in (*chain[1:], experts))
        )
        arguments = _arguments(experts) if plain and wrappers.keys() <= set(_PARAMETERS) else None
        if arguments is None:
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        pair = wrappers.get("gate_up_proj", wrappers.get("up_proj")), wrappers.get("down_proj")
        adapters = [None if wrapper is None else _adapter(wrapper) for wrapper in pair]
        if adapters == [None, None]:
            output = experts(x, *args)
            return output
        weights, settings = arguments
        return lora_experts(x.to(weights[0].dtype), *weights, *args, *adapters, **settings).to(x.dtype)


def use_low_rank(model: nn.Module) -> int:
    """Compute every adapter on experts' parameters unmerged, from now on; parameters and their names stay.

    Call it after ``get_peft_model`` or ``PeftModel.from_pretrained``. Adapters added later to the same parameters are
    covered. Experts of transformers have to run with ``experts_implementation="cupymoe"``.

    Returns:
        How many wrapped parameters were found.

    Raises:
        ValueError: there is none: no adapter has ``target_parameters`` on these experts; or the class of one has a
            ``forward`` of its own. Nothing was changed then.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, layer.ParamWrapper) and module.parameter_name in _PARAMETERS
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no LoRA adapter on experts' parameters: "
            'LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"]) makes them'
        )
    for name, module in found.items():
        known = layer.ParamWrapper.forward, ParamWrapper.forward
        if given := own_forward(module, *known, called=type(module).forward):
            raise ValueError(
                f"{name}: a wrapper must have PEFT's forward, which cupymoe's takes the place of, got {given}: leave "
                "this model to PEFT, without use_low_rank"
            )
    for module in found.values():
        let_compute_as(module, ParamWrapper)
    return len(found)
