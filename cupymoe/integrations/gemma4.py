"""transformers' Gemma 4 layers: what their router and experts compute, and routers that compute it with our kernels."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from transformers.models.gemma4 import modeling_gemma4

from cupymoe.activation import MoEActivation
from cupymoe.config import Gemma4MoEConfig
from cupymoe.customisation import as_written, check_replaceable, let_compute_as, own_forward, runs_as
from cupymoe.integrations import numerics_of
from cupymoe.integrations.served import served
from cupymoe.modules import Gemma4Router

_ROUTER_FORWARDS = (
    as_written("transformers", modeling_gemma4.Gemma4TextRouter, "forward")["forward"],
    Gemma4Router.forward,
)
_EXPERTS_FORWARD = as_written("transformers", modeling_gemma4.Gemma4TextExperts, "forward")["forward"]
_NORM = modeling_gemma4.Gemma4RMSNorm
_NORM_METHODS = as_written("transformers", _NORM, "forward", "_norm")


def router_config(path: str, router: Any) -> Gemma4MoEConfig:
    """What a router that only its parameters make computes: its sizes, ``top_k_experts`` and ``rms_norm_eps``.

    The number of experts is that of its parameters: after pruning, transformers' config still counts every expert.

    Raises:
        AttributeError, ValueError: the router's config is not one of a mixture.
        ValueError: the router computes something else; ``path`` is what the message calls it.
    """
    check_replaceable(path, router, forward=_ROUTER_FORWARDS)
    check_replaceable(f"{path}.norm", router.norm, **{name: (known,) for name, known in _NORM_METHODS.items()})
    config = replace(
        Gemma4MoEConfig.from_transformers(router.config),
        num_experts=router.per_expert_scale.shape[0],
        rms_norm_eps=router.norm.eps,
    )
    if router.norm.with_scale or router.scalar_root_size != config.hidden_size**-0.5:
        raise ValueError(
            f"{path} must have a norm without a scale and a scalar_root_size of {config.hidden_size}^-0.5, got "
            f"with_scale={router.norm.with_scale} and scalar_root_size={router.scalar_root_size}"
        )
    return config


def experts_activation(path: str, experts: Any) -> MoEActivation:
    """The activation of experts that only their parameters and ``act_fn`` make.

    Raises:
        ValueError: the experts compute something else; ``path`` is what the message calls them.
    """
    check_replaceable(path, experts, forward=(_EXPERTS_FORWARD,))
    try:
        return served(experts).activation
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class Gemma4TextRouter(Gemma4Router, modeling_gemma4.Gemma4TextRouter):  # type: ignore[misc]
    """What :func:`take_over` makes of a router; it bears the name of transformers' class, for what looks for that.

    Its ``config`` and ``norm`` stay transformers' own, and each call reads them, as it does in transformers.
    """

    norm: Any

    @property
    def numerics(self) -> str:  # type: ignore[override]
        """As ``experts_implementation`` says, for the experts and the routers of a model."""
        return numerics_of(self)

    @property
    def _eps(self) -> float:
        return float(self.norm.eps)

    def _router_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input: torch.Tensor = self.norm(hidden_states) * self.scale * self.scalar_root_size
        return input

    def _is_plain(self, hidden_states: torch.Tensor) -> bool:
        return (
            super()._is_plain(hidden_states)
            and runs_as(self.norm, _NORM, _NORM_METHODS)
            and not self.norm.with_scale
            and self.scalar_root_size == self.scale.shape[0] ** -0.5
        )


def check_router(path: str, router: Any) -> None:
    """Whether :func:`take_over` can take a ``Gemma4TextRouter``.

    Raises:
        AttributeError, ValueError: the router's config is not one of a mixture.
        ValueError: its ``forward`` is not transformers', and not one that accelerate or transformers' parallel layers
            have put around that; ``path`` is what the message calls it.
    """
    replace(Gemma4MoEConfig.from_transformers(router.config), num_experts=router.per_expert_scale.shape[0])
    around = _forward_inside(router)
    known = () if around is None and "forward" in vars(router) else _ROUTER_FORWARDS
    if given := own_forward(router, *known, called=around):
        raise ValueError(
            f"{path}: a router must have no forward of its own, which would be called instead of cupymoe's, got "
            f"{given}: remove it, or leave the routers to transformers"
        )


def take_over(router: Any) -> None:
    """Let a router that passed :func:`check_router` compute as :class:`cupymoe.Gemma4Router`, from now on."""
    let_compute_as(router, Gemma4TextRouter)
    if "_old_forward" in vars(router):
        router._old_forward = MethodType(type(router).forward, router)
    elif layer := _parallel_layer(router):
        del router.forward
        layer["self"].install_forward(router, layer["mesh"])


def _forward_inside(router: Any) -> Any:
    """The forward that accelerate's hooks or transformers' parallel layers call inside theirs; None without either."""
    if "_old_forward" in vars(router):
        return router._old_forward
    return _parallel_layer(router).get("original_forward")


def _parallel_layer(router: Any) -> dict[str, Any]:
    """What the forward that transformers' ``TensorParallelLayer.install_forward`` makes has kept: ``self``, ``mesh``
    and ``original_forward``; nothing of another forward."""
    function = vars(router).get("forward")
    if not getattr(function, "__module__", "").startswith("transformers.") or not function.__closure__:
        return {}
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
