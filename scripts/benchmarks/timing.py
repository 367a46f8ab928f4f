"""How ``bench.py`` times: CUDA graphs over rotated inputs, contenders in turn, and the two ceilings of the card."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cupymoe.kernels.raw_read import raw_read

MATMUL_SIZE = 8192
MIN_REPLAYS, MAX_REPLAYS = 25, 200
SECONDS_PER_CONTENDER = 0.25
WARM_UP_SECONDS = 0.1

Call = Callable[[], Any]


class Captured(NamedTuple):
    """One CUDA graph that makes every call of a list once, and what the calls returned."""

    graph: torch.cuda.CUDAGraph
    outputs: list[Any]
    made: Sequence[Call]
    """The calls themselves: a replay reads what they hold, such as indices that were converted for them."""

    @property
    def calls(self) -> int:
        """Calls in one replay."""
        return len(self.outputs)


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile, to five digits."""
    return {f"p{q}": float(f"{np.percentile(samples, q):.5g}") for q in (20, 50, 80)}


def capture(calls: Sequence[Call]) -> Captured:
    """Warm the calls up (kernels compile, libraries allocate) and capture them all, in order."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [call() for call in calls]
    return Captured(graph, outputs, calls)


def time_in_turn(
    contenders: dict[str, Captured], seconds_per_contender: float = SECONDS_PER_CONTENDER
) -> dict[str, dict[str, float]]:
    """Milliseconds of one call of each contender, by percentile over the replays.

    A round replays each contender once, so that all share the clocks and the temperature of the card.
    """
    start = now = time.perf_counter()
    while now - start < WARM_UP_SECONDS:
        round_start = now
        for captured in contenders.values():
            captured.graph.replay()
        torch.cuda.synchronize()
        now = time.perf_counter()
    rounds = seconds_per_contender * len(contenders) / (now - round_start)
    rounds = int(min(max(rounds, MIN_REPLAYS), MAX_REPLAYS))
    events = {
        name: [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)] for name in contenders
    }
    for i in range(rounds):
        for name, captured in contenders.items():
            events[name][i][0].record()
            captured.graph.replay()
            events[name][i][1].record()
    torch.cuda.synchronize()
    return {
        name: percentiles([first.elapsed_time(last) / contenders[name].calls for first, last in events[name]])
        for name in contenders
    }


def capture_read(buffer: torch.Tensor, size: int, calls: int) -> Captured:
    """Raw reads of ``size`` bytes, each of the next such part of a buffer, around and around."""
    data = buffer.view(torch.uint8)
    size = size // 16 * 16
    parts = min(data.numel() // size, calls)
    if parts < 1:
        raise ValueError(f"buffer must hold {size} bytes, got {data.numel()}")
    return capture([partial(raw_read, data[i % parts * size :][:size]) for i in range(calls)])


class Ceilings(NamedTuple):
    """What this card gives to a kernel that only reads, and to a dense product."""

    read_tbs: float
    bf16_tflops: float


FLOOR = Ceilings(read_tbs=3.05, bf16_tflops=782.0)
"""An H100's. What the floors of some reports are computed from, whatever the run's card gives, which is beside them."""


def measure_ceilings(buffer: torch.Tensor, parts: int) -> Ceilings:
    """TB/s of raw reads over ``parts`` equal parts of a buffer; TFLOP/s of a bf16 product of 8192 cubed."""
    size = buffer.numel() * buffer.element_size() // parts // 16 * 16
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device=buffer.device) for _ in range(2))
    read = capture_read(buffer, size, parts)
    product = capture([partial(torch.matmul, a, b)] * 4)
    read_ms = time_in_turn({"read": read})["read"]["p50"]
    product_ms = time_in_turn({"product": product})["product"]["p50"]
    return Ceilings(
        read_tbs=float(f"{size / read_ms / 1e9:.4g}"),
        bf16_tflops=float(f"{2 * MATMUL_SIZE**3 / product_ms / 1e9:.4g}"),
    )


def wall_us(calls: Sequence[Call], loops: int) -> float:
    """Microseconds a call of an eager loop with one synchronisation at its end."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(loops):
        calls[i % len(calls)]()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / loops * 1e6


def issue_us(call: Call) -> float:
    """Microseconds until a call returns, on an idle GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def synchronized_ms(call: Callable[[], Any]) -> float:
    """Wall clock of a call to the end of its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


_FIRST_CALL = """
import time, torch
from cupymoe import Gemma4MoE, Gemma4MoEConfig, warmup
from cupymoe.kernels.cupy_import import import_cupy
from cupymoe.kernels.jit import loaded_sources
from cupymoe.token_counts import NUM_TOKENS
with torch.device("cuda"):
    moe = Gemma4MoE(Gemma4MoEConfig.gemma4_26b_a4b()).to(torch.bfloat16)
torch.cuda.synchronize()
seconds = [time.perf_counter()]
import_cupy()
seconds.append(time.perf_counter())
for tokens in (1,), NUM_TOKENS:
    warmup(moe, tokens)
    torch.cuda.synchronize()
    seconds.append(time.perf_counter())
print(*(later - sooner for sooner, later in zip(seconds, seconds[1:])))
print(*loaded_sources())
"""


def first_call_seconds() -> tuple[dict[str, dict[str, float]], set[str]]:
    """What a fresh process waits for, at Gemma 4's sizes: with an empty kernel cache, then with the kernels on disk.

    Also the CUDA sources that it loads.
    """
    found: dict[str, dict[str, float]] = {}
    sources: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("compiling", "from_disk"):
            run = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL],
                env={
                    **os.environ,
                    "CUPY_CACHE_DIR": folder,
                    "CUDA_CACHE_DISABLE": "1",  # the driver's, which NVRTC asks too
                    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
                },
                capture_output=True,
                encoding="utf-8",
                check=True,
            )
            times, loaded = run.stdout.splitlines()
            seconds = [float(f"{float(part):.3g}") for part in times.split()]
            sources.update(loaded.split())
            found[name] = dict(zip(("import_cupy", "one_token", "every_regime"), seconds, strict=True))
    return found, sources


def free_memory() -> None:
    """Give the memory of dropped tensors and graphs back."""
    gc.collect()
    torch.cuda.empty_cache()
