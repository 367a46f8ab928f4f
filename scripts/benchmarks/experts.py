"""The whole call on one mixture's weights, as ``bench.py`` times it: ours, the peers' and the floor."""

from __future__ import annotations

from typing import Any

import click
import torch

from cupymoe import Gemma4MoEConfig
from scripts.benchmarks.invariance import NAME, bits_equal, invariant_contender
from scripts.benchmarks.libraries import installed_contenders, reason
from scripts.benchmarks.peers import (
    LAYERS,
    PEER_ERROR_LIMIT,
    SKEWED,
    Case,
    Contender,
    Oracle,
    cupymoe_contenders,
    floor_bytes,
    floor_flops,
    make_cases,
    make_layers,
    mean_hit_experts,
    relative_error,
    transformers_contenders,
    ways_of_fused,
)
from scripts.benchmarks.report import timed_kernels
from scripts.benchmarks.timing import (
    Captured,
    Ceilings,
    capture,
    capture_read,
    first_call_seconds,
    free_memory,
    issue_us,
    measure_ceilings,
    percentiles,
    time_in_turn,
    wall_us,
)

ERROR_LIMIT = 0.0042
"""transformers' own relative error at this shape, which ours may not exceed."""
HOST_LOOPS, HOST_REPEATS, HOST_ISSUES = 300, 5, 200


