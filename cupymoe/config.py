"""Sizes and activation of a Gemma 4 mixture of experts, validated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cupymoe.activation import MoEActivation


def check_size(name: str, size: object) -> None:
    """A size of a layer.

    Raises:
        ValueError: it is not a positive integer; the message calls it ``name``.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name} must be a positive integer, got {size!r}")


@dataclass(frozen=True)
class Gemma4MoEConfig:
    """The part of ``Gemma4TextConfig`` that the router and the experts read; the names are transformers'.

    ``hidden_activation`` has no default: it is what serving stacks got wrong, so it is always read, never assumed.

    Raises:
        ValueError: a size is not a positive integer, ``top_k_experts`` exceeds ``num_experts``, the activation is
            unknown, or ``rms_norm_eps`` is not a finite number that is at least 0.
    """

    hidden_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    hidden_activation: str
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("hidden_size", "moe_intermediate_size", "num_experts", "top_k_experts"):
            check_size(name, getattr(self, name))
        if self.top_k_experts > self.num_experts:
            raise ValueError(f"top_k_experts must be at most num_experts={self.num_experts}, got {self.top_k_experts}")
        if not isinstance(self.hidden_activation, str):
            raise ValueError(f"hidden_activation must be a string, got {self.hidden_activation!r}")
        MoEActivation.from_str(self.hidden_activation)
        eps = self.rms_norm_eps
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not math.isfinite(eps) or eps < 0:
            raise ValueError(f"rms_norm_eps must be a finite number, at least 0, got {eps!r}")

    @property
    def activation(self) -> MoEActivation:
        """The member of the contract that ``hidden_activation`` names."""
        return MoEActivation.from_str(self.hidden_activation)

    @classmethod
    def from_transformers(cls, config: Any) -> Gemma4MoEConfig:
        """Read the fields off a ``Gemma4TextConfig`` (or any object that has them).

        Raises:
            AttributeError: the config lacks one of the fields; nothing is filled in.
            ValueError: a field is not as :class:`Gemma4MoEConfig` wants it.
        """
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @classmethod
    def gemma4_26b_a4b(cls) -> Gemma4MoEConfig:
        """The sizes of ``google/gemma-4-26B-A4B``."""
        return cls(
            hidden_size=2816,
            moe_intermediate_size=704,
            num_experts=128,
            top_k_experts=8,
            hidden_activation="gelu_pytorch_tanh",
        )
