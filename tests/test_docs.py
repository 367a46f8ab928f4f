"""The docs name what there is: every source, activation and spelling; and their links lead somewhere."""

import math
import re

import pytest

from cupymoe import Gemma4MoEConfig, MoEActivation
from cupymoe.activation import _ALIASES
from cupymoe.kernels import cuda_sources
from tests.helpers import ROOT

DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert all((path.parent / target).exists() for target in targets), targets


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_named_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`((?:benchmarks|cuda_src|cupymoe|docs|scripts|tests)/[\w./]+)`", text)
    assert len(named) > 3
    assert [each for each in named if not (ROOT / each).exists()] == []


def test_what_is_kept_is_what_the_formulas_say():
    """KB a token and layer, and GB over 30 layers of Gemma 4 26B-A4B."""
    config = Gemma4MoEConfig.gemma4_26b_a4b()
    sizes = {"H": config.hidden_size, "I": config.moe_intermediate_size, "K": config.top_k_experts}
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| .* \| `([0-9HIK+ ]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE
    )
    assert len(rows) == 6
    for formula, *cells in rows:
        terms = [re.fullmatch(r"(\d+)(\w+)", term).groups() for term in formula.split(" + ")]
        size = sum(int(factor) * math.prod(sizes[name] for name in names) for factor, names in terms)
        gigabytes = [f"{30 * size * tokens / 1e9:.2f}" for tokens in (4096, 8192, 16384)]
        assert cells == [f"{size / 1e3:.1f}", *gigabytes], formula


def test_every_promise_names_a_test():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| .* \| `(tests|scripts)/", line)]
    assert len(rows) > 40
    for row in rows:
        file, _, name = row.split("|")[2].strip().strip("`").partition("::")
        assert re.search(rf"^def {name or 'main'}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), row


def test_no_test_of_these_is_left_out():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for file in ("tests/test_concurrency.py", "tests/test_experts_limits.py"):
        for name in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE):
            assert f"`{file}::{name}`" in text
    properties = re.findall(r"@holds_for\(\w+\)\ndef (\w+)", (ROOT / "tests/test_properties.py").read_text())
    assert properties
    assert all(f"`tests/test_properties.py::{name}`" in text for name in properties)


def test_ci_runs_the_tests_as_the_readme_says_and_then_the_slow_ones(pytestconfig):
    """Else what is marked slow would be run by nobody."""
    options = pytestconfig.getini("addopts")
    assert options[options.index("-m") + 1] == "not slow"
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if line.startswith("pytest")]
    assert steps == ["pytest", "pytest -m slow"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -e '.[test]' && pytest\n" in readme
    assert "`pytest -m slow`" in readme
