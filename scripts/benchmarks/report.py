"""What every report of the benchmarks starts with, and where it goes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from cupymoe.kernels import cuda_sources, jit
from cupymoe.tools.reports import kernel_hashes, versions

Report = dict[str, Any]


def report_heading(device: str) -> Report:
    """What every report starts with."""
    return {
        "device": device,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions(),
        "cuda_src_sha256": cuda_sources.sha256(),
    }


def timed_kernels(elsewhere: Iterable[str] = ()) -> Report:
    """A report's ``"kernels"``: hashes of all sources that this process has loaded so far, and of those ``elsewhere``.

    After ``bench.py --regime all`` the sources of the regimes before are among them.
    """
    return {"kernels": kernel_hashes({*jit.loaded_sources(), *elsewhere})}


def report_folder(output: Path, device: str) -> Path:
    """``benchmarks/nvidia-h100-80gb-hbm3``, say."""
    return output / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_report(path: Path, report: Report) -> None:
    """As indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(f"wrote {path}")
