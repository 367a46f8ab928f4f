"""What an unmerged adapter costs, as ``bench.py --regime lora`` times it: beside merged weights, and PEFT's own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_peers import Case, Layer, Oracle, make_cases
from bench_timing import capture, free_memory, time_in_turn

from cupymoe import Gemma4MoEConfig, LowRank, fused_experts, lora_experts
from cupymoe.activation import MoEActivation

RANK = 16
TOKENS = (1, 4096)
STD = 0.02
"""Of A and B: what they add is 8% of the weights."""
ERROR_LIMIT = 0.006
"""Weights merged in bfloat16 give 0.0037, rounding after each unmerged product 0.0050 (both computed on a CPU)."""


class Adapters(NamedTuple):
    """Of one layer, as PEFT's wrappers hand them out: a in order, b as a view of ``[out, r * E]``."""

    gate_up: LowRank
    down: LowRank

    @classmethod
    def of(cls, layer: Layer) -> Adapters:
        """Random, for both weights."""

        def adapter(weight: torch.Tensor) -> LowRank:
            experts, out_size, in_size = weight.shape
            a, b = weight.new_empty(experts, RANK, in_size), weight.new_empty(out_size, RANK, experts)
            return LowRank(a.normal_(std=STD), b.normal_(std=STD).permute(2, 0, 1))

        return cls(adapter(layer.gate_up_proj), adapter(layer.down_proj))

    def merged(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """The layer's weights with these adapters in them, rounded once."""
        return Layer(
            *(
                torch.baddbmm(weight.to(dtype), b.to(dtype), a.to(dtype))
                for weight, (a, b) in zip(layer, self, strict=True)
            )
        )


def _unmerged(case: Case, adapters: Adapters, activation: MoEActivation) -> torch.Tensor:
    states, index, weights = case.inputs
    return lora_experts(states, *case.weights, index, weights, *adapters, activation=activation)


def _merged(case: Case, layer: Layer, activation: MoEActivation) -> torch.Tensor:
    states, index, weights = case.inputs
    return fused_experts(states, *layer, index, weights, activation=activation)


def _merging(case: Case, adapters: Adapters, activation: MoEActivation) -> torch.Tensor:
    return _merged(case, adapters.merged(case.weights, case.weights.down_proj.dtype), activation)


def contenders(
    cases: list[Case], layers: list[Layer], adapters: list[Adapters], config: Gemma4MoEConfig
) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Calls on merged weights, unmerged ones, and ones merged in each call, as PEFT's wrapper merges them."""
    merged = [each.merged(layer, layer.down_proj.dtype) for each, layer in zip(adapters, layers, strict=True)]
    return {
        "merged": [partial(_merged, case, merged[case.layer], config.activation) for case in cases],
        "unmerged": [partial(_unmerged, case, adapters[case.layer], config.activation) for case in cases],
        "merging": [partial(_merging, case, adapters[case.layer], config.activation) for case in cases],
    }


def oracles(cases: list[Case], adapters: list[Adapters], config: Gemma4MoEConfig) -> list[Oracle]:
    """Of the cases on weights merged in float64: 6 GB of one layer at a time."""
    found: dict[int, Oracle] = {}
    for layer, each in enumerate(adapters):
        its = [i for i, case in enumerate(cases) if case.layer == layer]
        weights = each.merged(cases[its[0]].weights, torch.float64) if its else None
        for i in its:
            found[i] = Oracle.of(config, cases[i]._replace(weights=weights))
    return [found[i] for i in range(len(cases))]


def measure_lora(bench: Any) -> dict[str, Any]:
    """What ``lora.json`` holds beside the heading; ``bench`` is a ``bench_experts.Bench``, and keeps what was wrong."""
    adapters = [Adapters.of(layer) for layer in bench.layers]
    rows = []
    for tokens in TOKENS:
        cases = make_cases(bench.config, bench.layers, tokens)
        truths = oracles(cases, adapters, bench.config)
        captured = {
            name: capture(calls) for name, calls in contenders(cases, bench.layers, adapters, bench.config).items()
        }
        errors = {name: bench.error(name, tokens, each, truths, ERROR_LIMIT) for name, each in captured.items()}
        rows.append({"tokens": tokens, "error": errors, "ms": time_in_turn(captured)})
        del captured
        free_memory()
    return {"rank": RANK, "adapted": rows}
