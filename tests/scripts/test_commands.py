"""Every command runs from a checkout, wherever it is called and whether cupymoe is installed or not."""

import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT

NEEDS = {"bench_finetune": "peft", "bench_model": "transformers", "readme_plot": "matplotlib"}
COMMANDS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs_from_elsewhere(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"Usage: {name}.py")
