"""What ``bench.py`` measures: one mixture's weights and inputs, and who computes it, cupymoe's backends and peers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch

import cupymoe
from cupymoe import Gemma4MoEConfig, reference
from cupymoe.backends import ExpertsTensors, fused, registry
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.load import Load
from cupymoe.ops import experts_call
from cupymoe.tools.audit.targets import resolve
from cupymoe.tools.verification.transformers_peer import experts_of

LAYERS = 3
WEIGHT_STD = 0.02
ORACLE_TOKENS = 256
CASES_UP_TO: Mapping[float, int] = {4: 24, 64: 12, 256: 6, 1024: 3, math.inf: 2}
"""Calls in one graph, by the number of tokens up to which they serve."""
PEER_ERROR_LIMIT = 0.01
"""Above it a peer did not compute what we do, and its time says nothing."""
BATCHED_MM_MAX_TOKENS = 16
"""``batched_mm`` copies the weights of every pair: 12 MB each, 1.5 GB at 16 tokens."""


class Layer(NamedTuple):
    """Weights of one layer's experts."""

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor


class Inputs(NamedTuple):
    """What the experts of a layer are given."""

    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor


class Case(NamedTuple):
    """One call: the layer's number, its weights, its input."""

    layer: int
    weights: Layer
    inputs: Inputs


class Contender(NamedTuple):
    """One way to compute a case."""

    bind: Callable[[Case], Callable[[], torch.Tensor]]
    """A call without arguments, so that it can be captured and timed."""
    max_tokens: int | None = None


def make_layers(
    config: Gemma4MoEConfig, device: torch.device | str, count: int = LAYERS
) -> tuple[torch.Tensor, list[Layer]]:
    """Random bf16 weights of some layers, as views into one buffer, which comes first."""
    experts, hidden, intermediate = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gate_up_shape = (experts, config.activation.input_size(intermediate), hidden)
    down_shape = (experts, hidden, intermediate)
    sizes = [torch.Size(shape).numel() for shape in (gate_up_shape, down_shape)]
    buffer = torch.empty(count, sum(sizes), dtype=torch.bfloat16, device=device)
    layers = []
    for row in buffer:
        gate_up, down = row.normal_(std=WEIGHT_STD).split(sizes)
        layers.append(Layer(gate_up.view(gate_up_shape), down.view(down_shape)))
    return buffer.flatten(), layers


def _a_quarter_to_one(index: torch.Tensor) -> torch.Tensor:
    index[:, : index.shape[1] // 4] = 0
    return index


SKEWED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one expert has a quarter of the pairs": _a_quarter_to_one,
    "all tokens to the same experts": lambda index: index[:1].expand(index.shape).contiguous(),
    "four experts": lambda index: index % 4,
}
"""Routings that are not uniform, made from uniform ones."""


def make_inputs(config: Gemma4MoEConfig, tokens: int, device: torch.device | str, routing: str | None = None) -> Inputs:
    """Normal hidden states; float32 weights, as Gemma 4's router gives; distinct and uniform experts, or a skew."""
    shape = (tokens, config.top_k_experts)
    index = torch.rand(tokens, config.num_experts, device=device).topk(config.top_k_experts).indices
    return Inputs(
        torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16, device=device),
        SKEWED[routing](index) if routing else index,
        torch.randn(shape, device=device).softmax(dim=-1),
    )


def count_of_cases(tokens: int, up_to: Mapping[float, int] = CASES_UP_TO) -> int:
    """Enough calls that no weights stay cached and a graph's start does not count."""
    return next(count for limit, count in up_to.items() if tokens <= limit)


def make_cases(
    config: Gemma4MoEConfig, layers: list[Layer], tokens: int, routing: str | None = None, count: int | None = None
) -> list[Case]:
    """Calls that the layers take in turn; by default as many as :func:`count_of_cases` says."""
    count = count or count_of_cases(tokens)
    device = layers[0].down_proj.device
    return [
        Case(i % len(layers), layers[i % len(layers)], make_inputs(config, tokens, device, routing))
        for i in range(count)
    ]


def mean_hit_experts(cases: list[Case]) -> float:
    """Experts with at least one token, on average over the cases."""
    return float(sum(case.inputs.top_k_index.unique().numel() for case in cases)) / len(cases)


def floor_bytes(config: Gemma4MoEConfig, tokens: int, hit_experts: float, element_size: int = 2) -> int:
    """Fewest bytes a call moves: the hit experts' weights once, the hidden states in and out."""
    input_size = config.activation.input_size(config.moe_intermediate_size)
    expert = (input_size + config.moe_intermediate_size) * config.hidden_size
    return int((hit_experts * expert + 2 * tokens * config.hidden_size) * element_size)


