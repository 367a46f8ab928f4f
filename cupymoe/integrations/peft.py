"""LoRA adapters of PEFT on the experts, computed unmerged.

PEFT's ``target_parameters=["experts.gate_up_proj", "experts.down_proj"]`` works with cupymoe as it is: each call then
merges the adapters into a temporary copy of the experts' weights. :func:`use_low_rank` makes the calls of a model cost
the low-rank products instead; everything else (saving, loading, merging, several adapters) stays PEFT's.

Where no gradient will be asked for, the adapters are read from packed copies that are kept
(:mod:`cupymoe.adapter_copies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from peft.tuners.lora import layer
from torch import nn

from cupymoe.adapter_copies import AdapterCopy, Adapters, are_stand_ins_about
from cupymoe.customisation import has_hooks, let_compute_as, own_forward, path_of
from cupymoe.experts import MoEExperts
from cupymoe.functional import lora_experts
from cupymoe.integrations import dtype_beside, is_set_to_cupymoe, keep_of, numerics_of
from cupymoe.lora import LowRank
from cupymoe.weights.quantized import QuantizedWeight, Weight

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


def _arguments(experts: Any) -> tuple[tuple[Weight, Weight], dict[str, Any]] | None:
    """The weights and the other settings of a call of experts that are ours to compute now: our module, or
    transformers' under ``"cupymoe"`` or ``"cupymoe_invariant"``; else None."""
    if isinstance(experts, MoEExperts):
        if experts.backend != "auto":
            return None
        gate_up_proj, down_proj, gate_up_bias, down_bias = experts.projections()
        activation, keep, numerics = experts.activation, experts.keep, experts.numerics
    elif is_set_to_cupymoe(experts):
        from cupymoe.integrations.served import served

        try:
            gate_up_proj, down_proj, gate_up_bias, down_bias, activation = served(experts)
        except ValueError as error:
            raise ValueError(f"{path_of(experts)}: {error}") from None
        keep, numerics = keep_of(experts), numerics_of(experts)
    else:
        return None
    biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
    return (gate_up_proj, down_proj), {"activation": activation, **biases, "numerics": numerics, "keep": keep}