class Bench:
    """The weights, the contenders and the failures of one run.

    A package that fails, or computes something else, is left out with a note; any other contender then fails the run.
    """

    def __init__(
        self,
        config: Gemma4MoEConfig,
        device: torch.device,
        imported: dict[str, Contender],
        installed: bool,
        layers: int = LAYERS,
    ) -> None:
        self.config = config
        self.buffer, self.layers = make_layers(config, device, layers)
        self.peers, notes = transformers_contenders(config, self.layers)
        packages, reasons = installed_contenders(config, self.layers) if installed else ({}, [])
        self.peers.update({**packages, **imported})
        self.optional = packages.keys() - imported.keys()
        self.failures: list[str] = []
        for note in notes + reasons:
            click.echo(note)

    def contenders(self, cases: list[Case]) -> dict[str, Contender]:
        """Who computes these cases, cupymoe first."""
        tokens = cases[0].inputs.hidden_states.shape[0]
        ours, notes = cupymoe_contenders(self.config, cases[0])
        for note in notes:
            click.echo(note)
        peers = {name: peer for name, peer in self.peers.items() if tokens <= (peer.max_tokens or tokens)}
        return {**ours, **peers}

    def error(
        self, name: str, tokens: int, captured: Captured, oracles: list[Oracle], limit: float | None = None
    ) -> float:
        """Relative error of a fresh replay's outputs; what is wrong with them goes to the failures.

        ``limit`` is ours or a peer's, as the name says, unless it is given.
        """
        error, wrong = checked(name, tokens, captured, oracles, limit)
        self.failures += wrong
        return error

    def captured(
        self, contenders: dict[str, Contender], cases: list[Case], oracles: list[Oracle] | None = None
    ) -> tuple[dict[str, Captured], dict[str, float]]:
        """Each contender's calls in a graph, and with oracles their errors."""
        tokens = cases[0].inputs.hidden_states.shape[0]
        graphs: dict[str, Captured] = {}
        errors: dict[str, float] = {}
        for name, each in contenders.items():
            try:
                graph = capture([each.bind(case) for case in cases])
                error, wrong = checked(name, tokens, graph, oracles) if oracles else (None, [])
            except Exception as raised:
                if name not in self.optional:
                    raise
                wrong = [f"{name} failed at T={tokens}: {reason(raised)}"]
            if wrong and name in self.optional:
                del self.peers[name]
                self.optional -= {name}
                click.echo(f"{name} is not measured from here on: {wrong[0]}")
                continue
            self.failures += wrong
            graphs[name] = graph
            if error is not None:
                errors[name] = error
        return graphs, errors

    def experts_row(
        self, tokens: int, ceilings: Ceilings, routing: str | None = None, invariant: bool = False
    ) -> dict[str, Any]:
        """One of the ``"rows"`` of ``experts.json``, or of ``"skewed"``; with ``invariant`` numerics too."""
        cases = make_cases(self.config, self.layers, tokens, routing)
        oracles = [Oracle.of(self.config, case) for case in cases]
        contenders = self.contenders(cases)
        if not invariant:
            return self.timed_row(cases, contenders, ceilings, oracles)
        row = self.timed_row(cases, {**contenders, **invariant_contender(self.config)}, ceilings, oracles)
        row["bits_equal"] = all(bits_equal(self.config, case) for case in cases[: len(self.layers)])
        if not row["bits_equal"]:
            self.failures.append(f"{NAME} gave a token other bits at T={tokens} than in a larger call")
        return row

    def timed_row(
        self,
        cases: list[Case],
        contenders: dict[str, Contender],
        ceilings: Ceilings,
        oracles: list[Oracle] | None = None,
    ) -> dict[str, Any]:
        """The contenders' times beside the floor; with oracles, their errors too."""
        tokens, hit_experts = cases[0].inputs.hidden_states.shape[0], mean_hit_experts(cases)
        captured, error = self.captured(contenders, cases, oracles)
        read = capture_read(self.buffer, floor_bytes(self.config, tokens, hit_experts), len(cases))
        ms = time_in_turn({"read": read, **captured})
        compute_ms = floor_flops(self.config, tokens) / ceilings.bf16_tflops / 1e9
        return {
            "tokens": tokens,
            "hit_experts": round(hit_experts, 2),
            "floor_ms": float(f"{max(ms.pop('read')['p50'], compute_ms):.5g}"),
            "error": error,
            "ms": ms,
        }

    def ceilings(self) -> Ceilings:
        """What the card gives now, told as soon as it is known."""
        found = measure_ceilings(self.buffer, len(self.layers))
        click.echo(f"ceilings: raw read {found.read_tbs} TB/s, bf16 product {found.bf16_tflops} TFLOP/s")
        return found

    def experts(self, tokens: tuple[int, ...], skewed: tuple[int, ...] = (), invariant: bool = False) -> dict[str, Any]:
        """What ``experts.json`` holds beside the heading; ``skewed`` counts are measured with each skewed routing,
        ``invariant`` numerics without one."""
        ceilings = self.ceilings()
        rows = []
        for count in tokens:
            rows.append(self.experts_row(count, ceilings, invariant=invariant))
            echo_row(rows[-1])
        skewed_rows = []
        for count in skewed:
            for routing in SKEWED:
                skewed_rows.append({"routing": routing, **self.experts_row(count, ceilings, routing)})
                echo_row(skewed_rows[-1])
        return {"ceilings": ceilings._asdict(), "rows": rows, **({"skewed": skewed_rows} if skewed else {})}

    def sweep(self, tokens: tuple[int, ...]) -> dict[str, Any]:
        """What ``sweep.json`` holds beside the heading: times of every way that a call could take.

        Errors are measured only where a package must show that it is right.
        """
        ceilings = self.ceilings()
        rows = []
        for count in tokens:
            cases = make_cases(self.config, self.layers, count)
            contenders = {**self.contenders(cases), **ways_of_fused(self.config, cases[0])}
            oracles = [Oracle.of(self.config, case) for case in cases] if self.optional else None
            rows.append(self.timed_row(cases, contenders, ceilings, oracles))
            echo_row(rows[-1])
        return {"ceilings": ceilings._asdict(), "rows": rows}

    def memory(self, tokens: tuple[int, ...]) -> list[dict[str, int]]:
        """Peak bytes of a call over its inputs and output, and those of the rows of both projections of every pair."""
        rows = []
        for count in tokens:
            (case, *_) = make_cases(self.config, self.layers, count)
            call = cupymoe_contenders(self.config, case)[0]["cupymoe"].bind(case)
            call()
            torch.cuda.synchronize()
            free_memory()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            output = call()
            peak = torch.cuda.max_memory_allocated() - before - output.nbytes
            columns = self.config.hidden_size + self.config.moe_intermediate_size
            slots = count * self.config.top_k_experts * columns * output.element_size()
            rows.append({"tokens": count, "peak_bytes": peak, "slots_bytes": slots})
        return rows

    def host(self) -> dict[str, Any]:
        """What ``host.json`` holds beside the heading: eager calls at one token."""
        cases = make_cases(self.config, self.layers, 1)
        oracles = [Oracle.of(self.config, case) for case in cases]
        contenders = self.contenders(cases)
        graphs, _ = self.captured(contenders, cases, oracles)
        calls = {name: [contenders[name].bind(case) for case in cases] for name in graphs}
        gpu_ms = time_in_turn(graphs)
        wall: dict[str, list[float]] = {name: [] for name in calls}
        for each in calls.values():
            wall_us(each, HOST_LOOPS // 3)
        for _ in range(HOST_REPEATS):
            for name, each in calls.items():
                wall[name].append(wall_us(each, HOST_LOOPS))
        first_call_s, sources = first_call_seconds()
        return {
            **timed_kernels(sources),
            "tokens": 1,
            "first_call_s": first_call_s,
            "calls": [
                {
                    "name": name,
                    "wall_us": percentiles(wall[name]),
                    "host_us": percentiles([issue_us(each[i % len(each)]) for i in range(HOST_ISSUES)]),
                    "gpu_us": {q: float(f"{1e3 * ms:.5g}") for q, ms in gpu_ms[name].items()},
                }
                for name, each in calls.items()
            ],
        }


def checked(
    name: str, tokens: int, captured: Captured, oracles: list[Oracle], limit: float | None = None
) -> tuple[float, list[str]]:
    """Relative error of a fresh replay's first outputs, those that have an oracle, and what is wrong with any."""
    wrong = []
    for output in captured.outputs:
        output.fill_(float("nan"))
    captured.graph.replay()
    if not all(output.isfinite().all() for output in captured.outputs):
        wrong.append(f"{name} gave values that are not finite, or left some unwritten, at T={tokens}")
    error = relative_error(oracles, captured.outputs[: len(oracles)])
    if limit is None:
        limit = ERROR_LIMIT if name.startswith("cupymoe") else PEER_ERROR_LIMIT
    if not error <= limit:
        wrong.append(f"{name} has a relative error of {error:.5f} at T={tokens}, above {limit}")
    return float(f"{error:.4g}"), wrong


def echo_row(row: dict[str, Any]) -> None:
    """Its medians, as soon as they are known; the memory of its cases goes back."""
    free_memory()
    medians = ", ".join(f"{name} {ms['p50']:.4f}" for name, ms in row["ms"].items())
    routing = f" ({row['routing']})" if "routing" in row else ""
    click.echo(f"T={row['tokens']}{routing}: floor {row['floor_ms']:.4f}, {medians} ms")
