#!/usr/bin/env python
"""The README's plot, made from reports that ``bench.py`` writes: time over the floor, by number of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import matplotlib

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.experts import peers, together

matplotlib.rcParams["svg.hashsalt"] = "cupymoe"  # the same report gives the same file


def figure(report: Report) -> Figure:
    """Both axes logarithmic; a line for cupymoe and one for each peer of the report."""
    rows = report["rows"]
    result, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for name in ("cupymoe", *peers(report)):
        measured = [row for row in rows if name in row["ms"]]
        axes.plot(
            [row["tokens"] for row in measured],
            [row["ms"][name]["p50"] / row["floor_ms"] for row in measured],
            marker="o",
            markersize=3.5 if name == "cupymoe" else 2.5,
            linewidth=2.2 if name == "cupymoe" else 1.2,
            label=name,
            zorder=3 if name == "cupymoe" else 2,
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    ticks = [1, 1.25, 1.5, 2, 3, 4, 5]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([row["tokens"] for row in rows if (row["tokens"] & (row["tokens"] - 1)) == 0])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("tokens")
    axes.set_ylabel("time over the floor")
    axes.set_title(f"Gemma 4 26B-A4B experts, bfloat16, {report['device']}, {report['date']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return result


@click.command()
@click.argument("reports", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(reports: tuple[Path, ...]) -> None:
    """Draw REPORTS, sweep.json or decode.json and prefill.json, into ratio.svg beside the first."""
    target = reports[0].with_name("ratio.svg")
    report = together([json.loads(path.read_text(encoding="utf-8")) for path in reports])
    figure(report).savefig(target, metadata={"Date": None})
    click.echo(f"wrote {target}")


if __name__ == "__main__":
    main()
