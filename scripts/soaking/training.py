"""Training steps of one layer's experts with random numbers of tokens, as ``soak.py --training`` makes them.

A step is a forward and a backward, in one of the modes that users train by: ``full`` asks for the gradients of hidden
states, routing weights and both weights, ``frozen`` for none of weights, and ``lora`` for those of PEFT's adapters on
both, in float32 and computed unmerged, which AdamW then changes. It keeps ``"gate_up"`` or ``"input"``. An inference of
the same tokens follows: after a step of the adapters it packs its copies of them anew.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

import torch

from cupymoe import Gemma4MoE, set_keep
from scripts.benchmarks.lora import Adapters, factors_of, peft_experts
from scripts.benchmarks.peers import Case, Inputs, Layer
from scripts.benchmarks.training import MODES, Oracle, Tensors

WAYS = tuple(product(MODES, ("gate_up", "input")))
CHECKED_TOKENS, CHECKED_EXPERTS = 1024, 12
"""Whose gradients are compared with float64: those of some tokens, and of some experts' weights or adapters, which are
all experts at the small shape. Of far fewer, errors scatter by more than they are below the limits."""
ERROR_LIMIT, ADAPTER_ERROR_LIMIT = 0.0035, 0.004
LEARNING_RATE = 1e-4
"""So small that adapters stay about as large as they were made: the limits are those of what adds 8% to a weight."""


class Training:
    """Steps of a layer's experts; its router only routes.

    Args:
        moe: the layer.
        states: what the tokens are taken from, twice as many as a step has at the most.
        numbers: which tokens and how many, and in which way.
    """

    unit = "steps"

    def __init__(self, moe: Gemma4MoE, states: torch.Tensor, numbers: random.Random) -> None:
        from cupymoe.integrations.peft import use_low_rank

        self.moe = moe.requires_grad_(False)
        self.states = states
        self.numbers = numbers
        self.weights = Layer(*(moe.experts.get_parameter(name) for name in Layer._fields))
        self.adapters = Adapters.of(self.weights, torch.float32)
        """Views of the memory of PEFT's parameters, so that they change with these."""
        self.adapted: Any = peft_experts(moe.experts, self.adapters)
        use_low_rank(self.adapted)
        self.factors = factors_of(self.adapted)
        self.optimizer = torch.optim.AdamW(self.factors.values(), lr=LEARNING_RATE, fused=True)
        self.checked = 0
        self._squares: dict[str, torch.Tensor] = {}
        """Of the norms of a gradient's errors and of its truths."""
        self._unequal = 0
        # The largest ones first, so that no later one needs more memory; their norms are most of what the errors of a
        # short run are relative to.
        for mode, keep in WAYS:
            self._train(mode, keep, self._most_tokens, is_checked=True)

    @property
    def _most_tokens(self) -> int:
        return len(self.states) // 2

    def step(self, *, is_checked: bool) -> None:
        """The next step; where it is checked, some of its gradients are compared with float64.

        There are as many of 2 to 3 tokens as of 4 to 7, and so on: most regimes of the kernels are those of few.
        """
        mode, keep = self.numbers.choice(WAYS)
        self._train(mode, keep, int((self._most_tokens + 1) ** self.numbers.random()), is_checked=is_checked)

    def _train(self, mode: str, keep: str, num_tokens: int, *, is_checked: bool) -> None:
        experts = self.adapted if mode == "lora" else self.moe.experts
        set_keep(experts, keep)
        for weight in self.weights:
            weight.requires_grad_(mode == "full")
        first = self.numbers.randrange(self._most_tokens)
        states = self.states[first : first + num_tokens].detach()
        with torch.no_grad():
            routing, index = self.moe.router.route(states)
        leaves: Tensors = {"hidden_states": states.requires_grad_(), "top_k_weights": routing.requires_grad_()}
        if mode == "full":
            leaves.update(self.weights._asdict())
        if mode == "lora":
            leaves.update(self.factors)

        output = experts(states, index, routing)
        grad = torch.randn_like(output)
        output.backward(grad)
        if is_checked:
            self._check(mode, Inputs(states, index, routing), grad, leaves)
        if mode == "lora":
            self.optimizer.step()
        for leaf in leaves.values():
            leaf.grad = None
        with torch.no_grad():
            inferred = experts(states, index, routing)
        if is_checked and not torch.equal(inferred, experts(states, index, routing)):
            self._unequal += 1

    def _check(self, mode: str, inputs: Inputs, grad: torch.Tensor, leaves: Tensors) -> None:
        self.checked += 1
        adapters = self.adapters if mode == "lora" else None
        case = Case(0, self.weights, inputs)
        oracle = Oracle.of(case, self.moe.config, adapters, mode, grad, CHECKED_TOKENS, CHECKED_EXPERTS)
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        for name, (gradient, truth) in oracle.pairs(gradients).items():
            norms = torch.stack([(gradient.double() - truth).norm(), truth.norm()]).cpu()
            self._squares.setdefault(f"{mode} {name}", torch.zeros_like(norms)).add_(norms.square())

    def errors(self) -> dict[str, tuple[float, float]]:
        """Of each gradient of each mode the relative error, in norm over all checked steps taken as one, since those of
        few tokens scatter; and what is allowed."""
        found = {}
        for name, squares in self._squares.items():
            difference, truth = squares.sqrt().tolist()
            is_adapter_s = name.partition(" ")[2] in self.factors
            found[name] = difference / truth, ADAPTER_ERROR_LIMIT if is_adapter_s else ERROR_LIMIT
        return found

    def faults(self) -> list[str]:
        """What was wrong beside errors."""
        if not self._unequal:
            return []
        return [f"after {self._unequal} checked steps an inference had other bits than a forward of training"]
