#!/usr/bin/env python
"""Every kernel at small sizes under NVIDIA's compute-sanitizer: bad accesses, races, uninitialised reads, bad barriers.

Runs this file again under each tool, with torch's memory pooling off, so that an access past a tensor is seen.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe import MoEActivation, fused_experts, moe_activation, reference, route
from cupymoe.kernels import cuda_sources, raw_read
from cupymoe.kernels.bridge import SCALARS
from cupymoe.kernels.router_logits import router_logits
from cupymoe.verification.result import relative_error

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Tokens of every regime of the fused backend and of grouped, and around their bounds, at TOP_K choices of NUM_EXPERTS.
TOKENS = (1, 3, 32, 33, 64, 65, 128, 129, 256, 257, 700, 800, 3100)
NUM_EXPERTS, TOP_K, HIDDEN_SIZE = 64, 4, 64


def run_activations() -> None:
    """gated_activation.cu: every dtype, member and vector width."""
    for dtype, activation, size in product(SCALARS, MoEActivation, (24, 7)):
        moe_activation(activation, torch.randn(5, activation.input_size(size)).to(dtype).cuda())


def run_routing() -> None:
    """router_logits.cu and route.cu."""
    for dtype in SCALARS:
        states, scale, projection = (
            torch.randn(shape).to(dtype).cuda() for shape in ((9, HIDDEN_SIZE), (HIDDEN_SIZE,), (33, HIDDEN_SIZE))
        )
        route(router_logits(states, scale, projection, 1e-6), 8, per_expert_scale=scale[:33].contiguous())


def run_experts() -> None:
    """Every backend and regime, with masked pairs and an expert without tokens; the results are checked too."""
    for intermediate_size, dtype in ((48, torch.bfloat16), (96, torch.bfloat16), (96, torch.float16)):
        shapes = ((NUM_EXPERTS, 2 * intermediate_size, HIDDEN_SIZE), (NUM_EXPERTS, HIDDEN_SIZE, intermediate_size))
        weights = [0.1 * torch.randn(shape).to(dtype) for shape in shapes]
        cuda_weights = [weight.cuda() for weight in weights]
        for tokens, backend in product(TOKENS, ("fused", "grouped")):
            if backend == "grouped" and dtype != torch.bfloat16:
                continue
            states = torch.randn(tokens, HIDDEN_SIZE).to(dtype)
            index = torch.rand(tokens, NUM_EXPERTS - 1).topk(TOP_K).indices
            index[torch.rand(index.shape) < 0.1] = NUM_EXPERTS
            routed = (index, torch.rand(tokens, TOP_K))
            arguments = [tensor.cuda() for tensor in (states, *routed)]
            output = fused_experts(
                arguments[0], *cuda_weights, *arguments[1:], activation=MoEActivation.GELU_TANH, backend=backend
            )
            truth = reference.experts(
                states.double(), *(weight.double() for weight in weights), *routed, MoEActivation.GELU_TANH
            )
            error = relative_error(output.cpu(), truth)
            assert error < 0.01, f"{backend} at {tokens} tokens: relative error {error:.4f}"


def run_suite() -> None:
    """What each tool watches."""
    torch.manual_seed(0)
    with torch.inference_mode():
        run_activations()
        run_routing()
        run_experts()
        raw_read.raw_read(torch.zeros(4096, dtype=torch.uint8).cuda())
    torch.cuda.synchronize()


def start(sanitizer: str, tool: str) -> subprocess.Popen[str]:
    """The suite under one tool; kernels of torch and of libraries are left out."""
    kernels = [re.escape(source) for source in cuda_sources.names()]
    command = [
        *(sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"),
        *("--kernel-regex", f"kns=({'|'.join(kernels)})"),
        *(sys.executable, __file__, "--suite"),
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )


@click.command()
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, default=TOOLS, show_default=True)
@click.option("--suite", is_flag=True, help="Run the kernels themselves, under no tool.")
def main(tools: tuple[str, ...], suite: bool) -> None:
    """Run every kernel and every regime under compute-sanitizer. Exits with 1 if a tool finds anything."""
    if suite:
        run_suite()
        click.echo("every kernel ran")
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        raise click.ClickException("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    click.echo(f"{torch.cuda.get_device_name()}, cuda_src {cuda_sources.sha256()}")
    started = {tool: start(sanitizer, tool) for tool in tools}
    failed = []
    for tool, process in started.items():
        output, _ = process.communicate()
        clean = process.returncode == 0 and "every kernel ran" in output
        click.echo(f"{tool:10} {'0 findings' if clean else 'FAILED'}")
        if not clean:
            failed.append(tool)
            click.echo(output)
    if failed:
        raise click.ClickException(f"findings of {', '.join(failed)}")


if __name__ == "__main__":
    main()
