"""The tables of the reports, in markdown: what the benchmarks print, and what README.md and docs/benchmarks.md show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

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


def invariant_table(report: Report) -> str:
    """Of ``decode.json``: medians in microseconds, and how much longer calls with ``numerics="invariant"`` take."""
    rows = []
    for row in report["rows"]:
        fast, invariant = (row["ms"][name]["p50"] for name in ("cupymoe", "cupymoe:invariant"))
        rows.append([str(row["tokens"]), microseconds(fast), f"{microseconds(invariant)} ({invariant / fast:.2f}x)"])
    return markdown(["tokens", "fast us", "invariant us"], rows)


def models_table(report: Report) -> str:
    """The table of ``models.json``: our median over the floor, in brackets the peer's median over ours."""
    tokens = sorted({row["tokens"] for row in report["rows"]})
    cells: dict[str, dict[int, str]] = {}
    for row in report["rows"]:
        ours, peer = (row["ms"][name]["p50"] for name in ("cupymoe", "grouped_mm"))
        name = row["model"] if row["ep"] == 1 else f"{row['model']}, one of {row['ep']} ranks"
        cells.setdefault(name, {})[row["tokens"]] = f"{ours / row['floor_ms']:.2f} ({peer / ours:.2f}x)"
    rows = [[name, *(found.get(count, "") for count in tokens)] for name, found in cells.items()]
    return markdown(["experts of", *map(str, tokens)], rows)


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


def lora_table(report: Report) -> str:
    """The table of ``lora.json``: medians in microseconds, their ratio to a call without adapters, and the error."""
    rows = []
    for row in report["rows"]:
        plain, ours = (row["ms"][name]["p50"] for name in ("plain", "cupymoe"))
        times = microseconds(plain), f"{microseconds(ours)} ({ours / plain:.2f}x)"
        rows.append([str(row["tokens"]), row["adapters"], str(report["rank"]), *times, f"{row['error']:.5f}"])
    return markdown(["tokens", "adapters", "rank", "plain us", "cupymoe us", "error"], rows)


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


def portable_table(report: Report) -> str:
    """The table of ``portable.json``: medians in microseconds, a build's over the floor and over Hopper's own kernels,
    the others' over the build's, and its error.
    """
    rows = []
    for row in report["rows"]:
        medians = {name: ms["p50"] for name, ms in row["ms"].items()}
        ours, peers = medians["cupymoe"], [name for name in medians if name not in ("cupymoe", "hopper")]
        cells = [row["build"], str(row["tokens"]), microseconds(row["floor_ms"])]
        cells += [f"{microseconds(ours)} ({ours / row['floor_ms']:.2f})", f"{ours / medians['hopper']:.3f}"]
        cells += [f"{microseconds(medians[name])} ({medians[name] / ours:.2f}x)" for name in peers]
        rows.append([*cells, f"{row['error']:.5f}"])
    names = [f"{name} us" for name in report["rows"][0]["ms"] if name not in ("cupymoe", "hopper")]
    return markdown(["build", "tokens", "floor us", "us (x floor)", "x hopper", *names, "error"], rows)


def quantised_table(report: Report) -> str:
    """The table of ``quantised.json``: medians in microseconds, over the floor, a column for each format; and of bf16
    weights, which are timed beside each format, the median of these."""
    formats = [*dict.fromkeys(row["format"] for row in report["rows"])]
    calls: dict[tuple[str, int], dict[str, Any]] = {}
    for row in report["rows"]:
        calls.setdefault((row["build"], row["tokens"]), {})[row["format"]] = row
    rows = []
    for (build, tokens), of_formats in sorted(calls.items(), key=lambda call: (call[0][0] != "sm_90a", call[0])):
        bf16 = median(row["ms"]["cupymoe:bf16"]["p50"] for row in of_formats.values())
        cells = []
        for name in formats:
            if (timed := of_formats.get(name)) is None:
                cells.append("")
                continue
            ours = timed["ms"]["cupymoe"]["p50"]
            cells.append(f"{microseconds(ours)} ({ours / timed['floor_ms']:.2f})")
        error = max(row["error"]["cupymoe"] for row in of_formats.values())
        rows.append([build, str(tokens), microseconds(bf16), *cells, f"{error:.5f}"])
    return markdown(["build", "tokens", "bf16 us", *(f"{name} (x floor)" for name in formats), "largest error"], rows)


