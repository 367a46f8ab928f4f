"""What an unmerged adapter costs a forward without gradients, as ``bench.py --regime lora`` times it: beside none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_peers import Case, Layer, Oracle, make_cases
from bench_timing import capture, free_memory, time_in_turn
from torch import nn

from cupymoe import Gemma4MoEConfig, LowRank, fused_experts, lora_experts
from cupymoe.activation import MoEActivation

RANK = 16
TOKENS = (1, 16, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the adapters; PEFT keeps them in float32."""
STD = 0.02
"""Of A and B: what they add is 8% of the weights."""
ERROR_LIMIT = 0.0042
"""Weights merged in bfloat16 give 0.0037, rounding after each unmerged product 0.0050 (both computed on a CPU)."""


class Adapters(NamedTuple):
    """Of one layer, as PEFT's wrappers hand them out: a in order, b as a view of ``[out, r * E]``."""

    gate_up: LowRank
    down: LowRank

    @classmethod
    def of(cls, layer: Layer, dtype: torch.dtype) -> Adapters:
        """Random, for both weights."""

        def adapter(weight: torch.Tensor) -> LowRank:
            experts, out_size, in_size = weight.shape
            a, b = (
                torch.empty(shape, dtype=dtype, device=weight.device).normal_(std=STD)
                for shape in ((experts, RANK, in_size), (out_size, RANK, experts))
            )
            return LowRank(a, b.permute(2, 0, 1))

        return cls(adapter(layer.gate_up_proj), adapter(layer.down_proj))

    def to(self, dtype: torch.dtype) -> Adapters:
        """In another dtype; differentiable."""
        return Adapters(*(LowRank(a.to(dtype), b.to(dtype)) for a, b, _ in self))

    def factors(self) -> dict[str, torch.Tensor]:
        """All four by name: ``gate_up_a``, ``gate_up_b``, ``down_a``, ``down_b``."""
        return {
            f"{name}_{factor}": tensor
            for name, adapter in self._asdict().items()
            for factor, tensor in (("a", adapter.a), ("b", adapter.b))
        }

    def merged(self, layer: Layer, dtype: torch.dtype) -> Layer:
        """The layer's weights with these adapters in them, rounded once; differentiable."""
        return Layer(
            *(torch.baddbmm(weight.to(dtype), b, a) for weight, (a, b, _) in zip(layer, self.to(dtype), strict=True))
        )


class _Holder(nn.Module):
    """PEFT finds the parameters that it adapts by their names below a module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def peft_experts(experts: nn.Module, adapters: Adapters) -> Any:
    """PEFT's wrappers of both weights of a module of experts, the outer one, with these values of the factors."""
    from peft import LoraConfig, inject_adapter_in_model

    holder = _Holder(experts)
    targets = [f"experts.{name}_proj" for name in Adapters._fields]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=targets)
    inject_adapter_in_model(config, holder)
    for wrapper, (a, b, _) in zip(wrappers_of(holder.experts), adapters, strict=True):
        wrapper.lora_A["default"].weight = nn.Parameter(a.flatten(0, 1))
        wrapper.lora_B["default"].weight = nn.Parameter(b.permute(1, 2, 0).flatten(1))
    return holder.experts


def wrappers_of(experts: Any) -> tuple[Any, Any]:
    """The wrappers of gate_up_proj and of down_proj."""
    found = {wrapper.parameter_name: wrapper for wrapper in (experts, experts.base_layer)}
    return found["gate_up_proj"], found["down_proj"]


def _plain(case: Case, activation: MoEActivation) -> torch.Tensor:
    states, index, weights = case.inputs
    return fused_experts(states, *case.weights, index, weights, activation=activation)


def _adapted(case: Case, adapters: Adapters, activation: MoEActivation) -> torch.Tensor:
    states, index, weights = case.inputs
    return lora_experts(states, *case.weights, index, weights, *adapters, activation=activation)


def contenders(
    cases: list[Case], adapters: list[Adapters], config: Gemma4MoEConfig
) -> dict[str, list[Callable[[], torch.Tensor]]]:
    """Calls without adapters, and with them, not merged."""
    return {
        "plain": [partial(_plain, case, config.activation) for case in cases],
        "cupymoe": [partial(_adapted, case, adapters[case.layer], config.activation) for case in cases],
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
    rows = []
    for name, dtype in DTYPES.items():
        adapters = [Adapters.of(layer, dtype) for layer in bench.layers]
        for tokens in TOKENS:
            cases = make_cases(bench.config, bench.layers, tokens)
            truths = oracles(cases, adapters, bench.config)
            captured = {each: capture(calls) for each, calls in contenders(cases, adapters, bench.config).items()}
            error = bench.error(f"cupymoe with {name} adapters", tokens, captured["cupymoe"], truths, ERROR_LIMIT)
            rows.append({"tokens": tokens, "adapters": name, "ms": time_in_turn(captured), "error": error})
            del captured
            free_memory()
    return {"rank": RANK, "rows": rows}
