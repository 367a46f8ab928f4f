"""readme_table.py renders the committed reports, and the regimes that no report was committed of yet."""

import json
import re

import pytest
from click.testing import CliRunner

from cupymoe.tools.reports import kernel_hashes
from scripts import readme_table
from scripts.benchmarks.tables import rows_table
from scripts.benchmarks.tables.experts import (
    experts_table,
    first_call_table,
    invariant_table,
    memory_table,
    percentiles_table,
    skewed_table,
    summary,
    together,
    ways_table,
)
from scripts.benchmarks.tables.markdown import heading
from scripts.benchmarks.tables.other_calls import lora_table, models_table, portable_table, quantised_table
from scripts.benchmarks.tables.stages import host_table, stages_table
from scripts.benchmarks.tables.training import training_table
from scripts.benchmarks.tables.whole_models import finetune_table, greedy_table, model_table
from tests.helpers import ROOT


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def lines_of(part):
    """How many lines a part of a report has in its table: a model has one, with all its numbers of tokens, and a number
    of tokens one with all formats."""
    for first, one_line in (("model", ("model", "ep")), ("format", ("build", "tokens"))):
        if isinstance(part, list) and first in part[0]:
            return len({tuple(row[key] for key in one_line) for row in part})
    return 1 if "peak_gb" in part else len(part)  # the memory of a whole model


def test_committed_reports():
    parts = ("rows", "skewed", "memory", "stages", "calls", "first_call_s", "cells", "greedy", "recipes")
    reports = [read(path) for path in sorted((ROOT / "benchmarks").glob("*/*.json"))]
    shown = [(heading(report), report[part]) for report in reports for part in parts if part in report]
    result = CliRunner().invoke(readme_table.main, [])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line]
    assert [line for line in lines if not line.startswith("| ")] == [heading for heading, _ in shown]
    assert len(lines) == sum(3 + lines_of(part) for _, part in shown)


def test_the_documents_tables_are_of_the_committed_reports():
    for document in readme_table.DOCUMENTS:
        assert readme_table.written(document, ROOT / "benchmarks") == document.read_text(encoding="utf-8"), document


def test_what_the_documents_show():
    """No table is lost: its lines are in the document, whatever asks for them."""
    h100, h200 = (ROOT / "benchmarks" / name for name in ("nvidia-h100-80gb-hbm3", "nvidia-h200"))
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for folder in (h100, h200):
        decode, prefill = (read(folder / f"{name}.json") for name in ("decode", "prefill"))
        assert experts_table(together([decode, prefill])) in text
        assert skewed_table(decode) in text
        assert skewed_table(prefill) in text
    assert model_table(read(h100 / "model.json")) in text
    assert greedy_table(read(h100 / "model.json")) in text
    assert models_table(read(h100 / "models.json")) in text
    assert host_table(read(h100 / "host.json")) in text
    assert training_table(read(h200 / "training.json")) in text
    assert finetune_table(read(h200 / "finetune.json")) in text
    assert lora_table(read(h200 / "lora.json")) in text
    assert portable_table(read(h200 / "portable.json")) in text
    assert quantised_table(read(h200 / "quantised.json")) in text
    assert invariant_table(read(h200 / "decode.json")) in text


def test_the_readme_s_sentence_is_of_the_reports_that_its_plot_shows():
    folder = ROOT / "benchmarks" / "nvidia-h200"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(benchmarks/nvidia-h200/ratio.svg)" in readme
    assert summary(together([read(folder / "decode.json"), read(folder / "prefill.json")])) in readme


