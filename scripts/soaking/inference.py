"""Calls of one layer with random numbers of tokens, as ``soak.py`` makes them; nobody asks for their gradients."""

from __future__ import annotations

import random

import torch

from cupymoe import Gemma4MoE, reference
from cupymoe.tools.verification.experts import bound
from cupymoe.tools.verification.result import relative_error

CHECKED_TOKENS = 256


class Inference:
    """Calls of the whole layer.

    Args:
        moe: the layer.
        states: what the tokens are taken from, twice as many as a call has at the most.
        numbers: which tokens, and how many.
    """

    unit = "calls"

    def __init__(self, moe: Gemma4MoE, states: torch.Tensor, numbers: random.Random) -> None:
        self.moe = moe
        self.states = states
        self.numbers = numbers
        self._errors: list[float] = []

    @torch.inference_mode()
    def step(self, *, is_checked: bool) -> None:
        """The next call; where it is checked, some of its tokens are compared with float64, routed as it was."""
        most = len(self.states) // 2
        first, num_tokens = self.numbers.randrange(most), self.numbers.randint(1, most)
        states = self.states[first : first + num_tokens]
        output = self.moe(states)
        if is_checked:
            self._errors.append(self._error(states, output))

    def _error(self, states: torch.Tensor, output: torch.Tensor) -> float:
        weights, index = self.moe.router.route(states)
        rows = torch.randperm(len(states), device=states.device)[:CHECKED_TOKENS]
        experts = self.moe.experts
        gate_up_proj, down_proj = (experts.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        truth = reference.experts(
            states[rows].double(), gate_up_proj, down_proj, index[rows], weights[rows], experts.activation
        )
        return relative_error(output[rows], truth)

    @property
    def checked(self) -> int:
        """How many calls were compared."""
        return len(self._errors)

    def errors(self) -> dict[str, tuple[float, float]]:
        """Of the output: the largest relative error of a checked call, and what is allowed."""
        worst = torch.tensor(self._errors).max().item()  # torch's max keeps a NaN
        return {"output": (worst, bound(torch.bfloat16))}

    def faults(self) -> list[str]:
        """What was wrong beside errors: nothing."""
        return []
