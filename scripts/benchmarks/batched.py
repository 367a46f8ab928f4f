"""Rows that lie by expert, as ``bench.py --regime batched`` times them: beside both projections alone, and torch.bmm.

How many rows of each expert count varies as with uniform routing. ``gemms`` are the kernels of both projections on the
same rows, packed, with a plan that was made before, and chosen for as many rows as there are: what a call costs that
knows all on the host. ``bmm`` multiplies all rows, those that don't count too, and masks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import click
import torch

from cupymoe import Gemma4MoEConfig, batched_experts, moe_activation, reference
from cupymoe.backends import BatchTensors, ExpertsCall, fused, fused_backward
from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.expert_stream import shape_of
from cupymoe.kernels.experts_down import experts_down
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up import experts_up
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.plan_batch import BatchSlots
from cupymoe.kernels.plan_chunks import plan_chunks
from cupymoe.kernels.sort_by_expert import TICKETS
from cupymoe.kernels.stream_regimes import regime
from cupymoe.kernels.stream_workspace import new_workspace
from cupymoe.ops import experts_call
from scripts.benchmarks.experts import ERROR_LIMIT, Bench
from scripts.benchmarks.peers import PEER_ERROR_LIMIT, Layer, error_of_all
from scripts.benchmarks.timing import Captured, capture, free_memory, time_in_turn

TOKENS = (1, 4, 16, 32, 64, 128, 256)
"""Of an expert, on average."""
MAX_TOKENS = 1024
"""What an exchange between eight devices of 128 tokens each makes room for."""
ORACLE_EXPERTS = 4


class Batch(NamedTuple):
    """One call: the layer's weights and its rows."""

    weights: Layer
    hidden_states: torch.Tensor
    """``[E, max_tokens, H]``, NaN where they don't count."""
    counts: torch.Tensor
    """``[E]`` int32"""

    @property
    def counted(self) -> torch.Tensor:
        """``[E, max_tokens]`` bool"""
        return BatchTensors(self.hidden_states, self.counts, *self.weights).counted


def make_batch(config: Gemma4MoEConfig, weights: Layer, tokens: int, max_tokens: int) -> Batch:
    """Each of ``tokens`` times E rows goes to a random expert."""
    device, num_experts = weights.down_proj.device, config.num_experts
    chosen = torch.randint(num_experts, (tokens * num_experts,), device=device)
    counts = chosen.bincount(minlength=num_experts).clamp(max=max_tokens).int()
    batch = Batch(
        weights,
        torch.randn(num_experts, max_tokens, config.hidden_size, dtype=torch.bfloat16, device=device),
        counts,
    )
    batch.hidden_states[~batch.counted] = torch.nan
    return batch


def ours(config: Gemma4MoEConfig, batch: Batch) -> Callable[[], torch.Tensor]:
    """``batched_experts``."""
    return partial(batched_experts, batch.hidden_states, batch.counts, *batch.weights, activation=config.activation)


def bmm(config: Gemma4MoEConfig, batch: Batch) -> Callable[[], torch.Tensor]:
    """All rows, by torch, but for the activation, of which it has no kernel that takes both halves."""
    gate_up_proj, down_proj = (weight.transpose(1, 2) for weight in batch.weights)

    def call() -> torch.Tensor:
        gate_up = torch.bmm(batch.hidden_states, gate_up_proj)
        output = torch.bmm(moe_activation(config.activation, gate_up), down_proj)
        return output.masked_fill_(~batch.counted.unsqueeze(2), 0)

    return call


