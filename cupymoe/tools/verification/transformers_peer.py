"""transformers' own Gemma 4 router and experts over our weights, where it is installed."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch

from cupymoe.config import Gemma4MoEConfig


def missing_reason() -> str | None:
    """Why there is nothing to compare with; None if there is."""
    if find_spec("transformers") is None:
        return "transformers is not installed"
    try:
        from transformers.models.gemma4 import modeling_gemma4  # noqa: F401
    except ImportError as error:
        return f"this transformers has no Gemma 4: {error}"
    return None


def _config(config: Gemma4MoEConfig) -> Any:
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    result = Gemma4TextConfig(**asdict(config), enable_moe_block=True)
    result._experts_implementation = "eager"
    return result


def router(config: Gemma4MoEConfig) -> Any:
    """A ``Gemma4TextRouter`` on the meta device, for parameters to be assigned."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter

    with torch.device("meta"):
        return Gemma4TextRouter(_config(config))


def experts(config: Gemma4MoEConfig, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> Any:
    """A ``Gemma4TextExperts`` over these weights, which loops over the experts."""
    return experts_of(_config(config), gate_up_proj, down_proj)


def experts_of(config: Any, gate_up_proj: torch.Tensor, down_proj: torch.Tensor) -> Any:
    """A ``Gemma4TextExperts`` of a ``Gemma4TextConfig`` over these weights."""
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

    with torch.device("meta"):
        module = Gemma4TextExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up_proj, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down_proj, requires_grad=False)
    return module
