#!/usr/bin/env python
"""Every kernel at small sizes under NVIDIA's compute-sanitizer: bad accesses, races, uninitialised reads, bad barriers.

Runs this file again under each tool, with torch's memory pooling off, so that an access past a tensor is seen. Before
that runs a kernel with a fault that the tool has to report: one that watches no kernel is not taken for a clean run.
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
from cupymoe.kernels import cuda_sources, jit, raw_read
from cupymoe.kernels.bridge import SCALARS
from cupymoe.kernels.router_logits import router_logits
from cupymoe.verification.result import relative_error

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
HIDDEN_SIZE = 64
TOP_K = 4
# (experts, hidden size, tokens): around the bounds of every regime of the fused backend's weight stream, the last of
# them where the hidden size keeps the tiles out; every cut of the tiles; and grouped at all of these.
CASES = (
    (64, 64, (1, 3, 32, 33, 64, 65, 128, 129, 256, 257, 511)),
    (64, 72, (512, 513, 700)),
    (8, 64, (64, 130, 300, 479, 480, 600, 735, 736, 900)),
)
PLANTED = "planted_fault"
# For each tool, what 64 threads do wrong to 64 integers that were never written.
FAULTS = {
    "memcheck": "data[threadIdx.x + 1] = 1;",
    "racecheck": "shared[threadIdx.x] = threadIdx.x; data[threadIdx.x] = shared[63 - threadIdx.x];",
    "initcheck": "data[threadIdx.x] += 1;",
    # Not a barrier in half of a warp: threads that have ended count as arrived, and the tool says nothing.
    "synccheck": "if (threadIdx.x < 16) __syncwarp(0xffff0000u);",
}


def planted_source(tool: str) -> str:
    """A kernel that ``tool`` must find fault with."""
    return f'extern "C" __global__ void {PLANTED}(int* data) {{ __shared__ int shared[64]; {FAULTS[tool]} }}'


def run_planted(tool: str) -> None:
    """Its launch; the tool may end the CUDA context for it."""
    data = torch.empty(64, dtype=torch.int32, device="cuda")
    jit.import_cupy().RawKernel(planted_source(tool), PLANTED)((1,), (64,), (data.data_ptr(),))
    torch.cuda.synchronize()


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
    sizes = ((48, torch.bfloat16), (96, torch.bfloat16), (96, torch.float16))
    for (num_experts, hidden_size, counts), (intermediate_size, dtype) in product(CASES, sizes):
        shapes = ((num_experts, 2 * intermediate_size, hidden_size), (num_experts, hidden_size, intermediate_size))
        weights = [0.1 * torch.randn(shape).to(dtype) for shape in shapes]
        cuda_weights = [weight.cuda() for weight in weights]
        for tokens, backend in product(counts, ("fused", "grouped")):
            if backend == "grouped" and dtype != torch.bfloat16:
                continue
            states = torch.randn(tokens, hidden_size).to(dtype)
            index = torch.rand(tokens, num_experts - 1).topk(TOP_K).indices
            index[torch.rand(index.shape) < 0.1] = num_experts
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


def entry_points() -> list[str]:
    """Every kernel of every source; ``extern "C"``, so that this is the whole of its name."""
    declared = re.compile(r'^extern "C" __global__ void (?:__\w+__\([^)]*\)\s*)*(\w+)\(', re.MULTILINE)
    texts = [(cuda_sources.directory() / f"{name}.cu").read_text(encoding="utf-8") for name in cuda_sources.names()]
    return [entry for text in texts for entry in declared.findall(text)]


def start(sanitizer: str, tool: str, *arguments: str) -> subprocess.Popen[str]:
    """This file under one tool; kernels of torch and of libraries are left out."""
    # Whole names, joined by "or". A substring (kns) takes no regular expression.
    watched = ",".join(f"kne={entry}" for entry in (*entry_points(), PLANTED))
    command = [
        *(sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--kernel-name", watched),
        *(sys.executable, __file__, *arguments),
    ]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )


def reports_planted(output: str) -> bool:
    """Whether one of the tool's own lines names the planted kernel."""
    return re.search(rf"^=========.*\b{PLANTED}\b", output, re.MULTILINE) is not None


@click.command()
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, default=TOOLS, show_default=True)
@click.option("--suite", is_flag=True, help="Run the kernels themselves, under no tool.")
@click.option("--planted", type=click.Choice(TOOLS), help="Run the kernel that this tool must report, under no tool.")
def main(tools: tuple[str, ...], suite: bool, planted: str | None) -> None:
    """Run every kernel and every regime under compute-sanitizer. Exits with 1 if a tool finds anything, or is blind."""
    if planted:
        run_planted(planted)
        return
    if suite:
        run_suite()
        click.echo("every kernel ran")
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        raise click.ClickException("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    click.echo(f"{torch.cuda.get_device_name()}, cuda_src {cuda_sources.sha256()}")
    # Once without a tool: it fills the kernel cache, from which all tools then load.
    if subprocess.run([sys.executable, __file__, "--suite"], check=False).returncode:
        raise click.ClickException("the kernels fail without a tool")
    failed = []
    for tool in tools:
        output, _ = start(sanitizer, tool, "--planted", tool).communicate()
        if not reports_planted(output):
            failed.append(tool)
            click.echo(f"{tool:10} BLIND: it did not report a fault that was planted for it\n{output}")
    started = {tool: start(sanitizer, tool, "--suite") for tool in tools if tool not in failed}
    for tool, process in started.items():
        output, _ = process.communicate()
        clean = process.returncode == 0 and "every kernel ran" in output
        click.echo(f"{tool:10} {'0 findings' if clean else 'FAILED'}")
        if not clean:
            failed.append(tool)
            click.echo(output)
    if failed:
        raise click.ClickException(f"not clean: {', '.join(failed)}")


if __name__ == "__main__":
    main()
