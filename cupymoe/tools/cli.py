"""The command ``cupymoe``: what this machine has, and whether the layer computes what it promises."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import sys
import time

import click
import torch

import cupymoe
from cupymoe.backends import DIRECTIONS, INVARIANT, ExpertsCall, registry, serving
from cupymoe.checkpoint import CheckpointError
from cupymoe.checkpoint.files import on_disk
from cupymoe.config import Gemma4MoEConfig
from cupymoe.kernels import catalog, cuda_sources, cupy_import, jit
from cupymoe.kernels.arch import HOPPER, Arch, build_of
from cupymoe.tools import reports, verification
from cupymoe.tools.verification.result import DTYPES, SHAPES, Setting
from cupymoe.weights import FORMATS

_COLORS = {"pass": "green", "fail": "red", "skipped": "yellow"}
_SEED = click.IntRange(0, 2**63 - 1)  # what a torch.Generator takes


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(cupymoe.__version__, prog_name="cupymoe")
def main() -> None:
    """Gemma 4's mixture of experts on CUDA kernels compiled at run time through CuPy."""


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"no GPU ({platform.machine()})"


def _on_disk(_context: click.Context, _parameter: click.Parameter, path: str | None) -> str | None:
    """The path of an option, seen to be there."""
    if path is not None:
        try:
            on_disk(path)
        except CheckpointError as error:
            raise click.BadParameter(str(error)) from error
    return path


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a table.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="gemma4-26b", show_default=True, help="Sizes.")
@click.option(
    "--checkpoint",
    metavar="PATH",
    callback=_on_disk,
    help="Check the layers of this .safetensors file, index.json or folder; the sizes are its config.json's.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True, help="Element type.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the random inputs.")
def verify(as_json: bool, shape: str, checkpoint: str | None, dtype: str, seed: int) -> None:
    """Check the layer against float64, the activation contract and itself. Exits with 1 if a check fails."""
    setting = Setting(SHAPES[shape], DTYPES[dtype], seed, _device())
    report = {
        "device": _device_name(setting.device),
        "date": datetime.date.today().isoformat(),
        "versions": reports.versions(),
        "cuda_src_sha256": cuda_sources.sha256(),
        **({"shape": shape} if checkpoint is None else {"checkpoint": checkpoint}),
        "dtype": dtype,
        "seed": seed,
    }
    if not as_json:
        click.echo(f"{report['device']}, {report['date']}, {checkpoint or shape}, {dtype}, seed {seed}")
        click.echo(f"cuda_src {report['cuda_src_sha256']}\n")
    results = []
    with torch.inference_mode():
        for result in verification.run(setting, checkpoint):
            results.append(result)
            if not as_json:
                status = click.style(f"{result.status:8}", fg=_COLORS[result.status])
                click.echo(f"{status} {result.name:58} {result.detail}")
    counts = {status: sum(result.status == status for result in results) for status in _COLORS}
    if as_json:
        click.echo(json.dumps({**report, "checks": [vars(result) for result in results]}, indent=2))
    else:
        click.echo("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    sys.exit(1 if counts["fail"] else 0)


@main.command()
def info() -> None:
    """Print what this machine has: GPU, CuPy, NVRTC, cache, backends and compiled sources.

    In a checkout also whether each benchmark report is still of the present kernels.
    """
    device = _device()
    click.echo(f"device           {_device_name(device)}")
    if device.type == "cuda":
        arch = Arch.of(device)
        capability = ".".join(map(str, arch.capability))
        shared = f"{arch.shared_bytes_of_block // 1024} KB of shared memory a block"
        click.echo(f"architecture     {arch.name}, compute capability {capability}, {shared}")
    for name, version in reports.versions().items():
        click.echo(f"{name:16} {version}")
    click.echo(f"nvrtc            {_nvrtc_version()}")
    click.echo(f"kernel cache     {_cache_state()}")
    click.echo(f"cuda_src         {cuda_sources.directory()}")
    click.echo(f"cuda_src_sha256  {cuda_sources.sha256()}")
    click.echo("\nbackends, in the order in which auto asks them (Gemma 4 26B-A4B)")
    click.echo("unaligned is bfloat16 with weights that do not start on 16 bytes")
    calls = {dtype_name: _gemma4_call(device, dtype) for dtype_name, dtype in DTYPES.items()}
    calls["unaligned"] = calls["bfloat16"]._replace(aligned_weights=False)
    for name, backend in registry().items():
        for kind, call in calls.items():
            reason = backend.unsupported_reason(call)
            click.echo(f"  {name:10} {kind:9} {'serves it' if reason is None else reason}")
    click.echo("\nwhat auto takes (bfloat16)")
    for tokens in (1, 64, 1024, 16384):
        for direction in DIRECTIONS:
            call = calls["bfloat16"]._replace(num_tokens=tokens)
            taken = serving(call, direction)
            click.echo(f"  {tokens:5} tokens, {direction:8} {taken.name}: {taken.way(call, direction)}")
    call = calls["bfloat16"]._replace(numerics=INVARIANT)
    taken = serving(call)
    click.echo(f"  any, numerics='invariant' {taken.name}: {taken.way(call)}")
    click.echo("\nquantised weights, both in one format (bfloat16)")
    click.echo(f"  {'format':16}{''.join(name.ljust(10) for name in registry())}".rstrip())
    for format in FORMATS:
        call = calls["bfloat16"]._replace(weight_format=f"{format},{format}")
        served = [backend.unsupported_reason(call) is None for backend in registry().values()]
        cells = "".join("yes".ljust(10) if each else "no".ljust(10) for each in served)
        click.echo(f"  {format:16}{cells}".rstrip())
    if device.type == "cuda" and arch != HOPPER:
        click.echo(f"\n{_never_run(arch)}")
    click.echo("\nCUDA sources")
    for name in cuda_sources.names():
        click.echo(f"  {name:18} {_readiness(name, device)}")
    if paths := reports.committed():
        click.echo("\nbenchmark reports")
    for path in paths:
        reason = reports.stale_reason(path)
        state = "of the present kernels" if reason is None else f"stale: {reason}"
        click.echo(f"  {path.parent.name}/{path.name:12} {state}")


def _never_run(arch: Arch) -> str:
    capability = ".".join(map(str, arch.capability))
    if arch.capability < (8, 0):
        return f"cupymoe has no kernel for compute capability {capability}: torch computes everything, slowly"
    build = build_of(arch)
    ran = "its weight stream" if build is None else f"its weight stream, as build {build} with what this one has,"
    return (
        f"No kernel was ever run on a card of compute capability {capability}; {ran} was run on a Hopper card. "
        "`cupymoe verify` checks all of them here. Please report what it prints, right or wrong, with this output, as "
        'an issue "Run on a card".'
    )


def _nvrtc_version() -> str:
    try:
        return ".".join(map(str, cupy_import.import_nvrtc().getVersion()))
    except Exception as error:
        return f"not usable: {error}"


def _cache_state() -> str:
    folder = cupy_import.cache_folder()
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    return folder if os.path.isdir(existing) and os.access(existing, os.W_OK) else f"{folder} (not writable)"


def _gemma4_call(device: torch.device, dtype: torch.dtype) -> ExpertsCall:
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    return ExpertsCall(
        device=device,
        dtype=dtype,
        activation=config.activation,
        num_tokens=1,
        top_k=config.top_k_experts,
        num_experts=config.num_experts,
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        aligned_hidden_states=True,
        aligned_weights=True,
    )


def _readiness(source: str, device: torch.device) -> str:
    """How long a source took to get its first variant ready, compiled or out of the cache; or why it is not."""
    if device.type != "cuda":
        return "not compiled: no CUDA device"
    arch = Arch.of(device)
    if not catalog.is_served(source, arch):
        return "not compiled: it serves compute capability 9.0 only"
    if arch.capability < (8, 0):
        return "not compiled: it needs compute capability 8.0 or newer"
    variant = next(variant for variant in catalog.variants(arch) if variant.source == source)
    start = time.perf_counter()
    try:
        jit.kernel(variant, source, device.index)
    except (ImportError, jit.CompileError) as error:
        return f"not usable: {str(error).splitlines()[0]}"
    return f"ready in {time.perf_counter() - start:.3f} s"


_AUDIT_COLORS = {"ok": "green", "warn": "yellow", "unclear": "yellow", "contradicts": "red"}


@main.command()
@click.argument("target")
@click.option(
    "--activation",
    default="gelu_pytorch_tanh",
    show_default=True,
    help="What the model's config asks for.",
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: bfloat16 on CUDA, float32 on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of a table.")
@click.option("--seed", type=_SEED, default=0, show_default=True, help="Seed of the random inputs.")
def audit(target: str, activation: str, dtype: str | None, as_json: bool, seed: int) -> None:
    """Find out from outside which function an implementation of the experts computes.

    TARGET is `cupymoe`, `transformers:NAME` (an implementation registered in transformers' ExpertsInterface, such as
    eager or grouped_mm, run on Gemma4TextExperts), `vllm` or `sglang` (what its Gemma 4 asks its kernels for, and what
    they compute here), or `package.module:function`, which is called as

    \b
    function(hidden_states  [T, H],
             gate_up_proj   [E, 2I, H],
             down_proj      [E, H, I],
             top_k_index    [T, K] int64,
             top_k_weights  [T, K] float32) -> [T, H]

    It is imported and run: audit only what you trust. Exits with 1 if a result contradicts the config, with 2 if the
    target can't be run. An `unclear` result is not a contradiction.
    """
    from cupymoe.tools import audit as auditing

    device = _device()
    dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    report = {
        "target": target,
        "activation": activation,
        "dtype": dtype,
        "device": _device_name(device),
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "versions": reports.versions(),
    }
    findings, reason = [], None
    # What a target prints must not get into the JSON.
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        try:
            subject = auditing.prepare(target, activation, DTYPES[dtype], device, seed)
        except (auditing.TargetError, ValueError) as error:
            reason = str(error)
        else:
            if not as_json:
                heading = f"{target} where the config asks for {activation}; {dtype}, {report['device']}, seed {seed}"
                click.echo(f"{heading}\n")
            for finding in auditing.audit(subject):
                findings.append(finding)
                if not as_json:
                    status = click.style(f"{finding.status:11}", fg=_AUDIT_COLORS[finding.status])
                    click.echo(f"{status} {finding.name:26} {finding.value:24} {finding.detail}")
    if reason is not None:
        if as_json:
            click.echo(json.dumps({**report, "verdict": "cannot run", "reason": reason}, indent=2))
        else:
            click.echo(f"{target}: {reason}", err=True)
        sys.exit(2)
    verdict = auditing.verdict(findings)
    if as_json:
        click.echo(
            json.dumps({**report, "verdict": verdict, "findings": [one.as_dict() for one in findings]}, indent=2)
        )
    else:
        ending = {"agrees": "agrees with the config", "contradicts": "contradicts the config", "unclear": "is unclear"}
        click.echo(f"\n{target} {ending[verdict]}")
    sys.exit(1 if verdict == "contradicts" else 0)
