#!/usr/bin/env python
"""cupymoe beside its peers on this machine's GPU: prints tables, writes JSON reports. Sizes are Gemma 4 26B-A4B's.

``experts``, ``decode`` and ``prefill``: the whole call for each number of tokens, against peers and the floor. Peers
are transformers and, where they are installed, vLLM, SGLang and SonicMoE. ``decode`` also times calls with invariant
numerics, and compares their bits.
``sweep``: times, over a fine range of tokens and of every way to compute a call.
``stages``: each kernel's bytes per second against a device copy. ``host``: what an eager call costs at one token, and
how long the calls of a training step take to return.
``lora``: what an unmerged adapter costs. ``training``: a step, forward and backward, beside transformers' and a floor.
``models``: the whole call at the sizes of other models, against transformers and a floor.
``portable``: the whole call by other cards' builds of the kernels, beside this card's own.
``quantised``: the whole call on quantised weights, beside bf16 weights and the floor of their bytes.
``batched``: rows that lie by expert, beside both projections alone and ``torch.bmm``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe import Gemma4MoEConfig
from cupymoe.tools.audit.targets import TargetError
from scripts.benchmarks.batched import TOKENS as BATCHED_TOKENS
from scripts.benchmarks.batched import measure_batched
from scripts.benchmarks.command import begin, measured_device, parse_tokens
from scripts.benchmarks.experts import Bench
from scripts.benchmarks.lora import measure_lora
from scripts.benchmarks.models import MODELS, measure_models, report_name
from scripts.benchmarks.models import TOKENS as MODELS_TOKENS
from scripts.benchmarks.peers import LAYERS, imported_contender
from scripts.benchmarks.portable import TOKENS as PORTABLE_TOKENS
from scripts.benchmarks.portable import measure_portable
from scripts.benchmarks.quantised import LAYERS as QUANTISED_LAYERS
from scripts.benchmarks.quantised import TOKENS as QUANTISED_TOKENS
from scripts.benchmarks.quantised import formats, measure_quantised
from scripts.benchmarks.report import Report, report_folder, timed_kernels, write_report
from scripts.benchmarks.stages import STAGES_TOKENS, measure_stages
from scripts.benchmarks.tables.experts import (
    experts_table,
    first_call_table,
    memory_table,
    percentiles_table,
    skewed_table,
    ways_table,
)
from scripts.benchmarks.tables.other_calls import (
    batched_table,
    lora_table,
    models_table,
    portable_table,
    quantised_table,
)
from scripts.benchmarks.tables.stages import host_table, stages_table
from scripts.benchmarks.tables.training import training_host_table, training_table
from scripts.benchmarks.timing import free_memory
from scripts.benchmarks.training import measure_host, measure_training


def parse_models(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Names between commas; None: all models."""
    if value is None:
        return None
    names = tuple(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in MODELS]:
        raise click.BadParameter(f"must be of {', '.join(MODELS)}, got {', '.join(map(repr, unknown))}")
    return names


