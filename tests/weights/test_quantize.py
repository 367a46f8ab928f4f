"""quantize(): every code is the nearest one, scales are as the rules say, and what is on a grid stays there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cupymoe import weights
from cupymoe.weights import FORMATS
from cupymoe.weights.quantize import quantize

SETTINGS = {
    "int4_g32": {"format": "int4"},
    "int4_g64": {"format": "int4", "group_size": 64},
    "int4_g128": {"format": "int4", "group_size": 128},
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8"},
    "nvfp4": {"format": "nvfp4"},
}


def pair(num_experts=3, hidden=256, intermediate=128, dtype=torch.float32):
    return (
        torch.randn(num_experts, 2 * intermediate, hidden).to(dtype),
        torch.randn(num_experts, hidden, intermediate).to(dtype) * 0.1,
    )


def error(quantized, weight):
    difference = quantized.dequantize() - weight.double()
    return float(difference.norm() / weight.double().norm())


def steps_of(quantized):
    """The scale of each weight, in float64."""
    format = quantized.format
    steps = torch.ones(quantized.shape, dtype=torch.float64)
    if quantized.scales is not None:
        steps = quantized.group_scales.double().repeat_interleave(format.group, -1)
    return steps if quantized.row_scales is None else steps * quantized.row_scales.double().unsqueeze(-1)


def assert_nearest(quantized, weight):
    """No code of the format lies nearer to a weight, for the scale that it has; ties and rounding in float32 apart."""
    values = torch.tensor([value for value in quantized.format.values if value == value], dtype=torch.float64)
    steps = steps_of(quantized)
    distances = (values - (weight.double() / steps).unsqueeze(-1)).abs().amin(-1) * steps.abs()
    found = (quantized.dequantize() - weight.double()).abs()
    assert torch.all(found <= distances + 1e-6 * weight.double().abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_code_is_the_nearest(name, dtype):
    given_weights = pair(dtype=dtype)
    for quantized, weight in zip(quantize(*given_weights, **SETTINGS[name]), given_weights, strict=True):
        assert quantized.format.name == name
        assert quantized.shape == tuple(weight.shape)
        assert_nearest(quantized, weight)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int4_g32", 0.0948),
        ("int4_g64", 0.1028),
        ("int4_g128", 0.1107),
        ("int8", 0.0074),
        ("fp8", 0.0264),
        ("nvfp4", 0.0953),
    ],
)
def test_the_error_of_normal_weights(name, expected):
    up = torch.randn(2, 1024, 512, dtype=torch.bfloat16)
    quantized = quantize(up, torch.ones(2, 512, 128), **SETTINGS[name])
    assert error(quantized.gate_up_proj, up) == pytest.approx(expected, rel=0.02)


def test_the_projections_may_have_groups_of_different_sizes():
    up, down = torch.randn(2, 64, 128), torch.randn(2, 128, 32)
    quantized = quantize(up, down, "int4", group_size=(128, 32))
    assert [weight.format.name for weight in quantized] == ["int4_g128", "int4_g32"]
    alone = quantize(up, torch.ones(2, 128, 128), "int4", group_size=128)
    assert torch.equal(quantized.gate_up_proj.codes, alone.gate_up_proj.codes)


@pytest.mark.parametrize(("group_size", "expected"), [(32, 0.0860), (64, 0.0949), (128, 0.1031)])
def test_q4_0_has_the_lower_error_on_normal_weights(group_size, expected):
    up = torch.randn(2, 1024, 512)
    quantized = quantize(up, torch.ones(2, 512, 128), "int4", group_size=group_size, scale_rule="q4_0")
    assert error(quantized.gate_up_proj, up) == pytest.approx(expected, rel=0.02)


def q4_0_of_one_group(group):
    """GGUF's rounding of 32 weights, one after the other: d, and codes."""
    largest = 0.0
    for x in group.tolist():
        if abs(x) > abs(largest):
            largest = x
    d = torch.tensor(largest) / -8
    inverse = 1 / d if d else d
    return d.half(), [min(15, int(float(x * inverse + 8.5))) for x in group]


def test_q4_0_is_ggufs():
    given_weights = pair(1, 64, 32)
    for quantized, weight in zip(quantize(*given_weights, "int4", scale_rule="q4_0"), given_weights, strict=True):
        codes, scales = quantized.natural_codes().view(-1, 32), quantized.group_scales.flatten()
        for group, code, scale in zip(weight.view(-1, 32), codes, scales, strict=True):
            d, expected = q4_0_of_one_group(group)
            assert scale == d
            # GGUF multiplies with a reciprocal where we divide: halves may differ.
            is_half = ((group / d.float()) % 1 - 0.5).abs() < 2e-3
            assert torch.all((code == torch.tensor(expected)) | is_half)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-30, 5), group_size=st.sampled_from([32, 64, 128]))
