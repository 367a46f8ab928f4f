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
from cupymoe.integrations import is_set_to_cupymoe
from cupymoe.lora import LowRank

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def _arguments(experts: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]] | None:
    """The weights and the other settings of a call of experts that are ours to compute now: our module, or
    transformers' under ``"cupymoe"``; else None."""
    if isinstance(experts, MoEExperts):
        if experts.backend != "auto":
            return None
        gate_up_proj, down_proj, gate_up_bias, down_bias = experts.projections()
        activation = experts.activation
    elif is_set_to_cupymoe(experts):
        from cupymoe.integrations.transformers import served

        try:
            gate_up_proj, down_proj, gate_up_bias, down_bias, activation = served(experts)
        except ValueError as error:
            raise ValueError(f"{path_of(experts)}: {error}") from None
    else:
        return None
    settings = {"activation": activation, "gate_up_bias": gate_up_bias, "down_bias": down_bias}
    return (gate_up_proj, down_proj), settings


def _adapter(wrapper: layer.ParamWrapper) -> LowRank | None:
    """The active adapters as one of the sum of their ranks; None if there are none, or merged ones."""
    if wrapper.merged:
        return None
    factors = [wrapper.get_delta_factors(name) for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not factors:
        return None
    # The product of PEFT's factors is added to the parameter, of which our weight may be the transpose.
    if getattr(wrapper.get_base_layer(), "is_transposed", False):
        factors = [(right.transpose(1, 2), left.transpose(1, 2), scaling) for left, right, scaling in factors]
    a, b = [a for _, a, _ in factors], [b * scaling for b, _, scaling in factors]
    return LowRank(torch.cat(a, 1), torch.cat(b, 2)) if len(factors) > 1 else LowRank(a[0], b[0])


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
