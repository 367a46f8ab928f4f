"""Calls with ``numerics="invariant"`` beside the fast ones, as ``bench.py --regime decode`` times and compares them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import cupymoe
from cupymoe import Gemma4MoEConfig
from scripts.benchmarks.peers import Case, Contender, Inputs, make_inputs

NAME = "cupymoe:invariant"
OTHER_TOKENS = 512
"""That share a call with those of a case, when bits are compared."""


def _call(config: Gemma4MoEConfig, case: Case, inputs: Inputs) -> torch.Tensor:
    hidden_states, index, weights = inputs
    return cupymoe.fused_experts(
        hidden_states, *case.weights, index, weights, activation=config.activation, numerics="invariant"
    )


def invariant_contender(config: Gemma4MoEConfig) -> dict[str, Contender]:
    """By its name."""

    def bind(case: Case) -> Callable[[], torch.Tensor]:
        return partial(_call, config, case, case.inputs)

    return {NAME: Contender(bind)}


def bits_equal(config: Gemma4MoEConfig, case: Case) -> bool:
    """Whether every token of a case has the bits that it has among :data:`OTHER_TOKENS` more, at another place."""
    others = make_inputs(config, OTHER_TOKENS, case.inputs.hidden_states.device)
    together = [torch.cat(pair) for pair in zip(case.inputs, others, strict=True)]
    places = torch.randperm(len(together[0]), device=together[0].device)
    mixed = _call(config, case, Inputs(*(tensor[places] for tensor in together)))
    output = torch.empty_like(mixed).index_copy_(0, places, mixed)[: len(case.inputs.hidden_states)]
    return torch.equal(output, _call(config, case, case.inputs))
