"""The docs name what there is: every source, activation and spelling; and their links lead somewhere."""

import re

import pytest

from cupymoe import MoEActivation
from cupymoe.activation import _ALIASES
from cupymoe.kernels import cuda_sources
from tests.helpers import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))


def table_rows(name):
    """First cells of a document's table rows."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]


def test_every_cuda_source_is_described():
    described = {row.strip("`") for row in table_rows("kernels.md")}
    assert {f"{name}.cu" for name in cuda_sources.names()} == described


def test_every_activation_is_described():
    text = (ROOT / "docs" / "activations.md").read_text(encoding="utf-8")
    for member in MoEActivation:
        assert f"`{member.name}`" in text, member
        assert f"`{member.custom_op_name}`" in text, member


def test_every_spelling_is_described():
    cells = " ".join(table_rows("activations.md"))
    for name in _ALIASES:
        assert f"`{name}`" in cells, name


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert all((path.parent / target).exists() for target in targets), targets
