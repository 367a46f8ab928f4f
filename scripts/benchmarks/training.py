"""What a training step of one layer's experts costs, as ``bench.py --regime training`` times it.

A step is a forward and a backward, eager: autograd's own work on the host is part of it. All three modes ask for the
gradients of hidden states and routing weights: ``frozen`` for no others, ``full`` for those of both weights too,
``lora`` for those of adapters on both weights, float32 as PEFT keeps them, while the weights are frozen.

In training one layer follows the other, and the host issues the work of a layer while the GPU still computes the one
before. So the contenders take turns in blocks of steps, and nothing waits for the GPU within a block. Each step is
timed from the end of the one before, by the GPU's own events: where the host is slower than the GPU, its gaps are in
the times. The first step of a block is another thing, ``"alone"``: it finds an idle GPU, and a host whose caches are
full of another contender's work, so that the time until the first kernel begins counts in full.

``bench.py --regime host`` times the host's own share: how long the calls of forward and backward take to return.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import click
import torch

from cupymoe import Gemma4MoEConfig, fused_experts, lora_experts
from cupymoe.gradients import experts_backward
from cupymoe.tools.verification.result import relative_error
from cupymoe.tools.verification.transformers_peer import experts_of
from scripts.benchmarks.experts import Bench
from scripts.benchmarks.lora import RANK, Adapters, factors_of, peft_experts
from scripts.benchmarks.peers import PEER_ERROR_LIMIT, Case, Layer, make_cases
from scripts.benchmarks.timing import FLOOR, free_memory, percentiles

TOKENS = (1024, 4096, 8192, 16384)
MODES = ("full", "frozen", "lora")
HOST_TOKENS = 4096
HOST_MODES = ("frozen", "lora")
BLOCKS, WARM_UP_BLOCKS = 20, 1
STEPS_OF_BLOCK = 6
ORACLE_TOKENS, ORACLE_EXPERTS = 64, 2
"""Whose gradients are compared with float64: those of some tokens, and of some experts' weights or adapters."""
ERROR_LIMIT = 0.008
"""Products that round to bfloat16 each give 0.0064 at the most (Unsloth's and transformers', measured by hand)."""

_OF_TOKENS = ("hidden_states", "top_k_weights")
_NO_BIASES = (None, None)

Tensors = dict[str, torch.Tensor]
Forward = Callable[[], torch.Tensor]
Mark = TypeVar("Mark")
"""A moment: an event of the GPU's, or the host's clock."""


def floor_ms(config: Gemma4MoEConfig, tokens: int, mode: str) -> float:
    """The least time of a step on an H100, if nothing but its products and the sums over a token's experts took any.

    Each is as long as its FLOPs or as its own reads and writes in bfloat16, whichever take longer. Kept for the
    backward are the hidden states and ``[gate | up]``, from which it makes the activation's output again. Of the
    adapters only the FLOPs count, at full rate. Every expert has a token.
    """
    experts, hidden, intermediate = config.num_experts, config.hidden_size, config.moe_intermediate_size
    both = config.activation.input_size(intermediate)
    slots = tokens * config.top_k_experts
    gate_up_proj, down_proj = experts * both * hidden, experts * hidden * intermediate
    states, outputs, gate_up, activated = tokens * hidden, slots * hidden, slots * both, slots * intermediate
    up_flops, down_flops = 2 * slots * both * hidden, 2 * slots * intermediate * hidden

    def ms(elements: int, flops: int = 0) -> float:
        return max(2 * elements / FLOOR.read_tbs, flops / FLOOR.bf16_tflops) / 1e9

    total = (
        # The forward: up with the activation, down, the sum.
        ms(states + gate_up_proj + gate_up + activated, up_flops)
        + ms(activated + down_proj + outputs, down_flops)
        + ms(outputs + states)
        # Back through down and the activation, back through up, the sum.
        + ms(states + down_proj + gate_up + gate_up + activated, down_flops)
        + ms(gate_up + gate_up_proj + outputs, up_flops)
        + ms(outputs + states)
    )
    if mode == "full":
        total += ms(states + activated + down_proj, down_flops) + ms(states + gate_up + gate_up_proj, up_flops)
    if mode == "lora":
        # Two products forward, and the gradients of both operands of each.
        total += ms(0, 3 * 2 * RANK * slots * (hidden + both + intermediate + hidden))
    return total


