"""docs/quantised.md: the formats that there are, and the figures that it gives."""

import ast
import re

import pytest
import torch

from cupymoe import MoEActivation, quantize, reference
from cupymoe.weights import FORMATS
from tests.helpers import ROOT, oracle, random_experts, relative_error

TEXT = (ROOT / "docs" / "quantised.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\"[^`]+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", TEXT, re.MULTILINE)


def test_every_format_is_described():
    table = TEXT.partition("| format | codes |")[2].partition("\n\n")[0]
    first_cells = " ".join(line.split("|")[1] for line in table.splitlines()[2:])
    assert re.findall(r"`(\w+)`", first_cells) == [*FORMATS]


@pytest.fixture(scope="module")
def case():
    """Two of Gemma 4's experts."""
    torch.manual_seed(0)
    case = random_experts(64, 2, 2816, 704, 2)
    return case, oracle(case)


@pytest.mark.parametrize(("call", "bits", "of_weights", "of_output"), ROWS, ids=[row[0] for row in ROWS])
def test_the_figures(case, call, bits, of_weights, of_output):
    given, truth = case
    arguments = ast.parse(f"f({call})", mode="eval").body
    settings = {keyword.arg: keyword.value.value for keyword in arguments.keywords}
    quantised = [*quantize(*given[1:3], arguments.args[0].value, **settings)]
    weights = sum(weight.shape[0] * weight.shape[1] * weight.shape[2] for weight in quantised)
    assert f"{8 * sum(weight.nbytes for weight in quantised) / weights:.2f}" == bits
    dequantised = [weight.dequantize() for weight in quantised]
    errors = [relative_error(ours, weight.double()) for ours, weight in zip(dequantised, given[1:3], strict=True)]
    assert max(errors) == pytest.approx(float(of_weights), rel=0.02)
    output = reference.experts(given[0].double(), *dequantised, given[3], given[4].double(), MoEActivation.GELU_TANH)
    assert relative_error(output, truth) == pytest.approx(float(of_output), rel=0.02)


def test_every_way_to_quantise_has_figures():
    assert {row[0].split('"')[1] for row in ROWS} == {"int4", "int8", "fp8", "nvfp4"}
