#!/usr/bin/env python
"""Every kernel at small sizes under NVIDIA's compute-sanitizer: bad accesses, races, uninitialised reads, bad barriers.

Runs this file again under each tool, with torch's memory pooling off, so that an access past a tensor is seen. Beside
that runs a kernel with a fault that the tool has to report: one that watches no kernel is not taken for a clean run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe.kernels import cuda_sources
from cupymoe.kernels.cupy_import import import_cupy
from scripts.sanitizer import SUITE

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PLANTED = "planted_fault"
DONE = "the part is done"
Run = subprocess.CompletedProcess[str]
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
    import_cupy().RawKernel(planted_source(tool), PLANTED)((1,), (64,), (data.data_ptr(),))
    torch.cuda.synchronize()


def run_part(part: int) -> None:
    """One of ``SUITE``."""
    torch.set_num_threads(1)  # of the oracle; many parts run at once
    torch.manual_seed(part)
    SUITE[part]()
    torch.cuda.synchronize()


def entry_points() -> list[str]:
    """Every kernel of every source; ``extern "C"``, so that this is the whole of its name."""
    declared = re.compile(r'^extern "C" __global__ void (?:__\w+__\([^)]*\)\s*)*(\w+)\(', re.MULTILINE)
    texts = [(cuda_sources.directory() / f"{name}.cu").read_text(encoding="utf-8") for name in cuda_sources.names()]
    return [entry for text in texts for entry in declared.findall(text)]


def run_file(*arguments: str, under: tuple[str, ...] = ()) -> Run:
    """This file in a process of its own, its output kept."""
    command = [*under, sys.executable, __file__, *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False
    )


def watch(sanitizer: str, tool: str) -> tuple[str, ...]:
    """The command that puts a process under a tool; kernels of torch and of libraries are left out."""
    # Whole names, joined by "or". A substring (kns) takes no regular expression.
    watched = ",".join(f"kne={entry}" for entry in (*entry_points(), PLANTED))
    return sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--kernel-name", watched


def reports_planted(output: str) -> bool:
    """Whether one of the tool's own lines names the planted kernel."""
    return re.search(rf"^=========.*\b{PLANTED}\b", output, re.MULTILINE) is not None


def unclean(runs: Iterable[Run]) -> list[str]:
    """What the parts printed that did not end well."""
    return [
        f"{' '.join(run.args)} gave {run.returncode}\n{run.stdout}"
        for run in runs
        if run.returncode or DONE not in run.stdout
    ]


def verdict(tool: str, planted: Run, wrong: list[str]) -> bool:
    """Whether a tool is not blind and finds nothing; printed too."""
    if not reports_planted(planted.stdout):
        click.echo(f"{tool:10} BLIND: it did not report a fault that was planted for it\n{planted.stdout}")
        return False
    click.echo("\n".join([f"{tool:10} FAILED", *wrong]) if wrong else f"{tool:10} 0 findings")
    return not wrong


@click.command()
@click.option("--tool", "tools", type=click.Choice(TOOLS), multiple=True, default=TOOLS, show_default=True)
@click.option("--part", type=click.IntRange(0, len(SUITE) - 1), help="Run a part of the suite, under no tool.")
@click.option("--planted", type=click.Choice(TOOLS), help="Run the kernel that this tool must report, under no tool.")
@click.option("--jobs", type=click.IntRange(min=1), default=12, show_default=True, help="Processes at once.")
def main(tools: tuple[str, ...], part: int | None, planted: str | None, jobs: int) -> None:
    """Run every kernel and every regime under compute-sanitizer. Exits with 1 if a tool finds anything, or is blind."""
    if planted:
        run_planted(planted)
        return
    if part is not None:
        run_part(part)
        click.echo(DONE)
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(sanitizer):
        raise click.ClickException("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    click.echo(f"{torch.cuda.get_device_name()}, cuda_src {cuda_sources.sha256()}")
    with ThreadPoolExecutor(jobs) as pool:

        def start(*arguments: str, tool: str | None = None) -> Future[Run]:
            return pool.submit(run_file, *arguments, under=() if tool is None else watch(sanitizer, tool))

        def start_suite(tool: str | None = None) -> list[Future[Run]]:
            return [start("--part", str(part), tool=tool) for part in range(len(SUITE))]

        # Once without a tool: it fills the kernel cache, from which all tools then load.
        if wrong := unclean(run.result() for run in start_suite()):
            raise click.ClickException("\n".join(["the kernels fail without a tool", *wrong]))
        faults = {tool: start("--planted", tool, tool=tool) for tool in tools}
        suites = {tool: start_suite(tool) for tool in tools}
        failed = [
            tool
            for tool in tools
            if not verdict(tool, faults[tool].result(), unclean(run.result() for run in suites[tool]))
        ]
    if failed:
        raise click.ClickException(f"not clean: {', '.join(failed)}")


if __name__ == "__main__":
    main()
