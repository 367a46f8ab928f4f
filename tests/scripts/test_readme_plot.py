"""readme_plot.py: what it draws of a report."""

import json

import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from readme_plot import figure, main

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


@pytest.mark.parametrize("name", ["sweep", "experts"])
def test_the_same_report_gives_the_same_file(tmp_path, name):
    report = tmp_path / f"{name}.json"
    report.write_text(json.dumps(REPORT))
    files = []
    for _ in range(2):
        result = CliRunner().invoke(main, [str(report)])
        assert result.exit_code == 0, result.output
        files.append((tmp_path / f"{name}.svg").read_bytes())
    assert files[0] == files[1]
    assert b"<svg" in files[0]
