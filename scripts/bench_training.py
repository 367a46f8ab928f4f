"""What a training step of one layer's experts costs, as ``bench.py --regime training`` times it.

A step is a forward and a backward, eager: autograd's own work on the host is part of it. ``full`` asks for the
gradients of hidden states, routing weights and both weights, ``frozen`` for the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from bench_peers import Case, make_cases
from bench_timing import free_memory, percentiles

from cupymoe import Gemma4MoEConfig, fused_experts
from cupymoe.activation import MoEActivation
from cupymoe.gradients import experts_backward
from cupymoe.verification.transformers_peer import experts_of

TOKENS = (4096, 16384)
STEPS, WARM_UP_STEPS = 15, 3
ORACLE_TOKENS, ORACLE_EXPERTS = 64, 2
"""Whose gradients are compared with float64: hidden states and routing weights of tokens, both weights of experts."""
ERROR_LIMIT = 0.008
"""Products that round to bfloat16 each give 0.0064 at the most (Unsloth's and transformers', measured by hand)."""

_NO_BIASES = (None, None)

Step = Callable[[], tuple[torch.Tensor, ...]]


def _step(experts: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor], grad: torch.Tensor) -> Any:
    return torch.autograd.grad(experts(*leaves), leaves, grad)


def _ours(case: Case, activation: MoEActivation, *leaves: torch.Tensor) -> torch.Tensor:
    states, weights, *others = leaves
    projections = others or case.weights
    return fused_experts(states, *projections, case.inputs.top_k_index, weights, activation=activation)


def _grouped_mm(case: Case, module: Any, *leaves: torch.Tensor) -> torch.Tensor:
    states, weights = leaves[:2]
    output: torch.Tensor = module(states, case.inputs.top_k_index, weights)
    return output


def contenders(case: Case, config: Gemma4MoEConfig, full: bool, grad: torch.Tensor) -> dict[str, Step]:
    """A step of each, which gives its gradients in one order."""
    from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig

    states, _, weights = case.inputs
    leaves = [tensor.detach().requires_grad_() for tensor in (states, weights)]
    module = experts_of(Gemma4TextConfig(**asdict(config)), *case.weights)
    module.config._experts_implementation = "grouped_mm"
    if full:
        leaves += [parameter.requires_grad_() for parameter in (module.gate_up_proj, module.down_proj)]
    return {
        "cupymoe": partial(_step, partial(_ours, case, config.activation), leaves, grad),
        "grouped_mm": partial(_step, partial(_grouped_mm, case, module), leaves, grad),
    }


def errors(case: Case, config: Gemma4MoEConfig, grad: torch.Tensor, grads: Sequence[torch.Tensor]) -> dict[str, float]:
    """Norm of the difference from float64 over the norm, of each gradient."""
    states, index, weights = case.inputs
    tokens = torch.randperm(len(states), device=states.device)[:ORACLE_TOKENS]
    of_tokens = experts_backward(
        grad[tokens].double(),
        states[tokens].double(),
        *case.weights,
        index[tokens],
        weights[tokens].double(),
        config.activation,
        *_NO_BIASES,
        (True, False, False, False, True, False, False),
    )
    found = {
        "hidden_states": (grads[0][tokens], of_tokens[0]),
        "top_k_weights": (grads[1][tokens], of_tokens[4]),
    }
    if len(grads) > 2:
        experts = index.unique()[:ORACLE_EXPERTS]
        some = [weight[experts].double() for weight in case.weights]
        local = torch.full((config.num_experts,), -1, device=index.device)
        local[experts] = torch.arange(len(experts), device=index.device)
        of_experts = experts_backward(
            grad.double(),
            states.double(),
            *some,
            local[index],
            weights.double(),
            config.activation,
            *_NO_BIASES,
            (False, True, True, False, False, False, False),
        )
        found["gate_up_proj"] = grads[2][experts], of_experts[1]
        found["down_proj"] = grads[3][experts], of_experts[2]
    result = {}
    for name, (got, truth) in found.items():
        assert truth is not None
        result[name] = ((got.double() - truth).norm() / truth.norm()).item()
    return result


def time_steps(steps: dict[str, Step]) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Milliseconds of a step of each, in turn, and the most megabytes that it allocates beside what was there."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for i in range(WARM_UP_STEPS + STEPS):
        for name, step in steps.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step()
            last.record()
            torch.cuda.synchronize()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) // 10**6
            if i >= WARM_UP_STEPS:
                samples[name].append(first.elapsed_time(last))
    return {name: percentiles(each) for name, each in samples.items()}, peaks


@torch.inference_mode(False)
@torch.enable_grad()
def measure_training(bench: Any) -> dict[str, Any]:
    """What ``training.json`` holds beside the heading; ``bench``, a ``bench_experts.Bench``, keeps what was wrong."""
    rows = []
    layers = [type(layer)(*(weight.clone() for weight in layer)) for layer in bench.layers[:1]]
    for tokens in TOKENS:
        case = make_cases(bench.config, layers, tokens)[0]
        grad = torch.randn_like(case.inputs.hidden_states)
        for what in ("full", "frozen"):
            steps = contenders(case, bench.config, what == "full", grad)
            with torch.no_grad():
                found = {name: errors(case, bench.config, grad, _grads(step)) for name, step in steps.items()}
            for name, error in found["cupymoe"].items():
                if not error <= ERROR_LIMIT:
                    bench.failures.append(f"gradient of {name}: error {error:.5f} at T={tokens}, above {ERROR_LIMIT}")
            ms, peak_mb = time_steps(steps)
            rows.append({"tokens": tokens, "what": what, "ms": ms, "peak_mb": peak_mb, "error": found})
            del steps
            free_memory()
    return {"steps": rows}


def _grads(step: Step) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        return step()
