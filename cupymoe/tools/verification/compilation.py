"""Without a GPU: every kernel compiles for every architecture that it is served on, without spills."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from cupymoe.kernels import cuda_sources
from cupymoe.kernels.catalog import compilations
from cupymoe.kernels.jit import CompileError, Variant
from cupymoe.kernels.offline_cache import compile_offline
from cupymoe.tools.verification.result import Result, Setting


def checks(setting: Setting) -> Iterator[Result]:
    """One result a CUDA source."""
    for source in cuda_sources.names():
        name = f"{source}.cu compiles without spills"
        if setting.on_gpu:
            yield Result(name, "skipped", "checked where there is no GPU")
        else:
            yield _compile(name, [*compilations(source)])


def _compile(name: str, jobs: list[tuple[Variant, str]]) -> Result:
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            reports = list(pool.map(lambda job: compile_offline(*job), jobs))
    except ImportError as error:
        return Result(name, "skipped", str(error))
    except CompileError as error:
        return Result(name, "fail", str(error))
    spilled = sum(report.spill_bytes for report in reports)
    if not all(report.registers for report in reports):
        return Result(name, "fail", "NVRTC said nothing of registers and spills")
    registers = max(report.registers for report in reports)
    counts = Counter(arch for _, arch in jobs)
    variants = ", ".join(f"{arch} {count}" for arch, count in counts.items())
    detail = f"variants of {variants}: at most {registers} registers, {spilled} bytes spilled"
    return Result.of(name, spilled == 0, detail)