def parse_formats(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Names between commas; none: all formats."""
    names = tuple(dict.fromkeys(value.split(","))) if value else ()
    if unknown := [name for name in names if name not in formats()]:
        raise click.BadParameter(f"must be of {', '.join(formats())}, got {', '.join(map(repr, unknown))}")
    return names


def parse_peers(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Targets by name."""
    peers = {}
    for value in values:
        name, equals, target = value.partition("=")
        if not (name and equals and target) or name.startswith("cupymoe"):
            raise click.BadParameter(f"must be NAME=package.module:function, NAME not cupymoe's, got {value!r}")
        peers[name] = target
    return peers


Table = Callable[[Report], str]
REGIMES = (
    "experts",
    "decode",
    "prefill",
    "sweep",
    "stages",
    "host",
    "lora",
    "training",
    "models",
    "portable",
    "quantised",
    "batched",
)
EXPERTS_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
# Generation: where reading the hit experts' weights once is the floor.
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DECODE_SKEWED_TOKENS = (64, 1024)
# Prompts: from where the weights are the floor to where the products are.
PREFILL_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
PREFILL_SKEWED_TOKENS = (8192,)
# Powers of two and what lies midway.
SWEEP_TOKENS = tuple(sorted({*(2**i for i in range(16)), *(3 * 2**i for i in range(14))}))


@click.command()
@click.option(
    "--tokens",
    callback=parse_tokens,
    help="Numbers of tokens of the experts regime (else 1 to 16384), of the models regime (else 1 to 8192) and of the "
    "portable, quantised and batched regimes (else 1 to 4096, 1 to 16384, 1 to 256 of an expert). The report holds "
    "these rows and no others.",
)
@click.option(
    "--models",
    callback=parse_models,
    help="Names between commas of the models regime (else all). The report of some models, or without some of its "
    "numbers of tokens, is models-part.json.",
)
@click.option(
    "--formats",
    "names",
    callback=parse_formats,
    help="Names between commas of the quantised regime (else all). The report of some formats, or without some of its "
    "numbers of tokens, is quantised-part.json.",
)
@click.option(
    "--regime",
    type=click.Choice([*REGIMES, "all"]),
    default="experts",
    show_default=True,
    help="What to measure; all: experts, stages, host and lora.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default="benchmarks",
    show_default=True,
    help="Reports go to <output>/<device>/<regime>.json.",
)
@click.option(
    "--peer",
    "peers",
    callback=parse_peers,
    multiple=True,
    help="NAME=package.module:function, measured too; called as docs/audit.md says. May be repeated.",
)
@click.option(
    "--installed/--no-installed",
    default=True,
    show_default=True,
    help="Measure vLLM, SGLang and SonicMoE where they are installed. SonicMoE's first call takes minutes.",
)
@click.option("--seed", default=0, show_default=True, help="Of weights, inputs and routing.")
@torch.inference_mode()
def main(
    tokens: tuple[int, ...] | None,
    models: tuple[str, ...] | None,
    names: tuple[str, ...],
    regime: str,
    output: Path,
    peers: dict[str, str],
    installed: bool,
    seed: int,
) -> None:
    """Measure cupymoe and its peers on this machine's GPU.

    Exits with 1, and writes no report, if an output is not finite or an error is above its limit. vLLM, SGLang and
    SonicMoE are left out where that happens to them.
    """
    if models and regime != "models":
        raise click.UsageError(f"--models is for --regime models, not for {regime}")
    if names and regime != "quantised":
        raise click.UsageError(f"--formats is for --regime quantised, not for {regime}")
    device = measured_device("bench.py")
    start = begin(device, seed)
    folder = report_folder(output, start["device"])
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    try:
        imported = {name: imported_contender(target, config) for name, target in peers.items()}
    except TargetError as error:
        raise click.ClickException(str(error)) from error
    tables: list[str] = []
    failures: list[str] = []

    def keep(name: str, found: Report, failed: list[str], *shown: Table) -> None:
        report = {**start, **timed_kernels(), **found}
        failures.extend(failed)
        if not failed:
            write_report(folder / f"{name}.json", report)
        tables.extend(table(report) for table in shown)

    def measure(
        name: str, measured: Callable[[Bench], Report], *shown: Table, installed: bool = False, layers: int = LAYERS
    ) -> None:
        """On weights that are gone when the next regime begins."""
        bench = Bench(config, device, imported, installed, layers)
        keep(name, measured(bench), bench.failures, *shown)
        del bench
        free_memory()

    if regime in ("stages", "all"):
        stages, failed = measure_stages(config, device)
        keep("stages", {"tokens": STAGES_TOKENS, "stages": stages}, failed, stages_table)
    if regime in ("host", "all"):

        def host(bench: Bench) -> Report:
            return {**bench.host(), "training": measure_host(bench)}

        measure("host", host, host_table, training_host_table, first_call_table, installed=installed)
    if regime in ("lora", "all"):
        measure("lora", measure_lora, lora_table)
    if regime == "training":
        measure("training", measure_training, training_table)
    if regime == "portable":
        measure("portable", partial(measure_portable, tokens=tokens or PORTABLE_TOKENS), portable_table)
    if regime == "quantised":
        counts = tokens or QUANTISED_TOKENS
        name = "quantised" if not names and counts == QUANTISED_TOKENS else "quantised-part"
        of_formats = partial(measure_quantised, tokens=counts, names=names)
        measure(name, of_formats, quantised_table, layers=QUANTISED_LAYERS)
    if regime == "batched":
        measure("batched", partial(measure_batched, tokens=tokens or BATCHED_TOKENS), batched_table)
    if regime == "models":
        chosen, counts = models or tuple(MODELS), tokens or MODELS_TOKENS
        found, failed = measure_models(chosen, counts, device)
        keep(report_name(chosen, counts), found, failed, models_table)
    if regime == "decode":

        def decode(bench: Bench) -> Report:
            return bench.experts(DECODE_TOKENS, DECODE_SKEWED_TOKENS, invariant=True)

        measure("decode", decode, skewed_table, percentiles_table, experts_table, installed=installed)
    if regime == "prefill":

        def prefill(bench: Bench) -> Report:
            return {**bench.experts(PREFILL_TOKENS, PREFILL_SKEWED_TOKENS), "memory": bench.memory(PREFILL_TOKENS)}

        shown = (skewed_table, memory_table, percentiles_table, experts_table)
        measure("prefill", prefill, *shown, installed=installed)
    if regime == "sweep":
        measure("sweep", lambda bench: bench.sweep(SWEEP_TOKENS), ways_table, installed=installed)
    if regime in ("experts", "all"):

        def experts(bench: Bench) -> Report:
            return bench.experts(tokens or EXPERTS_TOKENS)

        measure("experts", experts, percentiles_table, experts_table, installed=installed)
    for text in tables:
        click.echo(f"\n{text}")
    if failures:
        raise click.ClickException("\n".join(failures))


if __name__ == "__main__":
    main()
