"""The layer works without its tools."""

import ast
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "cupymoe"
LAYER = [path for path in PACKAGE.rglob("*.py") if PACKAGE / "tools" not in path.parents and path.name != "__main__.py"]


def imported(path):
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that does not say where from"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", LAYER, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_layer_imports_no_tool(path):
    assert [name for name in imported(path) if f"{name}.".startswith("cupymoe.tools.")] == []


def test_a_tool_is_no_part_of_import_cupymoe():
    program = "import sys, cupymoe; print(*(name for name in sys.modules if name.startswith('cupymoe.tools')))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == []
