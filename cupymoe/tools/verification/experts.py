"""The experts against float64 beside transformers', determinism, invariant numerics, and CUDA-graph replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cupymoe import reference
from cupymoe.backends import INVARIANT, ExpertsCall, registry, serving
from cupymoe.functional import fused_experts
from cupymoe.ops import experts_call
from cupymoe.token_counts import NUM_TOKENS
from cupymoe.tools.verification import transformers_peer
from cupymoe.tools.verification.result import Result, Setting, largest_error, relative_error
from cupymoe.weights import QuantizedWeight
from cupymoe.weights.dequantize import WeightOnDemand
from cupymoe.weights.format import join_formats
from cupymoe.weights.quantized import Weight

_TOKENS = (1, 7, 64)
_FEWEST = 16  # tokens that are compared, in as many calls as that takes: the error of one token scatters by a tenth
_ORACLE_TOKENS = 1024  # of a call of more, float64 computes a random choice
# bfloat16: transformers' own error at the real shape. float16 has 3 more bits.
_BOUNDS = {torch.bfloat16: 0.0042, torch.float16: 0.0042 / 8, torch.float32: 1e-5}
# Where quantised weights are dequantised and rounded to the dtype before they are multiplied.
_BOUNDS_OF_QUANTISED = {torch.bfloat16: 0.0050, torch.float16: 0.0050 / 8, torch.float32: 1e-5}
_REPEATS = 5
_FEW_ALONE = (1, 7)  # where the reference computes invariant numerics, a token at a time

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states [T, H], top_k_index and top_k_weights [T, K]."""


def checks(setting: Setting) -> Iterator[Result]:
    """Errors against float64, then determinism and invariance, then graph replay."""
    counts = token_counts(setting)
    for num_tokens in counts:
        yield from _against_float64(setting, num_tokens)
    few_and_many = sorted({_TOKENS[-1], counts[-1]})
    for num_tokens in few_and_many:
        for name in registry():
            if unsupported_reason(setting, _inputs(setting, num_tokens), name) is None:
                yield _deterministic(setting, name, num_tokens)
    yield _invariant(setting, counts if setting.on_gpu else _FEW_ALONE)
    for num_tokens in few_and_many:
        yield _graph_replay(setting, num_tokens)


def token_counts(setting: Setting) -> tuple[int, ...]:
    """Numbers of tokens to check: few, and on a GPU one of each regime of the kernels, in rising order."""
    return tuple(sorted({*_TOKENS, *NUM_TOKENS})) if setting.on_gpu else _TOKENS


@dataclass(frozen=True)
class Errors:
    """How far an output is from float64."""

    relative: float
    largest: float
    reordering: float
    """What float32 sums in another order may change in an element."""

    @classmethod
    def of(cls, output: torch.Tensor, truth: torch.Tensor) -> Errors:
        """In norm and elementwise."""
        reordering = 8 * torch.finfo(torch.float32).eps * float(truth.abs().max())
        return cls(relative_error(output, truth), largest_error(output, truth), reordering)

    def within_bounds(self, dtype: torch.dtype, peer: Errors | None, is_quantised: bool = False) -> bool:
        """Whether they are what :func:`bound` allows, no element more than twice as far off as transformers' worst.

        A NaN is never within bounds.
        """
        allowed = float("inf") if peer is None else 2 * peer.largest + self.reordering
        return self.relative <= bound(dtype, is_quantised) and self.largest <= allowed


def bound(dtype: torch.dtype, is_quantised: bool = False) -> float:
    """The relative error that ``dtype`` allows, of plain or of quantised weights."""
    return (_BOUNDS_OF_QUANTISED if is_quantised else _BOUNDS)[dtype]


