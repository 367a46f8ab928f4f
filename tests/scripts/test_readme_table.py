"""readme_table.py renders the committed reports, and the regimes that no report was committed of yet."""

import json

import pytest
from click.testing import CliRunner

from tests.helpers import ROOT


@pytest.fixture(scope="module")
def readme_table():
    import readme_table

    return readme_table


def test_committed_reports(readme_table):
    result = CliRunner().invoke(readme_table.main, [])
    assert result.exit_code == 0, result.output
    assert result.output.count("| ") > 20 * len([*(ROOT / "benchmarks").glob("*/*.json")])


def test_no_report(readme_table, tmp_path):
    result = CliRunner().invoke(readme_table.main, ["--benchmarks", str(tmp_path)])
    assert (result.exit_code, result.output) == (0, "")


def test_lora(readme_table, tmp_path):
    ms = {"merged": {"p50": 0.05}, "unmerged": {"p50": 0.15}, "merging": {"p50": 1.0}}
    error = {"merged": 0.004, "unmerged": 0.005, "merging": 0.004}
    report = {
        "device": "x",
        "date": "y",
        "versions": {},
        "rank": 16,
        "adapted": [{"tokens": 1, "ms": ms, "error": error}],
    }
    path = tmp_path / "lora.json"
    path.write_text(json.dumps(report))
    result = CliRunner().invoke(readme_table.main, [str(path)])
    assert result.exit_code == 0, result.output
    assert "150 (3.00x)" in result.output
    assert "0.00500" in result.output
