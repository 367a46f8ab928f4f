"""Tables of what a call is made of: its stages, and the time of the host."""

from __future__ import annotations

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.markdown import markdown, microseconds


def stages_table(report: Report) -> str:
    """The table of ``stages.json``: bytes moved and their rate, beside the device copy's."""
    return markdown(
        ["stage", "bytes moved", "MB", "us p20", "p50", "p80", "GB/s", "% of copy"],
        [
            [
                stage["name"],
                stage["counted"],
                f"{stage['bytes'] / 1e6:.1f}",
                *(microseconds(stage["ms"][q]) for q in ("p20", "p50", "p80")),
                f"{stage['gb_per_s']:.0f}",
                f"{100 * stage['of_copy']:.1f}",
            ]
            for stage in report["stages"]
        ],
    )


def host_table(report: Report) -> str:
    """The table of ``host.json``, medians: an eager call's wall clock in a loop, the time until one call on an idle GPU
    returns, which has caches to fill that a loop has full, and the GPU's time.
    """
    return markdown(
        ["call", "tokens", "wall us", "first to return us", "GPU us"],
        [
            [
                call["name"],
                str(report["tokens"]),
                *(f"{call[key]['p50']:.1f}" for key in ("wall_us", "host_us", "gpu_us")),
            ]
            for call in report["calls"]
        ],
    )
