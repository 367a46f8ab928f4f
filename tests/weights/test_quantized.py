"""QuantizedWeight: what it is made of, what it stands for, and that neither torch's casts nor files change it."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from cupymoe.weights import FORMATS, QuantizedExperts, QuantizedWeight
from tests.weights.helpers import codes_of, dequantized, factors_of, random_weight


def assert_same(weight, other):
    assert (weight.format, weight.shape) == (other.format, other.shape)
    assert weight.state_dict().keys() == other.state_dict().keys()
    for name, buffer in weight.named_buffers():
        assert buffer.dtype == other.get_buffer(name).dtype
        assert torch.equal(buffer.view(torch.uint8), other.get_buffer(name).view(torch.uint8)), name


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from([*FORMATS]),
    groups=st.integers(1, 3),
    cut=st.integers(0, 20),
    dtype=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_the_weight_is_what_the_definition_says(name, groups, cut, dtype, seed):
    torch.manual_seed(seed)
    format = FORMATS[name]
    k = groups * (format.group or 32)
    k -= cut if format.cuts_groups or format.group is None else 0
    codes = codes_of(name, 2, 3, k)
    scale_dtype = format.scale_dtypes[dtype % len(format.scale_dtypes)] if format.scale_dtypes else None
    factors = factors_of(name, 2, 3, k, scale_dtype)
    weight = QuantizedWeight.of(name, codes, **factors)
    expected = dequantized(name, codes, **factors)
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.dequantize(experts=slice(1, 2)), expected[1:])
    assert torch.equal(weight.natural_codes(), codes)
    torch.testing.assert_close(weight.dequantize(torch.float32), expected.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(weight.dequantize(torch.bfloat16), expected.bfloat16(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_of_every_code(name):
    format = FORMATS[name]
    usable = [code for code in range(2**format.bits) if code not in format.nan_codes]
    k = -(-len(usable) // (format.group or 32)) * (format.group or 32)
    codes = torch.tensor((usable * k)[:k], dtype=torch.uint8).expand(1, 3, -1).contiguous()
    factors = factors_of(name, 1, 3, k)
    assert torch.equal(QuantizedWeight.of(name, codes, **factors).dequantize(), dequantized(name, codes, **factors))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_every_scale_of_8_bits(name):
    """Subnormals and zero too; none that is NaN, and none of nvfp4 that is negative."""
    last = 127 if name == "nvfp4" else 255
    dtype = FORMATS[name].scale_dtypes[0]
    scales = torch.arange(last, dtype=torch.uint8).view(dtype).view(1, 1, last)
    codes = codes_of(name, 1, 1, last * FORMATS[name].group)
    row_scales = torch.full((1, 1), 0.37) if name == "nvfp4" else None
    weight = QuantizedWeight.of(name, codes, scales, row_scales=row_scales)
    assert torch.equal(weight.dequantize(), dequantized(name, codes, scales, None, row_scales))


@pytest.mark.parametrize("name", FORMATS)
def test_buffers(name):
    format = FORMATS[name]
    k = 5 * (format.group or 32)
    factors = factors_of(name, 2, 3, k)
    weight = QuantizedWeight.of(name, codes_of(name, 2, 3, k), **factors)
    assert not [*weight.parameters()]
    assert weight.codes.shape == (2, 3, format.row_bytes(k))
    assert weight.nbytes == sum(buffer.nbytes for buffer in weight.state_dict().values()) - len(
        weight.get_extra_state()
    )
    for padded, natural in ((weight.scales, factors.get("scales")), (weight.zeros, factors.get("zeros"))):
        assert (padded is None) == (natural is None)
        if padded is not None:
            as_bytes, width = padded.view(torch.uint8), 5 * natural.dtype.itemsize
            assert as_bytes.shape[-1] % 16 == 0
            assert as_bytes.shape[-1] - width < 16
            assert torch.equal(as_bytes[..., :width], natural.view(torch.uint8))
            assert not as_bytes[..., width:].any()
    if "scales" in factors:
        assert torch.equal(weight.group_scales.view(torch.uint8), factors["scales"].view(torch.uint8))
    assert {*weight.state_dict()} == {"codes", *factors, "_extra_state"}
    empty = QuantizedWeight(name, weight.shape, device="meta")
    assert {key: (b.shape, b.dtype) for key, b in empty.named_buffers()} == {
        key: (b.shape, b.dtype) for key, b in weight.named_buffers()
    }
    assert repr(weight) == f"QuantizedWeight({name}, 2 x 3 x {k})"


@pytest.mark.parametrize("name", FORMATS)
def test_casts_change_nothing(name):
    weight = random_weight(name)
    before = copy.deepcopy(weight)
    holder = nn.ModuleDict({"weight": weight, "linear": nn.Linear(2, 2)})
    for cast in (
        lambda: holder.to(torch.float16),
        holder.half,
        holder.bfloat16,
        holder.double,
        holder.float,
        lambda: holder.type(torch.float64),
        lambda: holder.to("cpu", torch.bfloat16),
        holder.cpu,
        holder.share_memory,
    ):
        cast()
        assert_same(weight, before)
    assert holder["linear"].weight.dtype == torch.bfloat16  # what is beside it is cast


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_to_another_device(name):
    weight = random_weight(name)
    before = copy.deepcopy(weight)
    weight.to("cuda", torch.float16)
    assert all(buffer.is_cuda for buffer in weight.buffers())
    assert torch.equal(weight.dequantize().cpu(), before.dequantize())
    assert_same(weight.cpu(), before)


@pytest.mark.parametrize("name", FORMATS)
def test_copies(name, tmp_path):
    weight = random_weight(name)
    assert_same(copy.deepcopy(weight), weight)
    assert_same(pickle.loads(pickle.dumps(weight)), weight)
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    save_file(weight.state_dict(), tmp_path / "weight.safetensors")
    for state in (torch.load(file), load_file(tmp_path / "weight.safetensors")):
        for assign in (False, True):
            empty = QuantizedWeight(name, weight.shape, device="meta" if assign else "cpu")
            empty.load_state_dict(state, assign=assign)
            assert_same(empty, weight)
            assert torch.equal(empty.dequantize(), weight.dequantize())


def test_a_state_of_another_format_is_refused_before_anything_is_loaded():
    weight, other = random_weight("int4_g64", k=128), random_weight("int4_g32", k=128)
    assert weight.scales.shape == other.scales.shape  # padded, nothing tells them apart
    before = copy.deepcopy(other)
    with pytest.raises(RuntimeError, match="must be int4_g32 2 6 128, got int4_g64 2 6 128"):
        other.load_state_dict(weight.state_dict())
    assert_same(other, before)


def test_a_state_of_other_dtypes_is_refused():
    weight = random_weight("int4_g32", scale_dtype=torch.float32)
    other = QuantizedWeight("int4_g32", weight.shape)
    holder = nn.ModuleDict({"w": other})
    with pytest.raises(RuntimeError, match=r"w\.scales must be torch\.bfloat16, got torch\.float32"):
        holder.load_state_dict(nn.ModuleDict({"w": weight}).state_dict())


def test_meta():
    with torch.device("meta"):
        weight = QuantizedWeight("nvfp4", (2, 3, 32))
        codes = torch.zeros(2, 3, 32, dtype=torch.uint8)
        of = QuantizedWeight.of("fp8", codes, row_scales=torch.ones(2, 3))
    for each in (weight, of):
        assert each.device.type == "meta"
        assert each.dequantize(torch.bfloat16).shape == (2, 3, 32)
    assert weight.to_empty(device="cpu").scales.dtype == torch.float8_e4m3fn


CODES = torch.zeros(2, 3, 64, dtype=torch.uint8)
SCALES = torch.ones(2, 3, 2, dtype=torch.bfloat16)
ZEROS = torch.zeros(2, 3, 2, dtype=torch.uint8)
ROW_SCALES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "name", "arguments"),
    [
        (TypeError, "codes must be a torch.Tensor, got NoneType", "int8", (None,)),
        (TypeError, "codes must have dtype torch.uint8, got torch.int8", "int8", (CODES.to(torch.int8),)),
        (ValueError, r"codes must have shape \[E, n, k\], none of them 0, got \[3, 64\]", "int8", (CODES[0],)),
        (ValueError, r"none of them 0, got \[0, 3, 64\]", "int8", (CODES[:0],)),
        (ValueError, "k must be a multiple of int4_g128's groups of 128, got 64", "int4_g128", (CODES, SCALES)),
        (ValueError, "codes must be below 16 in int4_g32, got 16", "int4_g32", (CODES + 16, SCALES)),
        (ValueError, "codes must not be NaN in fp8, got 384 of 0x7f", "fp8", (CODES + 127, None, None, ROW_SCALES)),
        (ValueError, "codes must not be NaN in fp8, got 384 of 0xff", "fp8", (CODES + 255, None, None, ROW_SCALES)),
        (ValueError, "scales must be given, as int4_g32 has scales, got none", "int4_g32", (CODES,)),
        (ValueError, "scales must be None, as int8 has no scales, got some", "int8", (CODES, SCALES, None, ROW_SCALES)),
        (ValueError, "zeros must be given, as int4_g32_zero has zeros", "int4_g32_zero", (CODES, SCALES)),
        (ValueError, "zeros must be None, as int4_g32 has no zeros", "int4_g32", (CODES, SCALES, ZEROS)),
        (ValueError, "row_scales must be given, as fp8 has row_scales", "fp8", (CODES,)),
        (ValueError, "row_scales must be None", "int4_g32", (CODES, SCALES, None, ROW_SCALES)),
        (TypeError, "scales must have dtype torch.bfloat16 or torch.float16 or", "int4_g32", (CODES, SCALES.double())),
        (ValueError, r"scales must have shape \[2, 3, 2\], got \[2, 2, 3\]", "int4_g32", (CODES, SCALES.mT)),
        (ValueError, "scales must be on codes's device cpu, got meta", "int4_g32", (CODES, SCALES.to("meta"))),
        (ValueError, "scales must be finite, got 12 NaN or infinite", "int4_g32", (CODES, SCALES * float("inf"))),
        (ValueError, "scales must be finite, got 12 NaN", "mxfp4", (CODES, (ZEROS + 255).view(torch.float8_e8m0fnu))),
        (ValueError, "row_scales must be finite, got 6", "fp8", (CODES, None, None, ROW_SCALES * float("nan"))),
        (TypeError, "row_scales must have dtype torch.float32, got", "fp8", (CODES, None, None, ROW_SCALES.half())),
        (ValueError, "zeros must be at most 15, got 16", "int4_g32_zero", (CODES, SCALES, ZEROS + 16)),
        (
            ValueError,
            "scales must not be negative in nvfp4",
            "nvfp4",
            (CODES, torch.full((2, 3, 4), -1.0).to(torch.float8_e4m3fn), None, ROW_SCALES),
        ),
    ],
)
def test_what_is_no_weight(error, message, name, arguments):
    with pytest.raises(error, match=message):
        QuantizedWeight.of(name, *arguments)


def test_what_is_no_empty_weight():
    for shape in ((2, 3), (2, 0, 32), (2, 3, 32.0), (True, 3, 32)):
        with pytest.raises(ValueError, match=r"shape must be three positive integers \(E, n, k\), got"):
            QuantizedWeight("int8", shape)
    with pytest.raises(TypeError, match=r"scale_dtype must be one of .* for nf4, got torch\.float16"):
        QuantizedWeight("nf4", (1, 1, 64), scale_dtype=torch.float16)


def test_what_is_given_may_be_strided():
    codes = codes_of("int4_g32", 2, 64, 3).mT
    weight = QuantizedWeight.of("int4_g32", codes, SCALES.mT.contiguous().mT)
    assert torch.equal(weight.natural_codes(), codes)
    assert all(buffer.is_contiguous() for buffer in weight.buffers())


def test_experts_are_their_two_weights():
    up, down = random_weight("int4_g32"), random_weight("int8")
    assert [*QuantizedExperts(up, down)] == [up, down]
    left = QuantizedExperts(up, torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert isinstance(left.down_proj, nn.Parameter)
    assert not left.down_proj.requires_grad
    assert {*left.state_dict()} == {
        "gate_up_proj.codes",
        "gate_up_proj.scales",
        "gate_up_proj._extra_state",
        "down_proj",
    }
    with pytest.raises(TypeError, match=r"down_proj must be a cupymoe\.QuantizedWeight or a torch\.Tensor, got str"):
        QuantizedExperts(up, "int4")


@pytest.mark.parametrize(("name", "largest"), [("int4_g32", 42.5), ("int4_g32_zero", 22.6), ("fp8_g128", 2.28)])
def test_weights_that_are_too_large_are_refused(name, largest):
    """By the tiles' kernels they would be infinite."""
    k = FORMATS[name].group
    factors = {"zeros": torch.zeros(1, 2, 1, dtype=torch.uint8)} if FORMATS[name].has_zeros else {}
    codes = torch.ones(1, 2, k, dtype=torch.uint8)
    QuantizedWeight.of(name, codes, torch.full((1, 2, 1), -largest, dtype=torch.float32), **factors)
    with pytest.raises(ValueError, match=f"scales must be at most {str(largest)[:-1]}.* in magnitude in {name}"):
        QuantizedWeight.of(name, codes, torch.full((1, 2, 1), largest + 1, dtype=torch.float32), **factors)


