"""Tables of calls of Gemma 4's experts beside floor and peers: ``decode.json``, ``prefill.json``, ``sweep.json``."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.markdown import markdown, microseconds


def together(reports: Sequence[Report]) -> Report:
    """One report with the rows of several, each number of tokens from the last that has it, and all their dates; what
    else a heading says is the last's.
    """
    rows = {row["tokens"]: row for report in reports for row in report["rows"]}
    dates = " and ".join(sorted({report["date"] for report in reports}))
    return {**reports[-1], "date": dates, "rows": [rows[tokens] for tokens in sorted(rows)]}


def peers(report: Report) -> list[str]:
    """Names of a report that are not cupymoe's, in its order."""
    names = {name: None for row in report["rows"] for name in row["ms"]}
    return [name for name in names if name.partition(":")[0] != "cupymoe"]


def experts_table(report: Report) -> str:
    """The table of ``experts.json``: medians in microseconds, each peer's with its ratio to cupymoe's, and errors."""
    names = peers(report)
    rows = []
    for row in report["rows"]:
        ours = row["ms"]["cupymoe"]["p50"]
        cells = [str(row["tokens"]), microseconds(row["floor_ms"]), microseconds(ours), f"{ours / row['floor_ms']:.2f}"]
        for name in names:
            ms = row["ms"].get(name, {}).get("p50")
            cells.append("" if ms is None else f"{microseconds(ms)} ({ms / ours:.2f}x)")
        for name in ("cupymoe", *names):
            cells.append(f"{row['error'][name]:.5f}" if name in row["error"] else "")
        rows.append(cells)
    errors = [f"error {name}" for name in ("cupymoe", *names)]
    return markdown(["tokens", "floor us", "cupymoe us", "x floor", *(f"{name} us" for name in names), *errors], rows)


def summary(report: Report) -> str:
    """A sentence of ``experts.json``: the range of our medians over the floor, and of ``grouped_mm``'s over ours."""
    tokens = [row["tokens"] for row in report["rows"]]
    medians = [{name: ms["p50"] for name, ms in row["ms"].items()} for row in report["rows"]]
    floors = [ours["cupymoe"] / row["floor_ms"] for ours, row in zip(medians, report["rows"], strict=True)]
    peer = [ours["grouped_mm"] / ours["cupymoe"] for ours in medians]
    return (
        f"{report['device']}, {report['date']}: from {min(tokens)} to {max(tokens)} tokens a call takes "
        f"{min(floors):.2f} to {max(floors):.2f} times\nthe floor, and transformers' `grouped_mm` takes "
        f"{min(peer):.2f} to {max(peer):.2f} times as long as cupymoe."
    )


def percentiles_table(report: Report) -> str:
    """Every time of ``experts.json``: percentiles in microseconds, ratios to the floor and to cupymoe's median."""
    rows = []
    for row in report["rows"]:
        for name, ms in row["ms"].items():
            rows.append(
                [
                    str(row["tokens"]),
                    name,
                    *(microseconds(ms[q]) for q in ("p20", "p50", "p80")),
                    f"{ms['p50'] / row['floor_ms']:.2f}",
                    f"{ms['p50'] / row['ms']['cupymoe']['p50']:.2f}",
                    f"{row['error'][name]:.5f}",
                ]
            )
    return markdown(["tokens", "name", "us p20", "p50", "p80", "x floor", "x cupymoe", "error"], rows)


def invariant_table(report: Report) -> str:
    """Of ``decode.json``: medians in microseconds, and how much longer calls with ``numerics="invariant"`` take."""
    rows = []
    for row in report["rows"]:
        fast, invariant = (row["ms"][name]["p50"] for name in ("cupymoe", "cupymoe:invariant"))
        rows.append([str(row["tokens"]), microseconds(fast), f"{microseconds(invariant)} ({invariant / fast:.2f}x)"])
    return markdown(["tokens", "fast us", "invariant us"], rows)


def skewed_table(report: Report) -> str:
    """The ``"skewed"`` rows of ``decode.json``, each beside its own floor."""
    return markdown(
        ["tokens", "routing", "hit experts", "floor us", "cupymoe us", "x floor"],
        [
            [
                str(row["tokens"]),
                row["routing"],
                f"{row['hit_experts']:.0f}",
                microseconds(row["floor_ms"]),
                microseconds(row["ms"]["cupymoe"]["p50"]),
                f"{row['ms']['cupymoe']['p50'] / row['floor_ms']:.2f}",
            ]
            for row in report["skewed"]
        ],
    )


def ways_table(report: Report) -> str:
    """``sweep.json``: what ``auto`` takes beside every way of ours, in microseconds, and over the fastest of them."""
    names = list(dict.fromkeys(name for row in report["rows"] for name in row["ms"] if name.startswith("cupymoe:")))
    rows = []
    for row in report["rows"]:
        ours, ms = row["ms"]["cupymoe"]["p50"], {name: row["ms"][name]["p50"] for name in names if name in row["ms"]}
        rows.append(
            [
                str(row["tokens"]),
                microseconds(ours),
                f"{ours / row['floor_ms']:.3f}",
                f"{ours / min(ms.values()):.3f}",
                *(microseconds(ms[name]) if name in ms else "" for name in names),
            ]
        )
    return markdown(["tokens", "cupymoe us", "x floor", "x fastest way", *(f"{name} us" for name in names)], rows)


def memory_table(report: Report) -> str:
    """The ``"memory"`` rows of ``prefill.json``."""
    return markdown(
        ["tokens", "peak MB over inputs and output", "x rows of both projections"],
        [
            [
                str(row["tokens"]),
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['peak_bytes'] / row['slots_bytes']:.3f}",
            ]
            for row in report["memory"]
        ],
    )


def first_call_table(report: Report) -> str:
    """Seconds of a fresh process: CuPy's import, then the kernels of one token, then those of every other regime."""
    names = {"import_cupy": "import cupy", "one_token": "one token", "every_regime": "other regimes"}
    return markdown(
        ["kernels", *(f"{name} s" for name in names.values())],
        [
            [kernels.replace("_", " "), *(f"{seconds[name]:.2f}" for name in names)]
            for kernels, seconds in report["first_call_s"].items()
        ],
    )
