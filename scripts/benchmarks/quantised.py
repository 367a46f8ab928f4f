"""The whole call on quantised weights, as ``bench.py --regime quantised`` times it: beside bf16 weights and a floor.

The experts of four layers are rounded to one format after the other. A graph's calls rotate through the layers and
through random experts, so that already at one token they read 0.5 GB of distinct weights, of which L2 keeps little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import click
import torch

from cupymoe import Gemma4MoEConfig, QuantizedExperts, QuantizedWeight, fused_experts, quantize, reference
from cupymoe.backends import ExpertsCall, ExpertsTensors
from cupymoe.backends.fused import FusedBackend
from cupymoe.kernels.arch import BUILDS, HOPPER, Arch
from cupymoe.ops import experts_call
from scripts.benchmarks.experts import ERROR_LIMIT, Bench
from scripts.benchmarks.peers import (
    Case,
    Contender,
    Inputs,
    Layer,
    Oracle,
    count_of_cases,
    floor_flops,
    make_cases,
    mean_hit_experts,
)
from scripts.benchmarks.timing import FLOOR, Captured, capture, free_memory, time_in_turn

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
BUILD, BUILD_TOKENS = "sm_86", 128
"""Another card's build of the kernels, and the most tokens that it is measured with."""
LAYERS = 4
CASES_UP_TO = {4: 32, 64: 12, math.inf: LAYERS}
"""Calls in one graph, by the number of tokens up to which they serve; few where one reads all experts of a layer."""
ORACLES = 4
"""Calls of a row that are compared with float64: of all of them that would take longer than the rest."""
ORACLE_TOKENS = 8
"""Of a call, whose experts are dequantised to float64."""
ERROR_LIMITS = {"stream": 0.0030, "tiles": ERROR_LIMIT}
_NO_ADAPTERS_OR_BIASES = (None,) * 6


def formats() -> dict[str, Callable[[Layer], QuantizedExperts]]:
    """How a layer is rounded, by the format's name in the report. A down projection of 704 has no groups of 128."""

    def int4(group_sizes: tuple[int, int]) -> Callable[[Layer], QuantizedExperts]:
        return lambda layer: quantize(*layer, "int4", group_size=group_sizes)

    return {
        "int4_g32": int4((32, 32)),
        "int4_g128": int4((128, 64)),
        **{name: partial(_quantized, name) for name in ("fp8", "nvfp4", "int8")},
    }


def _quantized(format: str, layer: Layer) -> QuantizedExperts:
    return quantize(*layer, format)


def both(experts: QuantizedExperts) -> list[QuantizedWeight]:
    """Its weights, which :func:`cupymoe.quantize` has made of plain ones."""
    return [weight for weight in experts if isinstance(weight, QuantizedWeight)]


def bytes_of_expert(weight: QuantizedWeight) -> float:
    """Of its codes and scales, without the padding of rows."""
    _, rows, k = weight.shape
    row: float = k * weight.format.bits / 8
    for of_groups in (weight.group_scales, weight.group_zeros):
        if of_groups is not None:
            row += of_groups.shape[2] * of_groups.element_size()
    if weight.row_scales is not None:
        row += weight.row_scales.element_size()
    return rows * row


def floor_ms(config: Gemma4MoEConfig, tokens: int, hit_experts: float, experts: Sequence[QuantizedWeight]) -> float:
    """Fewest milliseconds of a call on an H100: reading the hit experts once, or the products of all pairs."""
    read = hit_experts * sum(bytes_of_expert(weight) for weight in experts) / FLOOR.read_tbs / 1e9
    return float(f"{max(read, floor_flops(config, tokens) / FLOOR.bf16_tflops / 1e9):.5g}")


def oracle(config: Gemma4MoEConfig, weights: Iterable[torch.Tensor | QuantizedWeight], inputs: Inputs) -> Oracle:
    """Some tokens in float64, by the exact weights of the experts that they go to."""
    states, index, routing = inputs
    gate_up, down = weights
    rows = torch.randperm(len(states), device=states.device)[:ORACLE_TOKENS]
    truth = torch.zeros(len(rows), config.hidden_size, dtype=torch.float64, device=states.device)
    for expert in index[rows].unique().tolist():
        up, back = (
            weight.dequantize(experts=slice(expert, expert + 1))
            if isinstance(weight, QuantizedWeight)
            else weight[expert : expert + 1].double()
            for weight in (gate_up, down)
        )
        local = torch.where(index[rows] == expert, 0, -1)
        truth += reference.experts(states[rows].double(), up, back, local, routing[rows].double(), config.activation)
    return Oracle(rows, truth)


