"""cupymoe inside other libraries; each module imports its host, so none is imported by ``import cupymoe``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from cupymoe.weights.quantized import QuantizedWeight

EXPERTS_IMPLEMENTATION = "cupymoe"
"""The name that transformers knows us by."""
NUMERICS_OF: dict[str | None, str] = {
    EXPERTS_IMPLEMENTATION: "fast",
    f"{EXPERTS_IMPLEMENTATION}_invariant": "invariant",
}
"""That name, and the one that asks for other numerics: see :func:`cupymoe.fused_experts`."""

KEEP = "_cupymoe_keep"
"""The attribute of an experts module of transformers that holds its ``keep``, where somebody has set one."""


def keep_of(experts: Any) -> str:
    """What a call of an experts module of transformers keeps for its gradients."""
    if torch.compiler.is_compiling():
        return str(getattr(experts, KEEP, "gate_up"))  # which a compiled graph depends on; it does not on vars()
    keep: str = vars(experts).get(KEEP, "gate_up")  # getattr takes 1 us to find that a module has none
    return keep


def is_set_to_cupymoe(experts: Any) -> bool:
    """Whether an experts module of transformers computes with ``experts_implementation="cupymoe"``, or with
    ``"cupymoe_invariant"``."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) in NUMERICS_OF


def numerics_of(experts: Any) -> str:
    """What the calls of a module of transformers ask for: experts that are set to cupymoe, or a router beside them."""
    return NUMERICS_OF.get(getattr(experts.config, "_experts_implementation", None), "fast")


def are_experts_set_to_cupymoe(module: Any) -> bool:
    """Whether a module is such experts, and not one that shares their config."""
    has_weights = isinstance(getattr(module, "down_proj", None), nn.Parameter | QuantizedWeight)
    has_both = has_weights and (hasattr(module, "gate_up_proj") or hasattr(module, "up_proj"))
    return has_both and is_set_to_cupymoe(module)


def sizes_of(experts: Any) -> tuple[int, int, int]:
    """Number of experts, hidden and intermediate size; of the weights, which may have been pruned."""
    weight = experts.down_proj
    num_experts, *sizes = weight.shape
    is_transposed = getattr(experts, "is_transposed", False) and not isinstance(weight, QuantizedWeight)
    intermediate_size, hidden_size = sizes if is_transposed else reversed(sizes)
    return num_experts, hidden_size, intermediate_size


def dtype_of(experts: nn.Module, otherwise: torch.dtype = torch.bfloat16) -> torch.dtype:
    """What hidden states are expected in: the dtype of the parameters. Where none is left, beside quantised weights,
    it is ``otherwise``, although any is served."""
    return next((parameter.dtype for parameter in experts.parameters(recurse=False)), otherwise)


def dtype_beside(weights: Iterable[Any], otherwise: torch.dtype) -> torch.dtype:
    """What hidden states are multiplied in: the dtype of the first weight or bias that is plain, or ``otherwise``."""
    return next((weight.dtype for weight in weights if isinstance(weight, torch.Tensor)), otherwise)
