"""cupymoe inside other libraries; each module imports its host, so none is imported by ``import cupymoe``."""

from __future__ import annotations

from typing import Any

EXPERTS_IMPLEMENTATION = "cupymoe"
"""The name that transformers knows us by."""


def is_set_to_cupymoe(experts: Any) -> bool:
    """Whether an experts module of transformers computes with ``experts_implementation="cupymoe"``."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) == EXPERTS_IMPLEMENTATION