def floor_flops(config: Gemma4MoEConfig, tokens: int) -> int:
    """Operations of both products of every pair."""
    input_size = config.activation.input_size(config.moe_intermediate_size)
    return 2 * tokens * config.top_k_experts * config.hidden_size * (input_size + config.moe_intermediate_size)


class Oracle(NamedTuple):
    """A case in float64: all tokens up to 1024, else a random choice of them."""

    rows: torch.Tensor
    truth: torch.Tensor

    @classmethod
    def of(cls, config: Gemma4MoEConfig, case: Case) -> Oracle:
        """Computed one expert at a time, each expert's weights brought to float64 on their own."""
        hidden_states, index, weights = case.inputs
        tokens = hidden_states.shape[0]
        rows = torch.randperm(tokens, device=hidden_states.device)[: tokens if tokens <= 1024 else ORACLE_TOKENS]
        truth = reference.experts(
            hidden_states[rows].double(), *case.weights, index[rows], weights[rows], config.activation
        )
        return cls(rows, truth)


def error_of_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Norm of outputs' differences from their truths over the norm of these, all taken as one: single tokens scatter by
    10%."""
    norms = [torch.stack([output.double().sub(truth).norm(), truth.norm()]) for output, truth in pairs]
    difference, truth = torch.stack(norms).norm(dim=0)
    return float(difference / truth)


def relative_error(oracles: list[Oracle], outputs: list[torch.Tensor]) -> float:
    """Of the tokens that the oracles have."""
    return error_of_all((output[rows], truth) for (rows, truth), output in zip(oracles, outputs, strict=True))


def cupymoe_contenders(config: Gemma4MoEConfig, case: Case) -> tuple[dict[str, Contender], list[str]]:
    """What ``auto`` takes, and every fast backend that serves the case; why the others do not."""
    served, notes = ["auto"], []
    call = experts_call(case.inputs.hidden_states, *case.weights, case.inputs.top_k_index, config.activation)
    for name, backend in registry().items():
        if backend.is_slow:
            continue
        if reason := backend.unsupported_reason(call):
            notes.append(f"cupymoe:{name} does not serve T={call.num_tokens}: {reason}")
        else:
            served.append(name)

    def bind(backend: str, case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        return partial(
            cupymoe.fused_experts,
            hidden_states,
            *case.weights,
            index,
            weights,
            activation=config.activation,
            backend=backend,
        )

    names = {name: "cupymoe" if name == "auto" else f"cupymoe:{name}" for name in served}
    return {names[name]: Contender(partial(bind, name)) for name in served}, notes


def ways_of_fused(config: Gemma4MoEConfig, case: Case) -> dict[str, Contender]:
    """The two ways of the fused backend, where they serve the case, whichever of them it takes."""
    load = Load.of(*case.inputs.top_k_index.shape, config.num_experts)
    arch = Arch.of(case.inputs.hidden_states.device)
    reasons = {
        fused.stream: fused.stream_reason(load, arch),
        fused.tiles: fused.tiles_reason(load, config.hidden_size, arch),
    }

    def bind(way: Callable[..., torch.Tensor], case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        call = experts_call(hidden_states, *case.weights, index, config.activation)
        return partial(way, call, ExpertsTensors(hidden_states, *case.weights, index, weights))

    return {
        f"cupymoe:{way.__name__}": Contender(partial(bind, way)) for way, reason in reasons.items() if reason is None
    }


def imported_contender(target: str, config: Gemma4MoEConfig) -> Contender:
    """Any function that ``cupymoe audit`` takes, ``package.module:function``.

    Raises:
        TargetError: it can't be imported.
    """
    experts = resolve(target, config.hidden_activation).experts

    def bind(case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        return partial(experts, hidden_states, *case.weights, index, weights)

    return Contender(bind)


def transformers_contenders(config: Gemma4MoEConfig, layers: list[Layer]) -> tuple[dict[str, Contender], list[str]]:
    """transformers' ``grouped_mm`` and ``batched_mm`` on its own module, which shares the weights; or why not."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
    except ImportError as error:
        return {}, [f"grouped_mm and batched_mm are not measured: {error}"]
    text_config = Gemma4TextConfig(**asdict(config))

    modules = [experts_of(text_config, *layer) for layer in layers]

    def bind(forward: Callable[..., torch.Tensor], case: Case) -> Callable[[], torch.Tensor]:
        return partial(forward, modules[case.layer], *case.inputs)

    limits = {"grouped_mm": None, "batched_mm": BATCHED_MM_MAX_TOKENS}
    return {name: Contender(partial(bind, ALL_EXPERTS_FUNCTIONS[name]), limit) for name, limit in limits.items()}, []