def _names(wrapper: layer.ParamWrapper) -> list[str]:
    """Of the active adapters that are not merged."""
    return [] if wrapper.merged else [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _low_rank(wrapper: layer.ParamWrapper, name: str, dtype: torch.dtype) -> LowRank:
    """One adapter, as views of PEFT's parameters.

    They are A ``[r * E, in]``, expert by expert, and B ``[out, r * E]``, with the experts innermost, also where the
    parameter that they adapt is the transpose of our weight. A dtype that is neither float32 nor that of the hidden
    states, the parameter's where it is plain, is cast to the latter.
    """
    a, b = (
        factor if factor.dtype == torch.float32 else factor.to(dtype)
        for factor in (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight)
    )
    experts = wrapper.num_experts
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    return LowRank(a, b, wrapper.scaling[name])


def _sum(adapters: list[LowRank]) -> LowRank:
    """All of them as one of the sum of their ranks."""
    if len(adapters) == 1:
        return adapters[0]
    scaled = [adapter.b * adapter.scaling for adapter in adapters]
    return LowRank(torch.cat([adapter.a for adapter in adapters], 1), torch.cat(scaled, 2))


_copies: WeakKeyDictionary[layer.ParamWrapper, dict[tuple[str, ...], AdapterCopy]] = WeakKeyDictionary()
"""By wrapper and the adapters that were active together. Not in the modules, which are saved, moved and copied."""
_replayed: WeakSet[layer.ParamWrapper] = WeakSet()
"""Wrappers whose training was captured: replays change their parameters, and nobody sees it."""


class _Adapted(NamedTuple):
    """A weight, and adapters that are added to it: at least one."""

    weight: Weight
    """``[E, out, in]``"""
    wrapper: layer.ParamWrapper
    names: tuple[str, ...]
    dtype: torch.dtype
    """Of the hidden states."""

    @classmethod
    def by(cls, wrapper: layer.ParamWrapper | None, weight: Weight, dtype: torch.dtype) -> _Adapted | None:
        """By the wrapper's active adapters; None without any, or if they are merged."""
        names = () if wrapper is None else tuple(_names(wrapper))
        return cls(weight, wrapper, names, dtype) if names else None

    def views(self) -> list[LowRank]:
        """Each adapter by itself."""
        return [_low_rank(self.wrapper, name, self.dtype) for name in self.names]

    def given(self) -> LowRank:
        """The adapters as one."""
        return _sum(self.views())

    def _owners(self) -> list[Any]:
        """Of the parameters."""
        return [part[name] for part in (self.wrapper.lora_A, self.wrapper.lora_B) for name in self.names]

    def parameters(self) -> list[torch.Tensor]:
        """What the adapters are views of."""
        return [owner.weight for owner in self._owners()]

    def adapters(self) -> Adapters:
        """What a copy is made of."""
        # FSDP gathers parameters for each call, into memory whose writes torch does not count.
        is_sharded = any("_is_fsdp_managed_module" in vars(owner) for owner in self._owners())
        scalings = [self.wrapper.scaling[name] for name in self.names]
        return Adapters(self.parameters(), scalings, self.views, not is_sharded)

    def copy(self) -> AdapterCopy:
        """What the adapters are kept in."""
        copies = _copies.get(self.wrapper)
        if copies is None:
            copies = _copies.setdefault(self.wrapper, {})
        if self.names not in copies:
            for names in [names for names in [*copies] if not all(name in self.wrapper.lora_A for name in names)]:
                del copies[names]  # an adapter was deleted
            copies.setdefault(self.names, AdapterCopy())
        return copies[self.names]

    def packed(self, adapters: Adapters) -> LowRank:
        """The adapters as one, from their copy where one can be kept: beside a plain weight, in whose dtype it is."""
        kept = None
        weight = self.weight
        if self.wrapper not in _replayed and isinstance(weight, torch.Tensor) and adapters.can_be_kept(weight):
            kept = self.copy().of(weight, adapters)
        return self.given() if kept is None else kept

    def distrust(self) -> None:
        """A gradient will be asked for, and the step of an optimizer may follow, of which some write behind torch's
        back."""
        for copy in [*_copies.get(self.wrapper, {}).values()]:
            copy.distrust()
        if self.weight.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            _replayed.add(self.wrapper)


def _added(adapted: Sequence[_Adapted | None], others: Sequence[Any]) -> list[LowRank | None]:
    """What a call adds to its weights: copies that are kept where no gradient of it will be asked for.

    Args:
        adapted: of each weight, if anything is added to it.
        others: the tensors of the call beside the adapters, None among them.
    """
    if torch.compiler.is_compiling():
        return [each and each.given() for each in adapted]
    is_differentiated = False
    if torch.is_grad_enabled():
        trained = [each for each in adapted if each and torch._C._any_requires_grad(*each.parameters())]
        for each in trained:
            each.distrust()
        is_differentiated = bool(trained) or torch._C._any_requires_grad(*others)
    if is_differentiated or are_stand_ins_about():
        return [each and each.given() for each in adapted]
    return [each and each.packed(each.adapters()) for each in adapted]


class ParamWrapper(layer.ParamWrapper):  # type: ignore[misc]
    """PEFT's wrapper of one adapted parameter, whose forward does not merge.

    The wrappers of both parameters are nested, and the outer one computes for both. It bears the name of PEFT's class,
    which PEFT asks for.
    """

    def _ours(self) -> tuple[dict[str, layer.ParamWrapper], Any] | None:
        """The wrappers by what they adapt, and the experts; None if more stands between the call and the experts than
        adapters that are to be added."""
        wrappers: dict[str, layer.ParamWrapper] = {}
        module: Any = self
        while isinstance(module, layer.ParamWrapper):
            if module.parameter_name not in _PARAMETERS or module.disable_adapters:
                return None
            wrappers[module.parameter_name] = module
            module = module.base_layer
            if has_hooks(module) or "forward" in vars(module):
                return None
        return wrappers, module

    def largest_rank(self) -> int:
        """Of what is added to a parameter unmerged; 0 if nothing is."""
        ours = self._ours()
        if ours is None or _arguments(ours[1]) is None:
            return 0
        return max(sum(int(wrapper.r[name]) for name in _names(wrapper)) for wrapper in ours[0].values())

    def refresh_copies(self) -> int:
        """Pack what is kept of this parameter's adapters, and of the active ones in any case; how many copies there
        are."""
        arguments = _arguments(self.get_base_layer())
        weight = None if arguments is None else arguments[0][self.parameter_name == "down_proj"]
        if not isinstance(weight, torch.Tensor):
            return 0
        _replayed.discard(self)
        kept = [names for names in [*_copies.get(self, {})] if all(name in self.lora_A for name in names)]
        every = dict.fromkeys([*kept, tuple(_names(self))])
        adapted = [_Adapted(weight, self, names, weight.dtype) for names in every if names]
        pairs = [(each, each.adapters()) for each in adapted]
        return sum(each.copy().refresh(weight, its) for each, its in pairs if its.can_be_kept(weight))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[T, H]`` of ``x`` [T, H], ``top_k_index`` and ``top_k_weights`` [T, K].

        PEFT's own way for experts that cupymoe does not compute or that have hooks, disabled adapters, and keyword
        arguments.
        """
        ours = self._ours() if not kwargs and len(args) == 2 else None
        arguments = None if ours is None else _arguments(ours[1])
        if ours is None or arguments is None:
            if not (self.disable_adapters or self.merged):
                self._check_plain("of PEFT's own forward, with hooks, another backend or keyword arguments, want")
            output: torch.Tensor = super().forward(x, *args, **kwargs)
            return output
        wrappers, experts = ours
        weights, settings = arguments
        pair = wrappers.get("gate_up_proj", wrappers.get("up_proj")), wrappers.get("down_proj")
        biases = settings["gate_up_bias"], settings["down_bias"]
        dtype = dtype_beside((*weights, *biases), x.dtype)
        adapted = [_Adapted.by(wrapper, weight, dtype) for wrapper, weight in zip(pair, weights, strict=True)]
        if adapted == [None, None]:
            output = experts(x, *args)
            return output
        plain = [weight for weight in weights if isinstance(weight, torch.Tensor)]
        adapters = _added(adapted, (x, *args, *plain, *biases))
        return lora_experts(x.to(dtype), *weights, *args, *adapters, **settings).to(x.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's.

        Raises:
            ValueError: the weight is quantised.
        """
        self._check_plain("can be merged into")
        super().merge(safe_merge, adapter_names)

    def _check_plain(self, what: str) -> None:
        weight = getattr(self.get_base_layer(), self.parameter_name)
        if isinstance(weight, QuantizedWeight):
            raise ValueError(
                f"{path_of(self)}: {self.parameter_name} must be a plain parameter, which adapters {what}, got one in "
                f"{weight.format.name}: beside quantised weights adapters can only be computed unmerged, by cupymoe"
            )


def low_rank_wrappers(model: nn.Module) -> list[ParamWrapper]:
    """Those of a model that :func:`use_low_rank` has changed."""
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


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
                f"{name}: a wrapper must have PEFT's own forward, which cupymoe replaces, got {given}: leave this "
                "model to PEFT, without use_low_rank"
            )
    for module in found.values():
        let_compute_as(module, ParamWrapper)
    return len(found)
