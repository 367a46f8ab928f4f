#!/usr/bin/env python
"""The tables of README.md and docs/benchmarks.md, made from the reports that the benchmarks write.

In these documents a table stands between ``<!-- rows of nvidia-h200/decode.json -->``, which is a name of
``scripts.benchmarks.tables.RENDERED`` and one or more reports, and ``<!-- end -->``. ``--write`` makes all of them
anew; ``--check-report`` says which reports are stale.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cupymoe.tools.reports import stale_reason
from scripts.benchmarks.report import Report
from scripts.benchmarks.tables import RENDERED, TABLES
from scripts.benchmarks.tables.experts import experts_table, together
from scripts.benchmarks.tables.markdown import heading

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
_TABLE = re.compile(r"<!-- (?P<name>\w+) of (?P<reports>[^>]+?) -->\n.*?<!-- end -->", re.DOTALL)


def stale_reports(benchmarks: Path) -> list[str]:
    """A line for each report that timed other kernels than the present ones, or that is no report."""
    reasons = {path: stale_reason(path) for path in sorted(benchmarks.glob("*/*.json"))}
    return [f"stale report: {path}: {reason}" for path, reason in reasons.items() if reason is not None]


def _origin(reports: dict[Path, Report], document: Path) -> str:
    """Where a table is from: card and torch, and of each report a link, its date and the sources that were timed."""
    last = [*reports.values()][-1]
    links = [
        f"[{path.name}]({os.path.relpath(path, document.parent)}) of {report['date']} "
        f"(cuda_src {report['cuda_src_sha256'][:12]})"
        for path, report in reports.items()
    ]
    return f"{last['device']}, torch {last['versions']['torch']}: {', '.join(links)}"


def written(document: Path, benchmarks: Path) -> str:
    """The text of a document with the tables that it asks for, made from the present reports."""

    def table(found: re.Match[str]) -> str:
        paths = [benchmarks / name for name in found["reports"].split()]
        reports = {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}
        text = RENDERED[found["name"]](together([*reports.values()]) if len(reports) > 1 else reports[paths[0]])
        if found["name"] != "summary":
            text = f"{_origin(reports, document)}\n\n{text}"
        return f"<!-- {found['name']} of {found['reports']} -->\n{text}\n<!-- end -->"

    return _TABLE.sub(table, document.read_text(encoding="utf-8"))


@click.command()
@click.argument("reports", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--together", "merge", is_flag=True, help="One table of the rows of all REPORTS.")
@click.option("--check-report", is_flag=True, help="Only say which reports under --benchmarks are stale; exits 0.")
@click.option("--write", is_flag=True, help="Make the tables of README.md and docs/benchmarks.md anew.")
@click.option(
    "--benchmarks",
    type=click.Path(file_okay=False, path_type=Path),
    default=ROOT / "benchmarks",
    help="Folder of the committed reports.",
)
def main(reports: tuple[Path, ...], merge: bool, check_report: bool, write: bool, benchmarks: Path) -> None:
    """Print the markdown tables of REPORTS, which bench.py and bench_model.py write (default: all committed)."""
    if check_report:
        for line in stale_reports(benchmarks):
            click.echo(line)
        return
    if write:
        for document in DOCUMENTS:
            document.write_text(written(document, benchmarks), encoding="utf-8")
            click.echo(f"wrote {document}")
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
