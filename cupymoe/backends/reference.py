"""The reference as a backend: serves everything, slowly, and waits for the GPU to learn which experts were hit."""

from __future__ import annotations

import torch

from cupymoe import reference
from cupymoe.activation import MoEActivation
from cupymoe.backends import ExpertsCall


class ReferenceBackend:
    """Plain torch, one expert after the other."""

    name = "reference"
    is_slow = True

    def unsupported_reason(self, call: ExpertsCall) -> str | None:
        """None: every device and floating dtype is served."""
        return None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        activation: MoEActivation,
    ) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        output = reference.experts(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, activation)
        return output.to(hidden_states.dtype)