class Way(NamedTuple):
    """A contender's step."""

    leaves: Tensors
    """What has gradients."""
    forward: Forward

    def gradients(self, output: torch.Tensor, grad: torch.Tensor) -> Tensors:
        """Of the leaves, by name."""
        return dict(zip(self.leaves, torch.autograd.grad(output, list(self.leaves.values()), grad), strict=True))


class Step(NamedTuple):
    """The same step by each contender."""

    cupymoe: Way
    grouped_mm: Way
    """transformers' experts, and of ``lora`` PEFT's wrappers of them, which merge."""

    @classmethod
    def of(cls, case: Case, config: Gemma4MoEConfig, adapters: Adapters | None, mode: str) -> Step:
        """Of one mode; ``adapters``, in float32, are those of ``lora``."""
        from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

        states, index, routing = case.inputs
        module = experts_of(Gemma4TextConfig(**asdict(config)), *case.weights)
        module.config._experts_implementation = "grouped_mm"
        weights = Layer(module.gate_up_proj, module.down_proj)
        leaves = {"hidden_states": states.detach(), "top_k_weights": routing.detach()}
        if mode == "full":
            leaves.update(weights._asdict())
        if adapters is not None:
            leaves.update(adapters.factors())
        for leaf in leaves.values():
            leaf.requires_grad_()
        inputs = leaves["hidden_states"], index, leaves["top_k_weights"]
        theirs, peer = leaves, module
        if adapters is not None:
            peer = peft_experts(module, adapters)
            theirs = {name: leaves[name] for name in _OF_TOKENS} | factors_of(peer)

        def ours() -> torch.Tensor:
            arguments = inputs[0], *weights, *inputs[1:]
            if adapters is None:
                return fused_experts(*arguments, activation=config.activation)
            return lora_experts(*arguments, *adapters, activation=config.activation)

        return cls(Way(leaves, ours), Way(theirs, lambda: peer(*inputs)))


