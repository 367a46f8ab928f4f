#!/usr/bin/env python
"""Calls of one layer without end: random numbers of tokens on one stream, no growth of memory, right results.

With ``--training`` these are training steps of its experts, in each of the modes that users train by.

Memory is compared between the middle and the end of the run: by then every kernel is compiled and every cache is full.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe import Gemma4MoE, Gemma4MoEConfig
from cupymoe.kernels import cuda_sources, jit
from cupymoe.tools.verification.result import SHAPES
from scripts.soaking.inference import Inference
from scripts.soaking.training import Training

CALLS, TRAINING_STEPS = 200_000, 20_000
MAX_TOKENS = 8192
CHECK_EVERY = 100
MB = 2**20


class Memory(NamedTuple):
    """Bytes in use, and how far each may grow over half of a run."""

    tensors: int
    torch_reserved: int
    rest_of_device: int
    host: int


# A tensor kept is a leak whatever its size; torch's allocator may split a block late; CuPy and the driver take memory
# for a module in steps of 2 MB; a hundred bytes a call on the host are 10 MB in half of 200,000 calls.
ALLOWED = Memory(tensors=0, torch_reserved=64 * MB, rest_of_device=2 * MB, host=8 * MB)


def memory() -> Memory:
    """What this process, and whoever shares its GPU, uses now."""
    gc.collect()
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Memory(torch.cuda.memory_allocated(), reserved, total - free - reserved, resident_pages * 4096)


def growth(middle: Memory, end: Memory) -> list[str]:
    """What grew by more than is allowed."""
    return [
        f"{name} grew by {(after - before) / MB:.1f} MB, {allowed / MB:.0f} are allowed"
        for name, before, after, allowed in zip(Memory._fields, middle, end, ALLOWED, strict=True)
        if after - before > allowed
    ]


def new_layer(config: Gemma4MoEConfig, device: str = "cuda") -> Gemma4MoE:
    """A layer with random weights that keep the variance."""
    with torch.device("meta"):
        moe = Gemma4MoE(config).to(torch.bfloat16)
    moe.to_empty(device=device)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0)
    return moe


@click.command()
@click.option(
    "--training", is_flag=True, help="Training steps of the experts instead: forward and backward; needs PEFT."
)
@click.option(
    "--calls",
    type=click.IntRange(min=2),
    help=f"How many calls or training steps.  [default: {CALLS}, or {TRAINING_STEPS} with --training]",
)
@click.option("--shape", type=click.Choice(list(SHAPES)), default="small", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(training: bool, calls: int | None, shape: str, seed: int) -> None:
    """Call one layer for random numbers of tokens.

    Exits with 1 if memory grows, a checked result is wrong, or the second half compiles a kernel.
    """
    if not torch.cuda.is_available():
        raise click.ClickException("soak.py needs a CUDA device")
    calls = calls or (TRAINING_STEPS if training else CALLS)
    click.echo(f"{torch.cuda.get_device_name()}, {shape}, seed {seed}, cuda_src {cuda_sources.sha256()}")
    torch.manual_seed(seed)
    config = SHAPES[shape]
    start = time.perf_counter()
    moe = new_layer(config)
    states = torch.randn(2 * MAX_TOKENS, config.hidden_size, dtype=torch.bfloat16, device="cuda")
    soaked = (Training if training else Inference)(moe, states, random.Random(seed))
    middle = None
    for call in range(1, calls + 1):
        soaked.step(is_checked=call % CHECK_EVERY == 0 or call == calls)
        if call == calls // 2:
            middle, compiled = memory(), jit.compiled_variants()
        if call % max(1, calls // 10) == 0:
            used = ", ".join(f"{name} {size / MB:.1f} MB" for name, size in memory()._asdict().items())
            click.echo(f"{call:8} {soaked.unit}, {time.perf_counter() - start:6.1f} s, {used}")
    end = memory()
    assert middle is not None
    faults = growth(middle, end) + soaked.faults()
    click.echo(f"{calls} {soaked.unit}, {soaked.checked} checked")
    for name, (error, allowed) in soaked.errors().items():
        click.echo(f"{name}: relative error at most {error:.5f} of {allowed:.5f}")
        if not error <= allowed:  # a NaN is a fault, too
            faults.append(f"{name}: a relative error of {error:.5f}, {allowed:.5f} is allowed")
    if jit.compiled_variants() != compiled:
        faults.append(f"{jit.compiled_variants() - compiled} kernels were compiled in the second half")
    if faults:
        raise click.ClickException("; ".join(faults))
    click.echo("no growth of memory")


if __name__ == "__main__":
    main()
