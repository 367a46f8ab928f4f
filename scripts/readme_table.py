#!/usr/bin/env python
"""The README's tables, made from the reports that the benchmarks write; says which reports are stale."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe.tools.reports import stale_reason
from scripts.benchmarks.tables import TABLES, experts_table, heading, together


def stale_reports(benchmarks: Path) -> list[str]:
    """A line for each report that timed other kernels than the present ones, or that is no report."""
    reasons = {path: stale_reason(path) for path in sorted(benchmarks.glob("*/*.json"))}
    return [f"stale report: {path}: {reason}" for path, reason in reasons.items() if reason is not None]


@click.command()
@click.argument("reports", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--together", "merge", is_flag=True, help="One table of the rows of all REPORTS.")
@click.option("--check-report", is_flag=True, help="Only say which reports under --benchmarks are stale; exits 0.")
@click.option(
    "--benchmarks",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).resolve().parent.parent / "benchmarks",
    help="Folder of the committed reports.",
)
def main(reports: tuple[Path, ...], merge: bool, check_report: bool, benchmarks: Path) -> None:
    """Print the markdown tables of REPORTS, which bench.py and bench_model.py write (default: all committed)."""
    if check_report:
        for line in stale_reports(benchmarks):
            click.echo(line)
        return
    if merge:
        report = together([json.loads(path.read_text(encoding="utf-8")) for path in reports])
        click.echo(f"{heading(report)}\n\n{experts_table(report)}\n")
        return
    for path in reports or sorted(benchmarks.glob("*/*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        for key, table in TABLES.items():
            if key in report:
                click.echo(f"{heading(report)}\n\n{table(report)}\n")


if __name__ == "__main__":
    main()