def errors(setting: Setting, inputs: Inputs, num_tokens: int | None = None) -> tuple[dict[str, Errors], Errors | None]:
    """The errors of every backend that serves the call; those of transformers' experts, where they are installed.

    All tokens are computed, ``num_tokens`` a call (None: in one call), and at most :data:`_ORACLE_TOKENS` of them,
    chosen at random, compared.
    """
    rows = torch.randperm(len(inputs[0]), device=setting.device, generator=setting.generator())[:_ORACLE_TOKENS]
    states, index, weights = (tensor[rows] for tensor in inputs)
    gate_up, down = map(_exact, setting.weights)
    truth = reference.experts(states.double(), gate_up, down, index, weights, setting.config.activation)
    peer = None
    if transformers_peer.missing_reason() is None:
        rounded = (weight_of(weight, slice(None), setting.dtype) for weight in setting.weights)
        module = transformers_peer.experts(setting.config, *rounded)
        with torch.no_grad():
            peer = Errors.of(module(states, index, weights), truth)
    size = num_tokens or len(inputs[0])
    sizes = [size] * (len(inputs[0]) // size)
    calls = list(zip(*(tensor.split_with_sizes(sizes) for tensor in inputs), strict=True))
    serving = [name for name in registry() if unsupported_reason(setting, calls[0], name) is None]
    outputs = {name: torch.cat([_run(setting, call, name) for call in calls]) for name in serving}
    return {name: Errors.of(output[rows], truth) for name, output in outputs.items()}, peer


def unsupported_reason(setting: Setting, inputs: Inputs, backend: str) -> str | None:
    """Why a backend can't serve the call; None if it can."""
    return registry()[backend].unsupported_reason(_call(setting, inputs))


def _call(setting: Setting, inputs: Inputs) -> ExpertsCall:
    states, index, _ = inputs
    (gate_up, *of_gate_up), (down, *of_down) = (
        weight.tensors() if isinstance(weight, QuantizedWeight) else (weight,) for weight in setting.weights
    )
    formats = (weight.format if isinstance(weight, QuantizedWeight) else None for weight in setting.weights)
    return experts_call(
        states,
        gate_up,
        down,
        index,
        setting.config.activation,
        weight_format=join_formats(*formats),
        of_quantised=(*of_gate_up, *of_down),
    )


def weight_of(weight: Weight, experts: slice, dtype: torch.dtype) -> torch.Tensor:
    """The weights of some experts, ``[E', n, k]``, dequantised to ``dtype`` if they are quantised."""
    return weight.dequantize(dtype, experts) if isinstance(weight, QuantizedWeight) else weight[experts]


def _exact(weight: Weight) -> Any:
    """A weight for the oracle: float64 weights of one expert after the other, where it is quantised."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    return WeightOnDemand(weight.format, weight.shape, weight.tensors(), torch.float64)


def _inputs(setting: Setting, num_tokens: int) -> Inputs:
    """Hidden states, distinct random experts, weights."""
    config, generator = setting.config, setting.generator()
    states = torch.randn(
        num_tokens, config.hidden_size, dtype=setting.dtype, device=setting.device, generator=generator
    )
    scores = torch.rand(num_tokens, config.num_experts, device=setting.device, generator=generator)
    index = scores.topk(config.top_k_experts).indices
    weights = torch.rand(num_tokens, config.top_k_experts, device=setting.device, generator=generator)
    return states, index, weights


def _run(setting: Setting, inputs: Inputs, backend: str, numerics: str = "fast") -> torch.Tensor:
    states, index, weights = inputs
    activation = setting.config.activation
    return fused_experts(
        states, *setting.weights, index, weights, activation=activation, backend=backend, numerics=numerics
    )


def _against_float64(setting: Setting, num_tokens: int) -> Iterator[Result]:
    inputs = _inputs(setting, num_tokens * -(-_FEWEST // num_tokens))
    states, index, weights = (tensor[:num_tokens] for tensor in inputs)
    by_backend, peer = errors(setting, inputs, num_tokens)
    beside = "" if peer is None else f"; transformers {peer.relative:.5f}"
    for name in registry():
        label = f"experts against float64, T = {num_tokens} ({name})"
        if (reason := unsupported_reason(setting, (states, index, weights), name)) is not None:
            yield Result(label, "skipped", reason)
            continue
        detail = f"relative error {by_backend[name].relative:.5f} of {bound(setting.dtype):.5f}{beside}"
        yield Result.of(label, by_backend[name].within_bounds(setting.dtype, peer), detail)


def _deterministic(setting: Setting, backend: str, num_tokens: int) -> Result:
    inputs = _inputs(setting, num_tokens)
    first = _run(setting, inputs, backend)
    equal = all(torch.equal(first, _run(setting, inputs, backend)) for _ in range(_REPEATS))
    return Result.of(f"same bits every run, T = {num_tokens} ({backend})", equal, f"{_REPEATS} repeats")


def _invariant(setting: Setting, counts: tuple[int, ...]) -> Result:
    states, index, weights = _inputs(setting, counts[-1])
    backend = serving(_call(setting, (states, index, weights))._replace(numerics=INVARIANT)).name
    whole = _run(setting, (states, index, weights), backend, INVARIANT)
    equal = all(
        torch.equal(_run(setting, (states[:count], index[:count], weights[:count]), backend, INVARIANT), whole[:count])
        for count in counts
    )
    name = "a token has the bits of any other call where numerics are invariant"
    return Result.of(name, equal, f"{backend}, calls of {', '.join(map(str, counts))} tokens")


def _graph_replay(setting: Setting, num_tokens: int) -> Result:
    name = f"CUDA-graph replay gives the eager bits, T = {num_tokens}"
    if not setting.on_gpu:
        return Result(name, "skipped", "no CUDA device")
    inputs = _inputs(setting, num_tokens)
    backend = serving(_call(setting, inputs)).name
    if backend == "reference":
        return Result(name, "skipped", "only the reference serves the call, and it waits for the GPU")
    eager = _run(setting, inputs, backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = _run(setting, inputs, backend)
    replayed.fill_(float("nan"))
    graph.replay()
    return Result.of(name, torch.equal(eager, replayed), f"{backend}, output poisoned before the replay")