def call_of(
    config: Gemma4MoEConfig, backend: FusedBackend, weights: Sequence[QuantizedWeight], inputs: Inputs
) -> tuple[ExpertsCall, Callable[[], torch.Tensor]]:
    """A call of the fused backend, as it stands for this card or another, and what makes it."""
    states, index, routing = inputs
    (up, *of_up), (down, *of_down) = (weight.tensors() for weight in weights)
    of_quantised = (*of_up, *of_down)
    formats = ",".join(weight.format.name for weight in weights)
    call = experts_call(states, up, down, index, config.activation, weight_format=formats, of_quantised=of_quantised)
    tensors = ExpertsTensors(states, up, down, index, routing, *_NO_ADAPTERS_OR_BIASES, *of_quantised)
    return call, partial(backend.forward, call, tensors)


class Quantised:
    """The layers in one format, beside the bf16 weights that they were rounded from."""

    def __init__(self, bench: Bench, name: str, quantised: Callable[[Layer], QuantizedExperts]) -> None:
        self.bench, self.config, self.name = bench, bench.config, name
        self.weights = [both(quantised(layer)) for layer in bench.layers]

    def rows(self, tokens: int) -> list[dict[str, Any]]:
        """One for this card's kernels, and with few tokens one for the other card's build."""
        cases = make_cases(self.config, self.bench.layers, tokens, count=count_of_cases(tokens, CASES_UP_TO))
        backends = {HOPPER.name: FusedBackend()}
        if tokens <= BUILD_TOKENS:
            backends[BUILD] = FusedBackend(BUILDS[BUILD])
        checked = cases[:ORACLES]
        oracles = [oracle(self.config, self.weights[case.layer], case.inputs) for case in checked]
        graphs: dict[str, Captured] = {}
        errors: dict[str, float] = {}
        ways: dict[str, str] = {}
        for build, backend in backends.items():
            calls = [call_of(self.config, backend, self.weights[case.layer], case.inputs) for case in cases]
            ways[build] = "tiles" if backend.way(calls[0][0]).startswith("tiles") else "stream"
            graphs[build] = capture([run for _, run in calls])
            label = f"cupymoe, {self.name}, {build}"
            errors[build] = self.bench.error(label, tokens, graphs[build], oracles, ERROR_LIMITS[ways[build]])
        plain = Contender(partial(bf16_call, self.config))
        graphs["bf16"] = capture([plain.bind(case) for case in cases])
        plain_oracles = [oracle(self.config, case.weights, case.inputs) for case in checked]
        plain_error = self.bench.error("cupymoe:bf16", tokens, graphs["bf16"], plain_oracles)
        ms = time_in_turn(graphs)
        hit = mean_hit_experts(cases)
        floor = floor_ms(self.config, tokens, hit, self.weights[0])
        return [
            {
                "format": self.name,
                "build": build,
                "tokens": tokens,
                "hit_experts": round(hit, 2),
                "floor_ms": floor,
                "way": ways[build],
                "error": {"cupymoe": errors[build], "cupymoe:bf16": plain_error},
                "ms": {"cupymoe": ms[build], "cupymoe:bf16": ms["bf16"]},
            }
            for build in backends
        ]


def bf16_call(config: Gemma4MoEConfig, case: Case) -> Callable[[], torch.Tensor]:
    """The same call on plain weights."""
    states, index, routing = case.inputs
    return partial(fused_experts, states, *case.weights, index, routing, activation=config.activation)


def measure_quantised(bench: Bench, tokens: tuple[int, ...] = TOKENS, names: Sequence[str] = ()) -> dict[str, Any]:
    """What ``quantised.json`` holds beside the heading; ``bench``, of :data:`LAYERS` layers, keeps what was wrong.

    ``names`` are those of formats; none: all.

    Raises:
        click.ClickException: the card is not Hopper's, and runs the kernels of one architecture, its own.
    """
    if (arch := Arch.of(bench.layers[0].down_proj.device)) != HOPPER:
        raise click.ClickException(f"quantised experts are measured on Hopper's cards, not on one of {arch.name}")
    ceilings = bench.ceilings()
    rows: list[dict[str, Any]] = []
    for name, quantised in formats().items():
        if names and name not in names:
            continue
        layers = Quantised(bench, name, quantised)
        for count in tokens:
            new = layers.rows(count)
            rows += new
            free_memory()
            for row in new:
                ours, bf16 = (row["ms"][name]["p50"] for name in ("cupymoe", "cupymoe:bf16"))
                click.echo(
                    f"{name}, {row['build']}, T={count}: floor {row['floor_ms']:.4f}, {row['way']} {ours:.4f} ms "
                    f"({ours / row['floor_ms']:.2f}), error {row['error']['cupymoe']:.5f}, bf16 {bf16:.4f}"
                )
        del layers
        free_memory()
    return {"ceilings": ceilings._asdict(), "floor": FLOOR._asdict(), "rows": rows}
