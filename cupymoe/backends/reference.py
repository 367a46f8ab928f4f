"""The reference as a backend: serves everything, slowly, and waits for the GPU to learn which experts were hit."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cupymoe import gradients, reference
from cupymoe.backends import Direction, ExpertsCall, ExpertsTensors, Kept
from cupymoe.backends.expert_rows import RowsBackend, in_local_experts, on_demand
from cupymoe.backends.row_products import LoopRows

_OF_TOKENS = ("hidden_states", "top_k_index", "top_k_weights")


class ReferenceBackend(RowsBackend):
    """Plain torch, one expert after the other, and so with gradients of gradients."""

    name = "reference"
    rows = LoopRows
    is_slow = True
    uses_gate_up = False

    def unsupported_reason(self, call: ExpertsCall, direction: Direction = "forward") -> str | None:
        """None: every device and floating dtype is served."""
        return None

    def way(self, call: ExpertsCall, direction: Direction = "forward") -> str:
        """See :class:`cupymoe.backends.Backend`."""
        one_token = "one token after the other, " if call.is_invariant(direction) else ""
        return f"plain torch, {one_token}one expert after the other"

    def forward(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None = None) -> torch.Tensor:
        """See :class:`cupymoe.backends.Backend`."""
        if call.is_invariant() and call.num_tokens > 1:
            return self._token_by_token(call, tensors, out)
        if call.adapter_rank:
            return super().forward(call, tensors, out)
        tensors = on_demand(call, in_local_experts(tensors))
        output = reference.experts(*tensors[:5], call.activation, tensors.gate_up_bias, tensors.down_bias)
        return output.to(call.dtype) if out is None else out.copy_(output)

    def _token_by_token(self, call: ExpertsCall, tensors: ExpertsTensors, out: torch.Tensor | None) -> torch.Tensor:
        """Torch's products may sum in another order for another number of rows, or at another alignment: therefore
        each token is a call by itself, on tensors of its own."""
        alone = call._replace(num_tokens=1)
        output = torch.empty_like(tensors.hidden_states) if out is None else out
        for token in range(call.num_tokens):
            its = {name: getattr(tensors, name)[token : token + 1].clone() for name in _OF_TOKENS}
            output[token : token + 1] = self.forward(alone, tensors._replace(**its))
        return output

    def forward_keeping(self, call: ExpertsCall, tensors: ExpertsTensors) -> tuple[torch.Tensor, Kept]:
        """See :class:`cupymoe.backends.Backend`."""
        return self.forward(call, tensors), super().forward_keeping(call, tensors)[1]

    def backward(
        self,
        call: ExpertsCall,
        tensors: ExpertsTensors,
        kept: Kept | None,
        grad: torch.Tensor,
        needed: Sequence[bool],
    ) -> tuple[torch.Tensor | None, ...]:
        """See :class:`cupymoe.backends.Backend`; what was kept is computed again, unrounded."""
        if call.adapter_rank:
            return super().backward(call, tensors, kept, grad, needed)
        tensors = on_demand(call, in_local_experts(tensors))
        of_states, of_up, of_down, of_weights, *_, of_up_bias, of_down_bias = needed
        grads = gradients.experts_backward(
            grad,
            *tensors[:5],
            call.activation,
            tensors.gate_up_bias,
            tensors.down_bias,
            (of_states, of_up, of_down, False, of_weights, of_up_bias, of_down_bias),
        )
        return *(grads[i] for i in (0, 1, 2, 4)), None, None, None, None, *grads[5:]
