"""Routing against float64, and against transformers' router on the same hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cupymoe import reference
from cupymoe.functional import route
from cupymoe.modules import Gemma4Router
from cupymoe.tools.verification import transformers_peer
from cupymoe.tools.verification.result import Result, Setting

_TOKENS = 512
BOUND = 1e-6
"""Relative error of a routing weight that is allowed: it is float32."""


def checks(setting: Setting) -> Iterator[Result]:
    """Choices and weights against float64, and against transformers' router."""
    generator = setting.generator()
    num_experts, top_k = setting.config.num_experts, setting.config.top_k_experts
    logits = torch.randn(_TOKENS, num_experts, device=setting.device, generator=generator).to(setting.dtype)
    scale = 0.5 + torch.rand(num_experts, device=setting.device, generator=generator)
    differing, error = errors(logits, top_k, scale)
    yield Result.of(
        "routing against float64",
        differing == 0 and error < BOUND,
        f"{_TOKENS} tokens: {differing} experts differ, weights within {error:.1e}",
    )
    yield _against_transformers(setting)


def errors(logits: torch.Tensor, top_k: int, scale: torch.Tensor) -> tuple[int, float]:
    """How many chosen experts float64 does not choose, and the largest relative error of a weight."""
    weights, index = route(logits, top_k, per_expert_scale=scale)
    true_weights, true_index = reference.route(logits.double(), top_k, scale.double())
    return int((index != true_index).sum()), float(((weights - true_weights).abs() / true_weights.abs()).max())


def _against_transformers(setting: Setting) -> Result:
    name = "routing equals transformers but for exact ties"
    if reason := transformers_peer.missing_reason():
        return Result(name, "skipped", reason)
    ours, theirs = Gemma4Router(setting.config), transformers_peer.router(setting.config)
    ours.to(setting.device, setting.dtype)
    generator = setting.generator()
    with torch.no_grad():
        ours.proj.weight.normal_(std=setting.config.hidden_size**-0.5, generator=generator)
        ours.scale.normal_(1.0, 0.1, generator=generator)
        ours.per_expert_scale.normal_(1.0, 0.1, generator=generator)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    states = torch.randn(
        _TOKENS, setting.config.hidden_size, device=setting.device, dtype=setting.dtype, generator=generator
    )
    with torch.no_grad():
        _, weights, index = ours(states)
        probabilities, their_weights, their_index = theirs(states)
    differs = index != their_index
    tied = probabilities.gather(-1, index) == probabilities.gather(-1, their_index)
    unexplained = int((differs & ~tied).sum())
    error = float(((weights - their_weights).abs() / their_weights.abs())[~differs].max())
    return Result.of(
        name,
        unexplained == 0 and error < BOUND,
        f"{_TOKENS} tokens: {int(differs.sum())} choices differ, {unexplained} of them not ties; weights within "
        f"{error:.1e}",
    )