def test_every_report_has_a_command_beside_it():
    """In the table of docs/benchmarks.md."""
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if "`python scripts/" in line and line.startswith("| ")]
    linked = [target for row in rows for target in re.findall(r"\(\.\./(benchmarks/[^)]+)\)", row[3])]
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "benchmarks").glob("*/*.json")} == set(linked)
    scripts = {script for row in rows for script in re.findall(r"`python (scripts/\w+\.py)", row[2])}
    assert "scripts/bench.py" in scripts
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_a_document_s_tables_are_made_anew(tmp_path):
    row = {"tokens": 4, "floor_ms": 0.2, "ms": times(cupymoe=0.25, grouped_mm=1.0), "error": {"cupymoe": 0.001}}
    origin = {"device": "x", "cuda_src_sha256": "0123456789abcdef", "versions": {"torch": "2.11"}}
    for name, date, tokens in (("a", "2026-01-01", 4), ("b", "2026-01-02", 8)):
        report = {**origin, "date": date, "rows": [{**row, "tokens": tokens}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- rows of a.json b.json -->\nold\n<!-- end -->\n<!-- summary of a.json -->\n<!-- end -->\n"
    )
    lines = readme_table.written(document, tmp_path).splitlines()
    assert lines[:3] == [
        "before",
        "<!-- rows of a.json b.json -->",
        "x, torch 2.11: [a.json](a.json) of 2026-01-01 (cuda_src 0123456789ab), "
        "[b.json](b.json) of 2026-01-02 (cuda_src 0123456789ab)",
    ]
    assert [line.split()[1] for line in lines[6:8]] == ["4", "8"]
    assert lines[8:] == [
        "<!-- end -->",
        "<!-- summary of a.json -->",
        "x, 2026-01-01: from 4 to 4 tokens a call takes 1.25 to 1.25 times",
        "the floor, and transformers' `grouped_mm` takes 4.00 to 4.00 times as long as cupymoe.",
        "<!-- end -->",
    ]


def times(**medians):
    return {name: {"p20": 0.9 * ms, "p50": ms, "p80": 1.1 * ms} for name, ms in medians.items()}


FOUR_TOKENS = {
    "tokens": 4,
    "floor_ms": 0.2,
    "ms": times(**{"cupymoe": 0.25, "cupymoe:fused": 0.3, "peer": 1.0}),
    "error": {"cupymoe": 0.001, "cupymoe:fused": 0.004, "peer": 0.002},
}
NO_PEER = {"tokens": 8, "floor_ms": 0.05, "ms": times(cupymoe=0.075), "error": {"cupymoe": 0.003}}


@pytest.mark.parametrize(
    ("table", "report", "header", "row"),
    [
        (
            experts_table,
            {"rows": [NO_PEER, FOUR_TOKENS]},
            "| tokens | floor us | cupymoe us | x floor | peer us | error cupymoe | error peer |",
            "| 4 | 200 | 250 | 1.25 | 1000 (4.00x) | 0.00100 | 0.00200 |",
        ),
        (
            experts_table,
            {"rows": [FOUR_TOKENS, NO_PEER]},
            "| tokens | floor us | cupymoe us | x floor | peer us | error cupymoe | error peer |",
            "| 8 | 50.0 | 75.0 | 1.50 | | 0.00300 | |",
        ),
        (
            rows_table,
            {
                "rows": [
                    {"model": "a", "ep": 1, "tokens": 48, "floor_ms": 0.2, "ms": times(cupymoe=0.25, grouped_mm=0.5)},
                    {"model": "a", "ep": 1, "tokens": 4, "floor_ms": 0.1, "ms": times(cupymoe=0.1, grouped_mm=0.09)},
                    {"model": "a", "ep": 8, "tokens": 48, "floor_ms": 0.1, "ms": times(cupymoe=0.3, grouped_mm=0.6)},
                ]
            },
            "| experts of | 4 | 48 |",
            "| a, one of 8 ranks | | 3.00 (2.00x) |",
        ),
        (
            percentiles_table,
            {"rows": [FOUR_TOKENS]},
            "| tokens | name | us p20 | p50 | p80 | x floor | x cupymoe | error |",
            "| 4 | peer | 900 | 1000 | 1100 | 5.00 | 4.00 | 0.00200 |",
        ),
        (
            first_call_table,
            {"first_call_s": {"from_disk": {"import_cupy": 0.1, "one_token": 0.2, "every_regime": 0.3}}},
            "| kernels | import cupy s | one token s | other regimes s |",
            "| from disk | 0.10 | 0.20 | 0.30 |",
        ),
        (
            invariant_table,
            {"rows": [{"tokens": 4, "ms": times(**{"cupymoe": 0.25, "cupymoe:invariant": 0.275})}]},
            "| tokens | fast us | invariant us |",
            "| 4 | 250 | 275 (1.10x) |",
        ),
        (
            skewed_table,
            {"skewed": [{**NO_PEER, "routing": "four experts", "hit_experts": 4.0}]},
            "| tokens | routing | hit experts | floor us | cupymoe us | x floor |",
            "| 8 | four experts | 4 | 50.0 | 75.0 | 1.50 |",
        ),
        (
            ways_table,
            {
                "rows": [
                    {
                        "tokens": 4,
                        "floor_ms": 0.1,
                        "ms": times(**{"cupymoe": 0.25, "cupymoe:stream": 0.2, "cupymoe:tiles": 0.4}),
                    }
                ]
            },
            "| tokens | cupymoe us | x floor | x fastest way | cupymoe:stream us | cupymoe:tiles us |",
            "| 4 | 250 | 2.500 | 1.250 | 200 | 400 |",
        ),
        (
            memory_table,
            {"memory": [{"tokens": 8, "peak_bytes": 3_000_000, "slots_bytes": 2_000_000}]},
            "| tokens | peak MB over inputs and output | x rows of both projections |",
            "| 8 | 3.0 | 1.500 |",
        ),
        (
            stages_table,
            {
                "stages": [
                    {
                        "name": "gather",
                        "counted": "reads N",
                        "bytes": 2_000_000,
                        "ms": times(gather=0.01)["gather"],
                        "gb_per_s": 1234.0,
                        "of_copy": 0.805,
                    }
                ]
            },
            "| stage | bytes moved | MB | us p20 | p50 | p80 | GB/s | % of copy |",
            "| gather | reads N | 2.0 | 9.0 | 10.0 | 11.0 | 1234 | 80.5 |",
        ),
        (
            host_table,
            {"tokens": 1, "calls": [{"name": "cupymoe", **times(wall_us=40.0, host_us=70.0, gpu_us=30.0)}]},
            "| call | tokens | wall us | first to return us | GPU us |",
            "| cupymoe | 1 | 40.0 | 70.0 | 30.0 |",
        ),
        (
            rows_table,
            {
                "rank": 16,
                "rows": [
                    {
                        "tokens": 1,
                        "adapters": "fp32",
                        "ms": times(plain=0.05, cupymoe=0.06),
                        "error": 0.0031,
                    }
                ],
            },
            "| tokens | adapters | rank | plain us | cupymoe us | error |",
            "| 1 | fp32 | 16 | 50.0 | 60.0 (1.20x) | 0.00310 |",
        ),
        (
            rows_table,
            {
                "rows": [
                    {
                        "tokens": 4096,
                        "mode": "lora",
                        "floor_ms": 1.5,
                        "ms": {
                            "cupymoe": times(forward=1.0, backward=2.0, step=3.0),
                            "grouped_mm": times(forward=4.0, backward=5.0, step=9.0),
                        },
                        "kept_mb": {"cupymoe": 115.6, "grouped_mm": 2075.9},
                        "peak_mb": {"cupymoe": 600.1, "grouped_mm": 5000.0},
                        "error": {"cupymoe": {"a": 0.001, "b": 0.002}, "grouped_mm": {"a": 0.004, "b": 0.003}},
                    }
                ]
            },
            "| tokens | mode | floor ms | cupymoe ms (x floor) | forward | backward | grouped_mm ms | "
            "cupymoe kept MB | grouped_mm kept MB | cupymoe peak MB | grouped_mm peak MB | "
            "cupymoe error | grouped_mm error |",
            "| 4096 | lora | 1.50 | 3.00 (2.00) | 1.00 | 2.00 | 9.00 (3.00x) | "
            "116 | 2076 | 600 | 5000 | 0.00200 | 0.00400 |",
        ),
        (
            rows_table,
            {
                "rows": [
                    {
                        "tokens": 64,
                        "ms": times(cupymoe=0.5, vllm_triton=0.75),
                        "error": {"cupymoe": 0.0024, "vllm_triton": 0.0042},
                    }
                ]
            },
            "| tokens | cupymoe us | vLLM's Triton us | error cupymoe | error vLLM's |",
            "| 64 | 500 | 750 (1.50x) | 0.00240 | 0.00420 |",
        ),
        (
            model_table,
            {"layers": 30, "cells": [{"what": "prefill", "ms": times(grouped_mm=10.0, cupymoe=8.0, routed=5.0)}]},
            "| 30 layers | grouped_mm ms | cupymoe ms | routed ms |",
            "| prefill | 10.00 | 8.00 (1.25x) | 5.00 (2.00x) |",
        ),
        (
            greedy_table,
            {
                "cells": [{"ms": times(grouped_mm=10.0, cupymoe=8.0)}],
                "greedy": [
                    {
                        "name": "cupymoe",
                        "steps": 64,
                        "same": 54,
                        "beyond": 47,
                        "beyond_same": 46,
                        "decided": 35,
                        "wrong": 1,
                        "largest_difference": 0.0859,
                        "std_of_logits": 1.06,
                    }
                ],
            },
            "| beside grouped_mm | steps | same token | margin beyond difference | of these the same | "
            "margin beyond twice that | of these wrong | largest difference |",
            "| cupymoe | 64 | 54 | 47 | 46 | 35 | 1 | 0.086 (std of logits 1.06) |",
        ),
    ],
)
def test_a_row_of_each_table(table, report, header, row):
    lines = [" ".join(line.split()) for line in table(report).splitlines()]
    assert (lines[0], lines[-1]) == (header, row)


def test_models_of_one_rank_and_of_many_have_lines_of_their_own():
    """The ratio to the floor of each number of tokens, and in brackets how many times as fast as the peer."""
    both = times(cupymoe=0.1, grouped_mm=0.09)
    rows = [{"model": "a", "ep": ep, "tokens": 4, "floor_ms": 0.08, "ms": both} for ep in (1, 8)]
    lines = models_table({"rows": rows}).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["a", "a, one of 8 ranks"]
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["1.25 (0.90x)"] * 2


def test_reports_together_have_the_last_one_s_heading_and_rows_and_rise():
    first = {"device": "first", "date": "1", "rows": [{"tokens": 8, "of": "first"}, {"tokens": 1, "of": "first"}]}
    last = {"device": "last", "date": "2", "rows": [{"tokens": 8, "of": "last"}, {"tokens": 4, "of": "last"}]}
    assert together([first, last]) == {
        "device": "last",
        "date": "1 and 2",
        "rows": [{"tokens": 1, "of": "first"}, {"tokens": 4, "of": "last"}, {"tokens": 8, "of": "last"}],
    }


@pytest.fixture
def report(tmp_path):
    path = tmp_path / "gpu" / "decode.json"
    path.parent.mkdir()
    return path


def check_report(benchmarks):
    result = CliRunner().invoke(readme_table.main, ["--check-report", "--benchmarks", str(benchmarks)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_report_of_the_present_kernels_is_not_stale(tmp_path, report):
    report.write_text(json.dumps({"kernels": kernel_hashes(["route"])}))
    assert check_report(tmp_path) == ""


def test_a_stale_report_is_named_with_the_reason(tmp_path, report):
    report.write_text(json.dumps({"kernels": {"route": "0123"}}))
    assert check_report(tmp_path) == f"stale report: {report}: route is changed since\n"


def test_no_report(tmp_path):
    result = CliRunner().invoke(readme_table.main, ["--benchmarks", str(tmp_path)])
    assert (result.exit_code, result.output) == (0, "")


def test_lora(tmp_path):
    row = {"tokens": 1, "adapters": "bf16", "ms": {"plain": {"p50": 0.05}, "cupymoe": {"p50": 0.15}}, "error": 0.003}
    path = tmp_path / "lora.json"
    path.write_text(json.dumps({"device": "x", "date": "y", "versions": {}, "rank": 16, "rows": [row]}))
    result = CliRunner().invoke(readme_table.main, [str(path)])
    assert result.exit_code == 0, result.output
    assert "150 (3.00x)" in result.output