def gemms(config: Gemma4MoEConfig, batch: Batch, tickets: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Both projections of the packed rows; ``tickets`` are zeros before each replay."""
    rows = batch.hidden_states[batch.counted]
    offsets = torch.cat([batch.counts.new_zeros(1), batch.counts.cumsum(0, dtype=torch.int32)])
    numbers = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    call = experts_call(rows, *batch.weights, rows[:, :1], config.activation)
    if fused.takes_tiles(call.load, config.hidden_size):
        tensors = BatchTensors(batch.hidden_states, batch.counts, *batch.weights).as_routed()
        shape = fused_backward.tile_shape(call, tensors)
        slots = BatchSlots(offsets, numbers, tickets)
        return lambda: experts_down_wgmma(
            experts_up_wgmma(rows, batch.weights.gate_up_proj, slots, shape), batch.weights.down_proj, slots, shape
        )
    return _streamed(call, batch, rows, offsets, numbers)


def _streamed(
    call: ExpertsCall, batch: Batch, rows: torch.Tensor, offsets: torch.Tensor, numbers: torch.Tensor
) -> Callable[[], torch.Tensor]:
    sizes = call.num_experts, call.hidden_size, call.intermediate_size
    chosen = regime(call.load, call.intermediate_size, plans_inline=False)
    shape = shape_of(chosen, call.dtype, torch.int32, call.activation, *sizes, 1, sorted_pairs=True)
    workspace = new_workspace(rows, shape, len(rows)).of_sorted(numbers, numbers)
    plan_chunks(offsets, chosen.tokens, workspace)
    output = rows.new_empty(rows.shape, dtype=shape.slot_dtype)
    workspace = workspace._replace(expert_output=output.data_ptr())

    # What the plan is made of is kept by the call itself: the workspace has its address alone.
    def both(_kept: torch.Tensor = numbers) -> torch.Tensor:
        experts_up(rows, batch.weights.gate_up_proj, None, shape, workspace)
        experts_down(batch.weights.down_proj, None, shape, workspace)
        return output

    return both


def all_gemms(config: Gemma4MoEConfig, batches: list[Batch]) -> list[Callable[[], torch.Tensor]]:
    """The calls of one replay, the first of which zeroes the tickets of all."""
    tickets = torch.zeros(len(batches), TICKETS, dtype=torch.int32, device=batches[0].counts.device)
    first, *others = (gemms(config, batch, its) for batch, its in zip(batches, tickets, strict=True))

    def zeroing() -> torch.Tensor:
        tickets.zero_()
        return first()

    return [zeroing, *others]


def compared(
    config: Gemma4MoEConfig, batches: list[Batch], outputs: list[torch.Tensor], packed: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of some experts that have any, of outputs as they lie, or ``packed``; and the same in float64."""
    for batch, output in zip(batches, outputs, strict=True):
        ends = batch.counts.cumsum(0).tolist()
        hit = batch.counts.nonzero().flatten()
        for expert in hit[torch.randperm(len(hit), device=hit.device)[:ORACLE_EXPERTS]].tolist():
            count = int(batch.counts[expert])
            gate_up, down = (weight[expert].double() for weight in batch.weights)
            states = batch.hidden_states[expert, :count].double()
            truth = reference.activate(states @ gate_up.T, config.activation) @ down.T
            yield output[ends[expert] - count : ends[expert]] if packed else output[expert, :count], truth


def measure_row(bench: Bench, tokens: int, max_tokens: int) -> dict[str, Any]:
    """One of the ``"rows"``; what is wrong goes to ``bench.failures``."""
    config = bench.config
    batches = [make_batch(config, layer, tokens, max_tokens) for layer in bench.layers]
    graphs: dict[str, Captured] = {
        "cupymoe": capture([ours(config, batch) for batch in batches]),
        "gemms": capture(all_gemms(config, batches)),
        "bmm": capture([bmm(config, batch) for batch in batches]),
    }
    errors = {}
    for name, graph in graphs.items():
        for output in graph.outputs:
            output.fill_(torch.nan)
        graph.graph.replay()
        pairs = compared(config, batches, graph.outputs, packed=name == "gemms")
        errors[name] = float(f"{error_of_all(pairs):.4g}")
        limit = PEER_ERROR_LIMIT if name == "bmm" else ERROR_LIMIT
        if not errors[name] <= limit:
            bench.failures.append(
                f"{name} has a relative error of {errors[name]:.5f} at {tokens} of {max_tokens} tokens an expert, "
                f"above {limit}"
            )
    ms = time_in_turn(graphs)
    return {"tokens_per_expert": tokens, "max_tokens": max_tokens, "error": errors, "ms": ms}


def measure_batched(bench: Bench, tokens: tuple[int, ...] = TOKENS) -> dict[str, Any]:
    """What ``batched.json`` holds beside the heading: each number of tokens in room for twice as many, and for
    :data:`MAX_TOKENS`. ``bench`` keeps what was wrong.

    Raises:
        click.ClickException: the card is not Hopper's, whose kernels are measured.
    """
    if (arch := Arch.of(bench.layers[0].down_proj.device)) != HOPPER:
        raise click.ClickException(f"batches of the experts are measured on Hopper's cards, not on one of {arch.name}")
    rows = []
    for count in tokens:
        for max_tokens in dict.fromkeys((2 * count, max(MAX_TOKENS, 2 * count))):
            rows.append(measure_row(bench, count, max_tokens))
            free_memory()
            medians = ", ".join(f"{name} {each['p50']:.4f}" for name, each in rows[-1]["ms"].items())
            click.echo(f"{count} of {max_tokens} tokens an expert: {medians} ms")
    return {"rows": rows}
