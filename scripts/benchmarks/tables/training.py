"""Tables of training steps of a layer."""

from __future__ import annotations

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.markdown import markdown


def training_table(report: Report) -> str:
    """The table of ``training.json``: medians in milliseconds of steps that follow each other, ours over the floor and
    the peer's over ours, megabytes kept for the backward and at the peak, and the worst error.
    """
    names = ("cupymoe", "grouped_mm")
    rows = []
    for row in report["rows"]:
        medians = {name: {part: ms["p50"] for part, ms in row["ms"][name].items()} for name in names}
        ours, peer = (medians[name]["step"] for name in names)
        rows.append(
            [
                str(row["tokens"]),
                row["mode"],
                f"{row['floor_ms']:.2f}",
                f"{ours:.2f} ({ours / row['floor_ms']:.2f})",
                *(f"{medians['cupymoe'][part]:.2f}" for part in ("forward", "backward")),
                f"{peer:.2f} ({peer / ours:.2f}x)",
                *(f"{row[key][name]:.0f}" for key in ("kept_mb", "peak_mb") for name in names),
                *(f"{max(row['error'][name].values()):.5f}" for name in names),
            ]
        )
    columns = [f"{name} {what}" for what in ("kept MB", "peak MB", "error") for name in names]
    return markdown(
        ["tokens", "mode", "floor ms", "cupymoe ms (x floor)", "forward", "backward", "grouped_mm ms", *columns], rows
    )


def training_host_table(report: Report) -> str:
    """The table of ``"training"`` in ``host.json``: medians of the microseconds until a call of forward or backward
    returns, where steps follow each other, and those of a step on an idle GPU with other work's caches.
    """
    parts = ("forward", "backward", "step", "alone")
    return markdown(
        ["step", "tokens", "mode", *(f"{part} us" for part in parts)],
        [
            [name, str(row["tokens"]), row["mode"], *(f"{us[part]['p50']:.0f}" for part in parts)]
            for row in report["training"]
            for name, us in row["us"].items()
        ],
    )
