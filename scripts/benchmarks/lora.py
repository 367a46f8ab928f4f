"""What an unmerged adapter costs a forward without gradients, as ``bench.py --regime lora`` times it: beside none.

The adapters are PEFT's, on transformers' experts, and computed as ``use_low_rank`` lets them be: from packed copies
that are kept between calls. ``refresh_us`` is what it takes to pack a layer's anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from torch import nn

from cupymoe import Gemma4MoEConfig, LowRank, fused_experts, refresh_adapters
from cupymoe.activation import MoEActivation
from cupymoe.tools.verification.transformers_peer import experts_of
from scripts.benchmarks.experts import Bench
from scripts.benchmarks.peers import Case, Layer, Oracle, make_cases
from scripts.benchmarks.timing import capture, free_memory, percentiles, time_in_turn

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


def factors_of(experts: Any) -> dict[str, nn.Parameter]:
    """The factors of both wrappers, as PEFT has them, by the names of :meth:`Adapters.factors`."""
    return {
        f"{name}_{factor}": part["default"].weight
        for name, wrapper in zip(Adapters._fields, wrappers_of(experts), strict=True)
        for factor, part in (("a", wrapper.lora_A), ("b", wrapper.lora_B))
    }


def _plain(case: Case, activation: MoEActivation) -> torch.Tensor:
    states, index, weights = case.inputs
    return fused_experts(states, *case.weights, index, weights, activation=activation)


def unmerged_experts(layer: Layer, adapters: Adapters, config: Gemma4MoEConfig) -> Any:
    """transformers' experts of a layer with PEFT's adapters, computed by cupymoe without merging."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    from cupymoe.integrations.peft import use_low_rank

    module = experts_of(Gemma4TextConfig(**asdict(config)), *layer)
    module.config._experts_implementation = "cupymoe"
    experts = peft_experts(module, adapters)
    use_low_rank(experts)
    return experts


def contenders(cases: list[Case], experts: list[Any], config: Gemma4MoEConfig) -> dict[str, list[Callable[[], Any]]]:
    """Calls without adapters, and with them, not merged."""
    return {
        "plain": [partial(_plain, case, config.activation) for case in cases],
        "cupymoe": [partial(experts[case.layer], *case.inputs) for case in cases],
    }


def refresh_us(experts: Any) -> dict[str, float]:
    """Of the copies of one layer's adapters, on an idle GPU."""
    samples = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        refresh_adapters(experts)
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e6)
    return percentiles(samples)


def oracles(cases: list[Case], adapters: list[Adapters], config: Gemma4MoEConfig) -> list[Oracle]:
    """Of the cases on weights merged in float64: 6 GB of one layer at a time."""
    found: dict[int, Oracle] = {}
    for layer, each in enumerate(adapters):
        if its := [i for i, case in enumerate(cases) if case.layer == layer]:
            weights = each.merged(cases[its[0]].weights, torch.float64)
            found |= {i: Oracle.of(config, cases[i]._replace(weights=weights)) for i in its}
    return [found[i] for i in range(len(cases))]


@torch.inference_mode(False)  # a change of inference tensors can't be seen, so that no copy of them is kept
@torch.no_grad()
def measure_lora(bench: Bench) -> dict[str, Any]:
    """What ``lora.json`` holds beside the heading; ``bench`` keeps what was wrong."""
    rows = []
    for name, dtype in DTYPES.items():
        adapters = [Adapters.of(layer, dtype) for layer in bench.layers]
        experts = [
            unmerged_experts(layer, each, bench.config) for layer, each in zip(bench.layers, adapters, strict=True)
        ]
        refresh = refresh_us(experts[0])
        for each in experts:
            refresh_adapters(each)  # before the capture, which else packs in the graph
        click.echo(f"{name}: a layer's adapters are packed anew in {refresh['p50']} us")
        for tokens in TOKENS:
            cases = make_cases(bench.config, bench.layers, tokens)
            truths = oracles(cases, adapters, bench.config)
            captured = {each: capture(calls) for each, calls in contenders(cases, experts, bench.config).items()}
            error = bench.error(f"cupymoe with {name} adapters", tokens, captured["cupymoe"], truths, ERROR_LIMIT)
            ms = time_in_turn(captured)
            rows.append({"tokens": tokens, "adapters": name, "ms": ms, "refresh_us": refresh, "error": error})
            del captured
            free_memory()
    return {"rank": RANK, "rows": rows}
