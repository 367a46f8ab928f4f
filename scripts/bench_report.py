"""What every report of the benchmarks starts with, and where it goes."""

from __future__ import annotations

import contextlib
import json
import platform
import re
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import click
import torch
from readme_table import Report

import cupymoe
from cupymoe.kernels import cuda_sources, cupy_import


def versions() -> dict[str, str]:
    """Of everything that bears on the times."""
    found = {
        "cupymoe": cupymoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        **cupy_import.installed_cupys(),
    }
    for package in ("transformers", "vllm", "sglang", "sonic-moe"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def report_heading(device: str) -> Report:
    """What every report starts with."""
    return {
        "device": device,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(),
        "cuda_src_sha256": cuda_sources.sha256(),
    }


def report_folder(output: Path, device: str) -> Path:
    """``benchmarks/nvidia-h100-80gb-hbm3``, say."""
    return output / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_report(path: Path, report: Report) -> None:
    """As indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {path}")