class Oracle(NamedTuple):
    """Gradients in float64: ``truth``'s rows are those of some tokens, and of some experts."""

    tokens: torch.Tensor
    experts: torch.Tensor
    truth: Tensors

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        case: Case,
        config: Gemma4MoEConfig,
        adapters: Adapters | None,
        mode: str,
        grad: torch.Tensor,
        num_tokens: int = ORACLE_TOKENS,
        num_experts: int = ORACLE_EXPERTS,
    ) -> Oracle:
        """Of so many random tokens, with all their experts; and of so many experts, with all their tokens."""
        states, index, routing = case.inputs
        weights = case.weights if adapters is None else adapters.merged(case.weights, torch.float64)
        tokens = torch.randperm(len(states), device=states.device)[:num_tokens]
        experts = index.unique()[:num_experts]

        def backward(
            rows: torch.Tensor | slice, weights: Layer, index: torch.Tensor, needed: Sequence[bool]
        ) -> Any:  # optional tensors, which those that are needed are not
            return experts_backward(
                grad[rows].double(),
                states[rows].double(),
                *weights,
                index,
                routing[rows].double(),
                config.activation,
                *_NO_BIASES,
                needed,
            )

        needed = (True, False, False, False, True, False, False)
        of_states, *_, of_routing, _, _ = backward(tokens, weights, index[tokens], needed)
        truth = dict(zip(_OF_TOKENS, (of_states, of_routing), strict=True))
        if mode == "frozen":
            return cls(tokens, experts, truth)
        local = torch.full((config.num_experts,), -1, device=index.device)
        local[experts] = torch.arange(len(experts), device=index.device)
        some = Layer(*(weight[experts].double() for weight in weights))
        needed = (False, True, True, False, False, False, False)
        _, *of_weights, _, _, _, _ = backward(slice(None), some, local[index], needed)
        if adapters is None:
            truth.update(zip(Layer._fields, of_weights, strict=True))
        else:
            for name, of_weight, (a, b, _) in zip(Adapters._fields, of_weights, adapters, strict=True):
                truth[f"{name}_a"] = b[experts].double().mT @ of_weight
                truth[f"{name}_b"] = of_weight @ a[experts].double().mT
        return cls(tokens, experts, truth)

    def pairs(self, gradients: Tensors) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each gradient the rows that are compared, and their truth."""
        found = {}
        for name, truth in self.truth.items():
            rows = self.tokens if name in _OF_TOKENS else self.experts
            gradient = gradients[name]
            if name.endswith("_a"):  # PEFT's are [E * r, in], and of b [out, r * E]
                gradient = gradient.view(-1, RANK, gradient.shape[-1])
            elif name.endswith("_b") and gradient.dim() == 2:
                gradient = gradient.view(len(gradient), RANK, -1).permute(2, 0, 1)
            found[name] = gradient[rows], truth
        return found

    def errors(self, gradients: Tensors) -> dict[str, float]:
        """Norm of the difference over the norm, of each gradient."""
        return {name: float(f"{relative_error(*pair):.4g}") for name, pair in self.pairs(gradients).items()}


def run_block(way: Way, grad: torch.Tensor, mark: Callable[[], Mark]) -> list[Mark]:
    """Steps in a row on a GPU that is idle at first: the moments before the first, and after each forward and backward.

    What a step returns is freed before the next one, which takes the memory again: no step allocates more than another.
    """
    torch.cuda.synchronize()
    marks = [mark()]
    for _ in range(STEPS_OF_BLOCK):
        output = way.forward()
        marks.append(mark())
        way.gradients(output, grad)
        del output
        marks.append(mark())
    torch.cuda.synchronize()
    return marks


def time_blocks(
    step: Step, grad: torch.Tensor, mark: Callable[[], Mark], between: Callable[[Mark, Mark], float]
) -> dict[str, dict[str, dict[str, float]]]:
    """By contender percentiles of ``"forward"``, ``"backward"`` and ``"step"``, of all steps but the first of a block,
    and of that one as ``"alone"``. The contenders take turns.

    Args:
        step: the contenders.
        grad: of the output.
        mark: says what the moment is.
        between: how long it is from one moment to another.
    """
    samples: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in ("forward", "backward", "step", "alone")} for name in step._fields
    }
    for block in range(WARM_UP_BLOCKS + BLOCKS):
        for name, way in step._asdict().items():
            marks = run_block(way, grad, mark)
            if block < WARM_UP_BLOCKS:
                continue
            times = [between(*pair) for pair in pairwise(marks)]
            steps = [between(*pair) for pair in pairwise(marks[::2])]
            each = samples[name]
            each["forward"] += times[2::2]
            each["backward"] += times[3::2]
            each["step"] += steps[1:]
            each["alone"].append(steps[0])
    return {name: {part: percentiles(times) for part, times in each.items()} for name, each in samples.items()}


def recorded_event() -> torch.cuda.Event:
    """The moment at which the GPU has done what was issued so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Memory(NamedTuple):
    """Of one step, in megabytes."""

    kept_mb: float
    """Allocated by the forward and not freed before the backward, without the output."""
    peak_mb: float
    """The most that was allocated at a time, beside what was there before."""