def batched_table(report: Report) -> str:
    """The table of ``batched.json``: medians in microseconds, and those of both projections alone and of ``torch.bmm``
    over them."""
    rows = []
    for row in report["rows"]:
        ours, gemms, bmm = (row["ms"][name]["p50"] for name in ("cupymoe", "gemms", "bmm"))
        rows.append(
            [
                str(row["tokens_per_expert"]),
                str(row["max_tokens"]),
                f"{microseconds(ours)} ({ours / gemms:.3f} x gemms)",
                microseconds(gemms),
                f"{microseconds(bmm)} ({bmm / ours:.2f}x)",
                f"{row['error']['cupymoe']:.5f}",
            ]
        )
    return markdown(["tokens an expert", "room for", "us", "gemms us", "bmm us", "error"], rows)


def model_table(report: Report) -> str:
    """The table of ``model.json``: medians in milliseconds, a token where decoding, and the peer's over each."""
    names = list(report["cells"][0]["ms"])
    peer = names[0]
    rows = []
    for cell in report["cells"]:
        medians = {name: cell["ms"][name]["p50"] for name in names}
        times = [f"{medians[name]:.2f} ({medians[peer] / medians[name]:.2f}x)" for name in names[1:]]
        rows.append([cell["what"], f"{medians[peer]:.2f}", *times])
    return markdown([f"{report['layers']} layers", *(f"{name} ms" for name in names)], rows)


def greedy_table(report: Report) -> str:
    """The other table of ``model.json``: greedy choices and logits, compared with the peer's at the same tokens."""
    peer = next(iter(report["cells"][0]["ms"]))
    columns = {
        "steps": "steps",
        "same": "same token",
        "beyond": "margin beyond difference",
        "beyond_same": "of these the same",
        "decided": "margin beyond twice that",
        "wrong": "of these wrong",
    }
    return markdown(
        [f"beside {peer}", *columns.values(), "largest difference"],
        [
            [
                row["name"],
                *(str(row[key]) for key in columns),
                f"{row['largest_difference']:.3f} (std of logits {row['std_of_logits']:.2f})",
            ]
            for row in report["greedy"]
        ],
    )


def finetune_table(report: Report) -> str:
    """The table of ``finetune.json``: tokens a second and ours over the peer's, gigabytes, losses of the first seed."""
    peer, ours = report["recipes"][0]["tokens_per_s"]
    rows = []
    for row in report["recipes"]:
        speeds, losses = row["tokens_per_s"], row["loss"]
        rows.append(
            [
                row["recipe"],
                str(speeds[peer]),
                f"{speeds[ours]} ({speeds[ours] / speeds[peer]:.2f}x)",
                *(f"{row['peak_gb'][name]:.1f}" for name in (peer, ours)),
                *(f"{losses[name][0][0]:.3f} to {losses[name][0][-1]:.3f}" for name in (peer, ours)),
                f"{row['difference']:.4f} of {row['noise']:.4f}",
            ]
        )
    columns = [f"{name} {what}" for what in ("tokens/s", "peak GB", "loss") for name in (peer, ours)]
    return markdown([f"LoRA, {report['layers']} layers", *columns, "difference of noise"], rows)


def vllm_table(report: Report) -> str:
    """The table of ``vllm.json``: medians in microseconds, theirs over ours, and the errors of both."""
    rows = []
    for row in report["rows"]:
        ours, theirs = (row["ms"][name]["p50"] for name in ("cupymoe", "vllm_triton"))
        errors = [f"{row['error'][name]:.5f}" for name in ("cupymoe", "vllm_triton")]
        rows.append([str(row["tokens"]), microseconds(ours), f"{microseconds(theirs)} ({theirs / ours:.2f}x)", *errors])
    return markdown(["tokens", "cupymoe us", "vLLM's Triton us", "error cupymoe", "error vLLM's"], rows)


def rows_table(report: Report) -> str:
    """The table of a report's ``"rows"``: of many models, training, adapters, builds, batches, or one model's calls."""
    tables = {
        "model": models_table,
        "mode": training_table,
        "adapters": lora_table,
        "build": portable_table,
        "format": quantised_table,
        "tokens_per_expert": batched_table,
    }
    if "vllm_triton" in report["rows"][0].get("ms", {}):
        return vllm_table(report)
    return next((tables[key] for key in report["rows"][0] if key in tables), experts_table)(report)


TABLES: dict[str, Callable[[Report], str]] = {
    "rows": rows_table,
    "skewed": skewed_table,
    "memory": memory_table,
    "stages": stages_table,
    "calls": host_table,
    "first_call_s": first_call_table,
    "cells": model_table,
    "greedy": greedy_table,
    "recipes": finetune_table,
}
"""By the part of a report that they show."""

RENDERED = {**TABLES, "summary": summary, "invariant": invariant_table}
"""What a document may ask for, by name."""