def test_a_state_with_weights_that_are_too_large_is_refused():
    weight = random_weight("int4_g32", 1, 2, 32, torch.float32)
    state = weight.state_dict()
    state["scales"] = state["scales"] * 1e6
    with pytest.raises(RuntimeError, match=r"scales must be at most 42\.5 in magnitude"):
        weight.load_state_dict(state)


def test_codes_of_an_older_layout_are_refused():
    """Files of version 0.2.0 have nvfp4 and mxfp4 in nibbles; their state says no layout."""
    weight = random_weight("nvfp4", 1, 2, 32)
    state = weight.state_dict()
    state["_extra_state"] = torch.tensor([*b"nvfp4 1 2 32"], dtype=torch.uint8)
    empty = QuantizedWeight.like_state(state, "")
    with pytest.raises(RuntimeError, match="codes that lie as another version of cupymoe had them"):
        empty.load_state_dict(state)
    pickled = weight.__getstate__()
    del pickled["layout"]
    with pytest.raises(ValueError, match="this nvfp4 weight has codes that lie as another version"):
        empty.__setstate__(pickled)


def test_a_first_layout_is_not_said():
    assert bytes(random_weight("int4_g32", 1, 2, 32).get_extra_state()) == b"int4_g32 1 2 32"
    assert bytes(random_weight("nvfp4", 1, 2, 32).get_extra_state()) == b"nvfp4 1 2 32 2"
