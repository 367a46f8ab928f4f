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

from cupymoe.activation import MoEActivation
from cupymoe.customisation import hooks_of, let_compute_as, own_forward, path_of
from cupymoe.functional import lora_experts
from cupymoe.integrations import is_set_to_cupymoe
from cupymoe.lora import LowRank
from cupymoe.modules import Gemma4Experts

_PARAMETERS = ("gate_up_proj", "down_proj")


def _activation(experts: nn.Module) -> MoEActivation | None:
    """Of experts that are ours to compute now: our module, or transformers' under ``"cupymoe"``; else None."""
    if isinstance(experts, Gemma4Experts):
        return experts.activation if experts.backend == "auto" else None
    if not is_set_to_cupymoe(experts):
        return None
    from cupymoe.integrations.transformers import activation_of, unsupported_reason

    if unsupported_reason(experts) is not None:
        return None
    try:
        return activation_of(experts)
    except ValueError as error:
        raise ValueError(f"{path_of(experts)}: {error}") from None


def _adapter(wrapper: layer.ParamWrapper) -> LowRank | None:
    """The active adapters as one of the sum of their ranks; None if there are none, or merged ones."""
    if wrapper.merged:
        return None
    factors = [wrapper.get_delta_factors(name) for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not factors:
        return None
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
        activation = _activation(experts)
        plain = (
            not kwargs
            and len(args) == 2
            and not any(wrapper.disable_adapters for wrapper in chain)
            and not any(hooks_of(module) or "forward" in vars(module) for module in (*chain[1:], experts))
        )
        if activation is None or not plain or not wrappers.keys() <= set(_PARAMETERS):
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        adapters = [_adapter(wrappers[name]) if name in wrappers else None for name in _PARAMETERS]
        if adapters == [None, None]:
            output = experts(x, *args)
            return output
        weights = experts.gate_up_proj, experts.down_proj
        return lora_experts(x.to(weights[0].dtype), *weights, *args, *adapters, activation=activation).to(x.dtype)


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
