#!/usr/bin/env python
"""vLLM's own experts, ``TritonExperts``, beside cupymoe's, both inside vLLM's modular kernel, on this machine's GPU.

That kernel is what a layer of vLLM calls between its router and the sum over ranks, so both have its allocations and
copies, and differ in the experts alone. Sizes are Gemma 4 26B-A4B's, numbers of tokens those of the CUDA graphs that
vLLM captures, and some of prefill. Prints a table, writes vllm.json.

vLLM takes the tiles that it ships for the shape and the card. Up to 0.33 that are its default ones, unless the variable
``VLLM_TUNED_CONFIG_FOLDER`` names a folder with better.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe import Gemma4MoEConfig
from cupymoe.integrations.vllm.served import refusal
from scripts.benchmarks.command import begin, measured_device, parse_tokens
from scripts.benchmarks.experts import checked
from scripts.benchmarks.peers import Case, Inputs, Oracle, make_cases, make_layers
from scripts.benchmarks.report import report_folder, timed_kernels, write_report
from scripts.benchmarks.tables.other_calls import vllm_table
from scripts.benchmarks.timing import capture, free_memory, time_in_turn

OURS, THEIRS = "cupymoe", "vllm_triton"
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Of vLLM on Hopper, for 256 sequences at a time or more."""
TOKENS = (*CAPTURED, 1024, 2048, 4096, 8192, 16384)
ORACLES = 3
"""Calls of a row that are compared with float64."""
SMALL = Gemma4MoEConfig(256, 128, 8, 2, "gelu_pytorch_tanh")
"""For a run that shows whether everything works."""

Apply = Callable[..., torch.Tensor]


def experts_class(name: str) -> type[Any]:
    """Of vLLM's kind, by the name that the report has."""
    if name == OURS:
        from cupymoe.integrations.vllm.experts import CupymoeExperts

        return CupymoeExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    return TritonExperts  # type: ignore[no-any-return]


def moe_config(config: Gemma4MoEConfig, device: torch.device, tokens: int) -> Any:
    """What vLLM's layer would say of itself."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType

    return FusedMoEConfig(
        num_experts=config.num_experts,
        experts_per_token=config.top_k_experts,
        hidden_dim=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        num_local_experts=config.num_experts,
        num_logical_experts=config.num_experts,
        activation=MoEActivation.from_str(config.activation.value),
        device=device,
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        max_num_tokens=tokens,
    )


def kernel_of(name: str, moe: Any) -> Apply:
    """vLLM's modular kernel around one's experts.

    Raises:
        ClickException: they don't serve the layer.
    """
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
        UnquantizedMoeBackend,
        make_unquantized_moe_kernel,
    )

    experts = experts_class(name)
    if name == OURS and (reason := refusal(moe, experts)):
        raise click.ClickException(f"cupymoe does not serve vLLM's layer here: {reason}")
    made = make_unquantized_moe_kernel(FUSED_MOE_UNQUANTIZED_CONFIG, moe, UnquantizedMoeBackend.TRITON, experts)
    return partial(
        made.apply,
        activation=moe.activation,
        global_num_experts=moe.num_experts,
        expert_map=None,
        apply_router_weight_on_input=False,
    )


def bind(kernel: Apply, case: Case) -> Callable[[], torch.Tensor]:
    """A call without arguments; ids are int32, as vLLM's routers have them."""
    hidden_states, index, weights = case.inputs
    return partial(
        kernel,
        hidden_states=hidden_states,
        w1=case.weights.gate_up_proj,
        w2=case.weights.down_proj,
        topk_ids=index.int(),
        topk_weights=weights,
    )


def on_first(case: Case, kernel: Apply, tokens: int, config: Gemma4MoEConfig) -> None:
    """One call of the most tokens, after which vLLM's workspace stays where it is: graphs hold its address."""
    inputs = case.inputs
    rows = torch.zeros(tokens, config.hidden_size, dtype=torch.bfloat16, device=inputs.hidden_states.device)
    index = torch.arange(tokens * config.top_k_experts, device=rows.device).view(tokens, -1) % config.num_experts
    bind(kernel, case._replace(inputs=Inputs(rows, index, torch.ones(index.shape, device=rows.device))))()


def measure(
    config: Gemma4MoEConfig, device: torch.device, counts: tuple[int, ...], echo: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and what was wrong with somebody's output."""
    from vllm.v1.worker.workspace import lock_workspace

    _, layers = make_layers(config, device)
    moe = moe_config(config, device, max(counts))
    kernels = {name: kernel_of(name, moe) for name in (OURS, THEIRS)}
    first = make_cases(config, layers, 1)[0]
    for kernel in kernels.values():
        on_first(first, kernel, max(counts), config)
    lock_workspace()
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for tokens in counts:
        cases = make_cases(config, layers, tokens)
        oracles = [Oracle.of(config, case) for case in cases[:ORACLES]]
        graphs = {name: capture([bind(kernel, case) for case in cases]) for name, kernel in kernels.items()}
        error = {}
        for name, graph in graphs.items():
            error[name], wrong = checked(name, tokens, graph, oracles)
            failures += wrong
        ms = time_in_turn(graphs)
        rows.append({"tokens": tokens, "ms": ms, "error": error})
        echo(f"T={tokens}: {ms[OURS]['p50']:.4f} ms, vLLM's {ms[THEIRS]['p50'] / ms[OURS]['p50']:.3f}x")
        del cases, oracles, graphs
        free_memory()
    return rows, failures


def in_vllm(stack: ExitStack, device: torch.device) -> None:
    """What vLLM's kernels expect of a worker: a configuration, and a workspace."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    init_workspace_manager(device)
    stack.callback(reset_workspace_manager)
    stack.enter_context(set_current_vllm_config(VllmConfig()))
    stack.enter_context(torch.inference_mode())


@click.command()
@click.option("--tokens", callback=parse_tokens, help="Numbers between commas, instead of vLLM's and prefill's.")
@click.option("--small", is_flag=True, help="A tiny mixture: shows whether everything works, writes no report.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="benchmarks",
    show_default=True,
    help="The report goes to <output>/<device>/vllm.json.",
)
@click.option("--seed", default=0, show_default=True, help="Of weights, inputs and routing.")
def main(tokens: tuple[int, ...] | None, small: bool, output: Path, seed: int) -> None:
    """Time vLLM's experts and cupymoe's in turn.

    Exits with 1 if one of them computes something else; the report is written first.
    """
    warnings.simplefilter("ignore")  # vLLM's
    device = measured_device("bench_vllm.py")
    start = begin(device, seed)
    with ExitStack() as stack:
        in_vllm(stack, device)
        config = SMALL if small else Gemma4MoEConfig.gemma4_26b_a4b()
        rows, failures = measure(config, device, tokens or TOKENS, click.echo)
    report = {**start, **timed_kernels(), "rows": rows}
    click.echo(f"\n{vllm_table(report)}")
    if not small:
        write_report(report_folder(output, start["device"]) / "vllm.json", report)
    if failures:
        raise click.ClickException("\n".join(failures))


if __name__ == "__main__":
    main()