def test_what_is_on_q4_0s_grid_stays_there(seed, exponent, group_size):
    torch.manual_seed(seed)
    first = quantize(
        *(weight * 2.0**exponent for weight in pair(1, 128, 128)), "int4", group_size=group_size, scale_rule="q4_0"
    )
    again = quantize(
        *(weight.dequantize(torch.float32) for weight in first), "int4", group_size=group_size, scale_rule="q4_0"
    )
    for once, twice in zip(first, again, strict=True):
        assert torch.equal(once.codes, twice.codes)
        assert torch.equal(once.scales, twice.scales)


def test_scales():
    up, down = pair(1, 64, 32)
    up[0, 0, :32] = torch.linspace(-1, 1, 32)
    up[0, 1] = 0
    by_group = quantize(up, down, "int4").gate_up_proj
    assert by_group.group_scales[0, 0, 0] == torch.tensor(1 / 7.5).bfloat16()
    assert by_group.natural_codes()[0, 0, 31] == 15  # clamped: 7.5 is no code
    for format in ("int4", "int8", "fp8", "nvfp4"):
        assert not quantize(up, down, format).gate_up_proj.dequantize()[0, 1].any()
    of_rows = quantize(up, down, "int8").gate_up_proj
    assert torch.equal(of_rows.row_scales, up.abs().amax(-1) / 127)
    nvfp4 = quantize(up, down, "nvfp4").gate_up_proj
    assert torch.equal(nvfp4.row_scales, (up.abs().amax() / 2688).expand(1, 64))
    assert nvfp4.group_scales.float().max() == 448


def test_ties_go_to_the_even_code_in_nvfp4():
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    row = torch.cat((halves, -halves)).expand(1, 32, 16).contiguous() * 448
    up = quantize(torch.cat((row, row), 1)[:, :32], torch.randn(1, 16, 16), "nvfp4").gate_up_proj
    expected = [0, 1, 1, 2, 2, 4, 4, 6]
    assert (up.dequantize()[0, 0] / 448).tolist() == [*expected, *(-value for value in expected)]


def test_a_few_experts_at_a_time_is_all_at_once(monkeypatch):
    given_weights = pair(5)
    at_once = quantize(*given_weights, "nvfp4").state_dict()
    monkeypatch.setattr(weights.quantize, "_ELEMENTS_AT_ONCE", 2 * 256 * 256)
    for name, buffer in quantize(*given_weights, "nvfp4").state_dict().items():
        assert torch.equal(buffer.view(torch.uint8), at_once[name].view(torch.uint8))


def test_strides_and_gradients_do_not_matter():
    up, down = pair()
    turned = [torch.nn.Parameter(weight.mT.contiguous()).mT for weight in (up, down)]
    for ours, theirs in zip(quantize(*turned, "int4"), quantize(up, down, "int4"), strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert not ours.scales.requires_grad


UP, DOWN = torch.ones(2, 64, 64), torch.ones(2, 64, 32)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "settings"),
    [
        (ValueError, r"format must be one of \['int4', .*'nvfp4'\], got 'nf4'", (UP, DOWN, "nf4"), {}),
        (ValueError, r"group_size must be one of \[32, .* got 16", (UP, DOWN, "int4"), {"group_size": 16}),
        (ValueError, r"group_size must be one of \[32, .* got 0", (UP, DOWN, "int4"), {"group_size": 0}),
        (ValueError, r"a pair of them or None, got \(32, 16\)", (UP, DOWN, "int4"), {"group_size": (32, 16)}),
        (ValueError, r"a pair of them or None, got \(32,\)", (UP, DOWN, "int4"), {"group_size": (32,)}),
        (ValueError, "group_size must be None for 'fp8', .* got 32", (UP, DOWN, "fp8"), {"group_size": 32}),
        (ValueError, "scale_rule must be one of .* got 'mse'", (UP, DOWN, "int4"), {"scale_rule": "mse"}),
        (ValueError, "scale_rule must be 'absmax' for 'int8'", (UP, DOWN, "int8"), {"scale_rule": "q4_0"}),
        (ValueError, "down_proj: k must be a multiple of .* got 32", (UP, DOWN, "int4"), {"group_size": 64}),
        (ValueError, r"gate_up_proj must have shape \[E, out, in\], .* got \[64, 64\]", (UP[0], DOWN, "int4"), {}),
        (ValueError, r"down_proj must have shape \[E, H, I\] where gate_up_proj has", (UP, DOWN[:1], "int4"), {}),
        (TypeError, r"gate_up_proj must be a torch\.Tensor, got None", (None, DOWN, "int4"), {}),
        (TypeError, r"down_proj must have a dtype of .* got torch\.int8", (UP, DOWN.to(torch.int8), "int4"), {}),
        (ValueError, "down_proj must be finite, got 4096 NaN or infinite", (UP, DOWN * float("nan"), "int4"), {}),
    ],
)
def test_what_is_refused(error, message, arguments, settings):
    with pytest.raises(error, match=message):
        quantize(*arguments, **settings)


def test_every_format_of_quantize_is_one():
    assert {*SETTINGS} <= {*FORMATS}
