"""A table as text in markdown, and the numbers and headings that all tables have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scripts.benchmarks.report import Report


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with every column to the right, padded so that it reads as text too."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    table.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    )


def microseconds(ms: float) -> str:
    """Three digits or more, of a time in milliseconds."""
    us = ms * 1e3
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def heading(report: Report) -> str:
    """Device, date and versions of a report, in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{report['device']}, {report['date']}, {versions}"
