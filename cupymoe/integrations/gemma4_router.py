"""transformers' Gemma 4 router on our kernels: the same module, so that its hooks, recorders and adapters stay."""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers.models.gemma4 import modeling_gemma4

from cupymoe.config import Gemma4MoEConfig
from cupymoe.modules import Gemma4Router


class Gemma4TextRouter(Gemma4Router, modeling_gemma4.Gemma4TextRouter):  # type: ignore[misc]
    """What :func:`take_over` makes of a router; it bears the name of transformers' class, for what looks for that."""


def check(router: Any) -> None:
    """Whether a ``Gemma4TextRouter`` can be taken over.

    Raises:
        AttributeError, ValueError: the router's config is not one of a mixture.
        ValueError: its ``forward`` was replaced, and not by accelerate.
    """
    Gemma4MoEConfig.from_transformers(router.config)
    if "forward" in vars(router) and "_old_forward" not in vars(router):
        raise ValueError("router must have no forward of its own, which would hide ours")


def take_over(router: Any) -> None:
    """Let a router that passed :func:`check` compute as :class:`cupymoe.Gemma4Router`, from now on."""
    router.config = Gemma4MoEConfig.from_transformers(router.config)
    router.__class__ = Gemma4TextRouter
    if "_old_forward" in vars(router):  # accelerate's hooks run around this one
        router._old_forward = MethodType(Gemma4TextRouter.forward, router)
