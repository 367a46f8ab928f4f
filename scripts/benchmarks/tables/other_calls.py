"""Tables of other calls of experts: those of other models, of adapters, quantised weights and batches, as other cards
run them, and beside vLLM's."""

from __future__ import annotations

from statistics import median
from typing import Any

from scripts.benchmarks.report import Report
from scripts.benchmarks.tables.markdown import markdown, microseconds


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


def lora_table(report: Report) -> str:
    """The table of ``lora.json``: medians in microseconds, their ratio to a call without adapters, and the error."""
    rows = []
    for row in report["rows"]:
        plain, ours = (row["ms"][name]["p50"] for name in ("plain", "cupymoe"))
        times = microseconds(plain), f"{microseconds(ours)} ({ours / plain:.2f}x)"
        rows.append([str(row["tokens"]), row["adapters"], str(report["rank"]), *times, f"{row['error']:.5f}"])
    return markdown(["tokens", "adapters", "rank", "plain us", "cupymoe us", "error"], rows)


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


def vllm_table(report: Report) -> str:
    """The table of ``vllm.json``: medians in microseconds, theirs over ours, and the errors of both."""
    rows = []
    for row in report["rows"]:
        ours, theirs = (row["ms"][name]["p50"] for name in ("cupymoe", "vllm_triton"))
        errors = [f"{row['error'][name]:.5f}" for name in ("cupymoe", "vllm_triton")]
        rows.append([str(row["tokens"]), microseconds(ours), f"{microseconds(theirs)} ({theirs / ours:.2f}x)", *errors])
    return markdown(["tokens", "cupymoe us", "vLLM's Triton us", "error cupymoe", "error vLLM's"], rows)
