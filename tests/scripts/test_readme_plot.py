"""readme_plot.py: what it draws of a report."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from scripts.readme_plot import figure, main

REPORT = {
    "device": "a GPU",
    "date": "2026-01-01",
    "rows": [
        {"tokens": 1, "floor_ms": 1.0, "ms": {"cupymoe": {"p50": 1.5}, "peer": {"p50": 3.0}, "other": {"p50": 9.0}}},
        {"tokens": 3, "floor_ms": 2.0, "ms": {"cupymoe": {"p50": 2.5}, "cupymoe:fused": {"p50": 2.5}}},
        {"tokens": 4, "floor_ms": 2.0, "ms": {"cupymoe": {"p50": 2.5}, "peer": {"p50": 4.0}}},
    ],
}


def test_a_line_for_each_of_whom_a_report_tells():
    (axes,) = figure(REPORT).axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()[:-1]}
    assert lines == {
        "cupymoe": [(1, 1.5), (3, 1.25), (4, 1.25)],
        "peer": [(1, 3.0), (4, 2.0)],
        "other": [(1, 9.0)],
    }


def test_the_same_reports_give_the_same_file(tmp_path):
    first, second = tmp_path / "decode.json", tmp_path / "prefill.json"
    first.write_text(json.dumps(REPORT))
    second.write_text(json.dumps({**REPORT, "rows": [{"tokens": 9, "floor_ms": 1.0, "ms": {"cupymoe": {"p50": 2.0}}}]}))
    files = []
    for reports in ([first, second], [first, second], [first]):
        result = CliRunner().invoke(main, list(map(str, reports)))
        assert result.exit_code == 0, result.output
        files.append((tmp_path / "ratio.svg").read_bytes())
    assert b"<svg" in files[0]
    assert files[0] == files[1] != files[2]
