"""From the name of a target to a function that can be called, or to the reason why it can't."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from cupymoe.functional import fused_experts
from cupymoe.tools.audit.hosts import HOSTS
from cupymoe.tools.verification.transformers_peer import experts_of

# hidden_states [T, H], gate_up_proj [E, 2I, H], down_proj [E, H, I], top_k_index and top_k_weights [T, K] -> [T, H]
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

FORMS = "'cupymoe', 'transformers:NAME', 'vllm', 'sglang' or 'package.module:function'"


class TargetError(Exception):
    """The target can't be run; the message says why."""


@dataclass(frozen=True)
class Target:
    """An implementation, told which activation the model's config asks for."""

    name: str
    experts: Experts
    asked: str | None = None
    """The activation that the code of the model asks the implementation for; None: the config's."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """``[T, H]`` in float64. The target gets copies: what it may do to its arguments is not seen outside."""
        arguments = (hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights)
        output = self.experts(*(argument.clone() for argument in arguments))
        if not isinstance(output, torch.Tensor) or output.shape != hidden_states.shape:
            given = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise TargetError(f"{self.name} must return a tensor of shape {list(hidden_states.shape)}, got {given}")
        if not output.dtype.is_floating_point:
            raise TargetError(f"{self.name} must return a floating-point tensor, got {output.dtype}")
        return output.double()


def resolve(name: str, activation: str) -> Target:
    """The target of that name.

    Args:
        name: one of :data:`FORMS`.
        activation: ``hidden_activation`` of the config that the implementation is built from.

    Raises:
        TargetError: there is no such target here.
    """
    if name == "cupymoe":
        return Target(name, _cupymoe(activation))
    if name in HOSTS:
        try:
            return Target(name, *HOSTS[name](activation))
        except (Exception, SystemExit) as error:  # foreign code, perhaps of another release
            raise TargetError(f"{name} can't be run here: {type(error).__name__}: {error}") from error
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise TargetError(f"{name!r} is not {FORMS}")
    experts = _transformers(attribute, activation) if module == "transformers" else _import(module, attribute)
    return Target(name, experts)


def _cupymoe(activation: str) -> Experts:
    def experts(*arguments: torch.Tensor) -> torch.Tensor:
        return fused_experts(*arguments, activation=activation)

    return experts


def _transformers(name: str, activation: str) -> Experts:
    """A ``Gemma4TextExperts`` of the given weights' sizes that dispatches to the implementation ``name``."""
    if find_spec("transformers") is None:
        raise TargetError("transformers is not installed")
    try:
        from transformers.activations import ACT2FN
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    except ImportError as error:
        raise TargetError(f"this transformers has no Gemma 4 with an ExpertsInterface: {error}") from error
    if name == "cupymoe":
        import cupymoe.integrations.transformers  # noqa: F401  registers it
    known = ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]
    if name not in known:
        raise TargetError(f"transformers has no experts implementation {name!r}; registered: {known}")
    if activation not in ACT2FN:
        raise TargetError(f"transformers has no activation {activation!r}; it has {sorted(ACT2FN)}")

    def experts(
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        num_experts, hidden_size, intermediate_size = down_proj.shape
        config = Gemma4TextConfig(
            hidden_size=hidden_size,
            num_experts=num_experts,
            top_k_experts=top_k_index.shape[1],
            moe_intermediate_size=intermediate_size,
            hidden_activation=activation,
            enable_moe_block=True,
        )
        config._experts_implementation = name
        module = experts_of(config, gate_up_proj, down_proj).eval()
        output: torch.Tensor = module(hidden_states, top_k_index, top_k_weights)
        return output

    return experts


def _import(module: str, attribute: str) -> Experts:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it: a function beside you is found
    try:
        function: Any = importlib.import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # importing runs foreign code
        raise TargetError(f"{module}:{attribute} can't be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise TargetError(f"{module}:{attribute} is a {type(function).__name__}, not a function")
    experts: Experts = function
    return experts
