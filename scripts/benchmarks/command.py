"""What the benchmarks' commands have in common: an option, the device, and how a run begins."""

from __future__ import annotations

import click
import torch

from scripts.benchmarks.report import Report, report_heading
from scripts.benchmarks.tables.markdown import heading


def parse_tokens(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Positive numbers between commas; None: the regime's own."""
    if value is None:
        return None
    try:
        tokens = tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"must be numbers between commas, got {value!r}") from None
    if min(tokens) < 1:
        raise click.BadParameter(f"must be positive, got {value!r}")
    return tokens


def measured_device(command: str, is_small: bool = False) -> torch.device:
    """This machine's GPU; without one its CPU, if the run ``is_small``.

    Raises:
        click.ClickException: there is no GPU to measure.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not is_small:
        raise click.ClickException(f"{command} measures a CUDA GPU, and torch sees none on this machine")
    return torch.device("cpu")


def begin(device: torch.device, seed: int) -> Report:
    """What the report starts with, which is printed too; torch is seeded."""
    torch.manual_seed(seed)
    start = report_heading(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    click.echo(f"{heading(start)}\ncuda_src {start['cuda_src_sha256']}")
    return start
