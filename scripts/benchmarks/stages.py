"""The stages of the ``grouped`` backend, each kernel on its own, as ``bench.py --regime stages`` times them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from cupymoe import Gemma4MoEConfig
from cupymoe.kernels.combine import combine
from cupymoe.kernels.gated_activation import gated_activation
from cupymoe.kernels.gather import gather
from cupymoe.kernels.route import route
from cupymoe.kernels.sort_by_expert import sort_by_expert
from scripts.benchmarks.peers import make_inputs
from scripts.benchmarks.timing import Call, capture, free_memory, time_in_turn

STAGES_TOKENS = 16384
COPIES = ("memcpy", "copy kernel")


class Stage(NamedTuple):
    """One kernel, with the bytes it has to read and write."""

    counted: str
    bytes: int
    calls: Sequence[Call]


def _activate(gate_up: torch.Tensor, config: Gemma4MoEConfig, num_rows: torch.Tensor) -> torch.Tensor:
    output = gate_up.new_empty((gate_up.shape[0], config.moe_intermediate_size))
    return gated_activation(gate_up, output, config.activation, num_rows=num_rows)


def make_stages(config: Gemma4MoEConfig, tokens: int, device: torch.device | str) -> dict[str, Stage]:
    """The stages on random bf16 data, and two device copies of 1.5 GB, the faster being their yardstick.

    The large ones read and write far more than the L2 holds. ``route`` and ``sort_by_expert`` read a few MB that the
    kernel before them left in L2, here as in a model: their time counts, their rate does not.
    """
    hidden, pairs = config.hidden_size, tokens * config.top_k_experts
    intermediate, width = config.moe_intermediate_size, config.activation.input_size(config.moe_intermediate_size)
    experts, top_k = config.num_experts, config.top_k_experts
    new = partial(torch.randn, dtype=torch.bfloat16, device=device)
    inputs = [make_inputs(config, tokens, device) for _ in range(2)]
    sorted_pairs = [sort_by_expert(each.top_k_index, experts) for each in inputs]
    gate_up, expert_output = [new(pairs, width) for _ in inputs], [new(pairs, hidden) for _ in inputs]
    logits, scale = [new(tokens, experts) for _ in inputs], new(experts)
    source = new(768 * 1024**2)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return {
        COPIES[0]: Stage("reads and writes N", copied, [partial(target.copy_, source)] * 2),
        COPIES[1]: Stage("reads and writes N", copied, [partial(torch.abs, source, out=target)] * 2),
        "gated_activation": Stage(
            "reads T*K*2I, writes T*K*I",
            2 * pairs * (width + intermediate),
            [partial(_activate, gate_up[i], config, sorted_pairs[i].expert_offsets[experts:]) for i in (0, 1)] * 2,
        ),
        "gather": Stage(
            "reads T*H, writes T*K*H",
            2 * (tokens + pairs) * hidden,
            [partial(gather, inputs[i].hidden_states, sorted_pairs[i].slot_of_pair) for i in (0, 1)] * 2,
        ),
        "combine": Stage(
            "reads T*K*H, writes T*H",
            2 * (tokens + pairs) * hidden,
            [partial(combine, expert_output[i], sorted_pairs[i].slot_of_pair, inputs[i].top_k_weights) for i in (0, 1)]
            * 2,
        ),
        "sort_by_expert": Stage(
            "reads T*K i64, writes 2*T*K i32",
            pairs * (8 + 4 + 4),
            [partial(sort_by_expert, inputs[i].top_k_index, experts) for i in (0, 1)] * 10,
        ),
        "route": Stage(
            "reads T*E, writes T*K f32 and i64",
            2 * tokens * experts + pairs * (4 + 8),
            [partial(route, logits[i], top_k, scale, True) for i in (0, 1)] * 10,
        ),
    }


def measure_stages(config: Gemma4MoEConfig, device: torch.device | str) -> tuple[list[dict[str, Any]], list[str]]:
    """The ``"stages"`` of ``stages.json``, and what was wrong with their outputs."""
    stages = make_stages(config, STAGES_TOKENS, device)
    captured = {name: capture(stage.calls) for name, stage in stages.items()}
    times = time_in_turn(captured)
    failures = [
        f"{name} gave values that are not finite"
        for name in ("gated_activation", "gather", "combine")
        if not all(output.isfinite().all() for output in captured[name].outputs)
    ]
    rates = {name: stage.bytes / times[name]["p50"] / 1e6 for name, stage in stages.items()}
    copy_rate = max(rates[name] for name in COPIES)
    rows = [
        {
            "name": name,
            "counted": stage.counted,
            "bytes": stage.bytes,
            "ms": times[name],
            "gb_per_s": float(f"{rates[name]:.5g}"),
            "of_copy": float(f"{rates[name] / copy_rate:.4g}"),
        }
        for name, stage in stages.items()
    ]
    del stages, captured
    free_memory()
    return rows, failures
