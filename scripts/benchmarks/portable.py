"""Other cards' builds on this one, as ``bench.py --regime portable`` times them: beside Hopper's own kernels and peers.

A build is the sources compiled for another architecture, with its features and its shared memory, to PTX that a Hopper
card takes (``cupymoe.kernels.arch.BUILDS``); its blocks share a multiprocessor as they would on that card. Its time
here says what the features cost, and nothing of another card's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch

from cupymoe import Gemma4MoEConfig
from cupymoe.backends import ExpertsTensors
from cupymoe.backends.fused import FusedBackend
from cupymoe.kernels.arch import BUILDS, HOPPER, Arch
from cupymoe.ops import experts_call
from scripts.benchmarks.experts import Bench
from scripts.benchmarks.peers import Case, Contender, Oracle, floor_bytes, floor_flops, make_cases, mean_hit_experts
from scripts.benchmarks.timing import FLOOR, free_memory, time_in_turn

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PEERS = {"cupymoe": "hopper", "cupymoe:grouped": "grouped", "grouped_mm": "grouped_mm"}
"""Who is measured beside the builds, and under which name."""


def builds(config: Gemma4MoEConfig) -> dict[str, Contender]:
    """The fused backend as each build, by its name after ``cupymoe:``."""

    def bind(backend: FusedBackend, case: Case) -> Callable[[], torch.Tensor]:
        hidden_states, index, weights = case.inputs
        call = experts_call(hidden_states, *case.weights, index, config.activation)
        return partial(backend.forward, call, ExpertsTensors(hidden_states, *case.weights, index, weights))

    return {f"cupymoe:{name}": Contender(partial(bind, FusedBackend(build))) for name, build in BUILDS.items()}


def floor_ms(config: Gemma4MoEConfig, tokens: int, hit_experts: float) -> float:
    """Fewest milliseconds of a call, from :data:`FLOOR`."""
    read = floor_bytes(config, tokens, hit_experts) / FLOOR.read_tbs / 1e9
    return float(f"{max(read, floor_flops(config, tokens) / FLOOR.bf16_tflops / 1e9):.5g}")


def measure_rows(bench: Bench, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """One for each number of tokens and build."""
    rows = []
    for count in tokens:
        cases = make_cases(bench.config, bench.layers, count)
        oracles = [Oracle.of(bench.config, case) for case in cases]
        others = {name: each for name, each in bench.contenders(cases).items() if name in PEERS}
        captured, errors = bench.captured({**builds(bench.config), **others}, cases, oracles)
        ms = time_in_turn(captured)
        del captured
        free_memory()
        beside = {PEERS[name]: ms[name] for name in others}
        floor = floor_ms(bench.config, count, mean_hit_experts(cases))
        for build in BUILDS:
            name = f"cupymoe:{build}"
            row = {"build": build, "tokens": count, "floor_ms": floor, "error": errors[name]}
            rows.append({**row, "ms": {"cupymoe": ms[name], **beside}})
        medians = ", ".join(f"{name} {each['p50']:.4f}" for name, each in ms.items())
        click.echo(f"T={count}: floor {floor:.4f}, {medians} ms")
    return rows


def measure_portable(bench: Bench, tokens: tuple[int, ...] = TOKENS) -> dict[str, Any]:
    """What ``portable.json`` holds beside the heading; ``bench`` keeps what was wrong.

    Raises:
        click.ClickException: the card is not Hopper's, and runs the kernels of one architecture, its own.
    """
    if (arch := Arch.of(bench.layers[0].down_proj.device)) != HOPPER:
        raise click.ClickException(
            f"--regime portable runs other cards' builds on a Hopper card, and this one is {arch.name}: "
            "--regime experts times its own kernels"
        )
    ceilings = bench.ceilings()
    return {"ceilings": ceilings._asdict(), "floor": FLOOR._asdict(), "rows": measure_rows(bench, tokens)}
