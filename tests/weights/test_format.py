import math

import pytest
import torch

from cupymoe.weights import FORMATS
from cupymoe.weights.format import format_of
from tests.weights.helpers import value


@pytest.mark.parametrize("name", FORMATS)
def test_the_value_of_every_code(name):
    format = FORMATS[name]
    expected = [float(code) if format.has_zeros else value(format.codes, code) for code in range(2**format.bits)]
    assert len(format.values) == len(expected)
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(format.values, expected, strict=True))
    finite = torch.tensor([number for number in format.values if not math.isnan(number)], dtype=torch.float64)
    assert torch.equal(finite, finite.float().double())
    assert format.values[format.padding_code] == 0


def test_only_e4m3_has_nan():
    assert {format.codes: format.nan_codes for format in FORMATS.values() if format.nan_codes} == {"e4m3": (127, 255)}


@pytest.mark.parametrize(
    ("name", "k", "groups", "row_bytes"),
    [
        ("int4_g32", 704, 22, 352),
        ("int4_g64", 2816, 44, 1408),
        ("int4_g128_zero", 2816, 22, 1408),
        ("int8", 704, 0, 704),
        ("int8", 33, 0, 64),
        ("fp8", 705, 0, 736),
        ("fp8_g128", 704, 6, 704),
        ("nvfp4", 48, 3, 32),
        ("mxfp4", 704, 22, 352),
        ("nf4", 704, 11, 352),
    ],
)
def test_sizes(name, k, groups, row_bytes):
    assert FORMATS[name].groups(k) == groups
    assert FORMATS[name].row_bytes(k) == row_bytes


def test_a_group_that_does_not_divide_the_depth():
    with pytest.raises(ValueError, match="k must be a multiple of int4_g128's groups of 128, got 704"):
        FORMATS["int4_g128"].groups(704)


def test_formats_by_name():
    assert format_of("nvfp4") is FORMATS["nvfp4"] is format_of(FORMATS["nvfp4"])
    for name in ("int4", "plain", None, []):
        with pytest.raises(ValueError, match=r"format must be one of \['int4_g32', .*'nf4'\], got"):
            format_of(name)
    assert all(name == format.name for name, format in FORMATS.items())
