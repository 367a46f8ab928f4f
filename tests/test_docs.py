"""The docs name what there is: every source, activation and spelling; and their links lead somewhere."""

import itertools
import math
import re
import warnings

import pytest
import torch

from cupymoe import Gemma4MoEConfig, MoEActivation, reference
from cupymoe.activation import _ALIASES
from cupymoe.backends import DIRECTIONS, serving
from cupymoe.kernels import cuda_sources
from cupymoe.weights import FORMATS
from tests.helpers import ROOT, transformers_config, transformers_gemma4
from tests.test_backends import CALL

DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def table_rows(name):
    """First cells of a document's table rows."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| `")]


def test_every_cuda_source_is_described():
    described = {row.strip("`") for row in table_rows("kernels.md")}
    assert {f"{name}.cu" for name in cuda_sources.names()} == described


def test_every_stage_has_its_place_in_a_call():
    """In the picture of docs/architecture.md; raw_read.cu is what benchmarks take the floor from."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    picture = text.partition("## The stages of a call")[2].split("```")[1]
    assert {*cuda_sources.names()} - {*re.findall(r"\w+", picture)} == {"raw_read"}


def test_every_activation_is_described():
    text = (ROOT / "docs" / "activations.md").read_text(encoding="utf-8")
    for member in MoEActivation:
        assert f"`{member.name}`" in text, member
        assert f"`{member.custom_op_name}`" in text, member


def test_every_spelling_is_described():
    cells = " ".join(table_rows("activations.md"))
    for name in _ALIASES:
        assert f"`{name}`" in cells, name


def anchors(path):
    """What a link may name of a document, as GitHub spells it."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


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


def test_ci_runs_both_tiers_of_tests_as_contributing_says(pytestconfig):
    """Else what is marked slow would be run by nobody; that runs beside the others, and is waited for."""
    options = pytestconfig.getini("addopts")
    assert options[options.index("-m") + 1] == "not slow"
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    steps = [line.partition(" > ")[0] for line in lines if line.startswith("pytest")]
    assert steps == ["pytest -m slow", "pytest"]
    assert lines[-4:] == ["status=0", 'wait "$slow" || status=$?', 'cat "$environment/slow.log"', 'exit "$status"']
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "pip install -e '.[test]'\n" in text
    assert all(f"| `{step}` |" in text for step in steps)


README = (ROOT / "README.md").read_text(encoding="utf-8")

QUANTISED = [{"weight_format": f"{name},{name}"} for name in FORMATS if name != "nf4"]

WHAT_RUNS = {
    ("bfloat16", "forward"): [{}],
    ("bfloat16", "gradients"): [{}],
    ("float16", "forward"): [{"dtype": torch.float16}],
    ("float16", "gradients"): [{"dtype": torch.float16}],
    ("bfloat16 and LoRA", "forward"): [{"adapter_rank": rank} for rank in (16, 128)],
    ("bfloat16 and LoRA", "gradients"): [{"adapter_rank": rank} for rank in (16, 128)],
    ("int4, int8, FP8, NVFP4, MXFP4", "forward"): QUANTISED,
    ("int4, int8, FP8, NVFP4, MXFP4", "gradients"): QUANTISED,
    ("float32", "both"): [{"dtype": torch.float32}],
}
"""Rows of the README's table: what they change of a call in bfloat16."""

CARDS = {"H100, H200": ["9.0"], "other cards from A100 on": ["8.0", "8.6", "8.9", "10.0", "12.0"], "CPU": [""]}


@pytest.mark.parametrize("card", CARDS)
def test_what_runs_where_is_what_the_backends_say(monkeypatch, card):
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| ")
    ]
    assert header[2:5] == [*CARDS]
    assert [(weights, direction) for weights, direction, *_ in rows] == [*WHAT_RUNS]
    for weights, direction, *cells in rows:
        directions = DIRECTIONS if direction == "both" else ["forward" if direction == "forward" else "backward"]
        served = set()
        for capability in CARDS[card]:
            major_minor = tuple(map(int, capability.split("."))) if capability else (0, 0)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, its=major_minor: its)
            for changes, tokens, way in itertools.product(
                WHAT_RUNS[weights, direction], (1, 16, 1024, 4096, 16384), directions
            ):
                device = torch.device("cuda" if capability else "cpu", 0)
                call = CALL._replace(device=device, num_tokens=tokens, **changes)
                served.add(serving(call, way).name)
        assert set(re.findall("`(.+?)`", cells[[*CARDS].index(card)])) == served, (weights, direction)


def test_the_readme_s_lines_of_use_run(device, tmp_path):
    """As they stand, with a small model of random weights as the path, and small tensors."""
    transformers_gemma4().Gemma4ForCausalLM(transformers_config()).save_pretrained(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {
        **{"path": tmp_path, "rows": torch.randn(5, 16, device=device)},
        **{"gate_up": torch.randn(4, 16, 16, device=device), "down": torch.randn(4, 16, 8, device=device)},
        **{"top_k_index": torch.randint(4, (5, 2), device=device), "top_k_weights": torch.rand(5, 2, device=device)},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers; and on CUDA float32 is slow, and said to be
        exec(block.replace('"cuda"', repr(device.type)), names)
    assert type(names["model"]).__name__ == "Gemma4ForCausalLM"
    assert names["model"].dtype == torch.bfloat16
    assert names["output"].shape == (5, 16)
    given = [names[name].cpu().double() for name in ("rows", "gate_up", "down")]
    routing = names["top_k_index"].cpu(), names["top_k_weights"].cpu().double()
    expected = reference.experts(*given, *routing, MoEActivation.GELU_TANH)
    torch.testing.assert_close(names["output"].cpu().double(), expected, rtol=1e-4, atol=1e-4)