def measure_memory(way: Way, grad: torch.Tensor) -> Memory:
    """Of a step by itself, on an idle GPU: reading the counters would keep the host from running ahead in a block."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = way.forward()
    kept = torch.cuda.memory_allocated() - before - output.nbytes
    way.gradients(output, grad)
    torch.cuda.synchronize()
    return Memory(round(kept / 1e6, 1), round((torch.cuda.max_memory_allocated() - before) / 1e6, 1))


def measure_step(step: Step, grad: torch.Tensor) -> dict[str, Any]:
    """A row's ``"ms"``, ``"kept_mb"`` and ``"peak_mb"``."""
    ms = time_blocks(step, grad, recorded_event, torch.cuda.Event.elapsed_time)
    memory = {name: measure_memory(way, grad) for name, way in step._asdict().items()}
    return {
        "ms": ms,
        **{key: {name: getattr(each, key) for name, each in memory.items()} for key in Memory._fields},
    }


def wrong(error: dict[str, dict[str, float]], tokens: int, mode: str) -> list[str]:
    """What is above its limit: ours, or a peer's."""
    lines = []
    for name, each in error.items():
        limit = ERROR_LIMIT if name == "cupymoe" else PEER_ERROR_LIMIT
        lines += [
            f"{name}'s gradient of {tensor} has a relative error of {value:.5f} at T={tokens}, {mode}, above {limit}"
            for tensor, value in each.items()
            if not value <= limit
        ]
    return lines


def differentiable_layers(bench: Bench) -> list[Layer]:
    """The first of the layers, whose own are inference tensors."""
    return [type(layer)(*(weight.clone() for weight in layer)) for layer in bench.layers[:1]]


@torch.inference_mode(False)
@torch.enable_grad()
def measure_rows(bench: Bench) -> list[dict[str, Any]]:
    """One for each number of tokens and mode."""
    layers = differentiable_layers(bench)
    rows = []
    for tokens in TOKENS:
        case = make_cases(bench.config, layers, tokens)[0]
        grad = torch.randn_like(case.inputs.hidden_states)
        for mode in MODES:
            adapters = Adapters.of(case.weights, torch.float32) if mode == "lora" else None
            step = Step.of(case, bench.config, adapters, mode)
            oracle = Oracle.of(case, bench.config, adapters, mode, grad)
            error = {name: oracle.errors(way.gradients(way.forward(), grad)) for name, way in step._asdict().items()}
            bench.failures += wrong(error, tokens, mode)
            floor = float(f"{floor_ms(bench.config, tokens, mode):.5g}")
            row = {"tokens": tokens, "mode": mode, "floor_ms": floor, **measure_step(step, grad), "error": error}
            medians = ", ".join(
                f"{name} {ms['step']['p50']:.3f} (alone {ms['alone']['p50']:.3f})" for name, ms in row["ms"].items()
            )
            click.echo(f"T={tokens}, {mode}: floor {floor:.3f}, {medians} ms")
            rows.append(row)
            del adapters, step, oracle
            free_memory()
    return rows


def measure_training(bench: Bench) -> dict[str, Any]:
    """What ``training.json`` holds beside the heading; ``bench`` keeps what was wrong."""
    ceilings = bench.ceilings()
    return {"ceilings": ceilings._asdict(), "floor": FLOOR._asdict(), "rank": RANK, "rows": measure_rows(bench)}


@torch.inference_mode(False)
@torch.enable_grad()
def measure_host(bench: Bench) -> list[dict[str, Any]]:
    """The ``"training"`` of ``host.json``: microseconds until the calls of forward and backward return, by mode.

    In a block, so that the host's caches are warm and the GPU is never waited for; with ``"alone"`` as in the rows of
    ``training.json``.
    """
    case = make_cases(bench.config, differentiable_layers(bench), HOST_TOKENS)[0]
    grad = torch.randn_like(case.inputs.hidden_states)
    rows = []
    for mode in HOST_MODES:
        adapters = Adapters.of(case.weights, torch.float32) if mode == "lora" else None
        step = Step.of(case, bench.config, adapters, mode)
        us = time_blocks(step, grad, time.perf_counter, lambda start, end: (end - start) * 1e6)
        rows.append({"mode": mode, "tokens": HOST_TOKENS, "us": us})
        del adapters, step
        free_memory()
    return rows
