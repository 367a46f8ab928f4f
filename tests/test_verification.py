"""cupymoe verify: what it runs, and what it says."""

import pytest
from click.testing import CliRunner

from cupymoe.cli import main


@pytest.mark.parametrize("seed", [str(10**22), "-1"])
def test_seeds_out_of_range(seed):
    for command in (["verify"], ["audit", "cupymoe"]):
        result = CliRunner().invoke(main, [*command, "--seed", seed])
        assert result.exit_code == 2
        assert f"Invalid value for '--seed': {seed} is not in the range" in result.output
