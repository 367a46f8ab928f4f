"""experts_up_codes_wgmma.cu and experts_down_codes_wgmma.cu slot by slot, against float64."""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.kernels.coded_tiles import Scales
from cupymoe.kernels.combine import combine
from cupymoe.kernels.expert_tiles import CUTS, tile_shape_of
from cupymoe.kernels.experts_down_codes_wgmma import experts_down_codes_wgmma
from cupymoe.kernels.experts_up_codes_wgmma import experts_up_codes_wgmma
from cupymoe.kernels.sort_by_expert import sort_by_expert
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT, stored_weight
from cupymoe.weights import FORMATS, QuantizedWeight
from tests.helpers import poison_free_memory, random_routing, relative_error
from tests.kernels.quantised import turned

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GELU_TANH = MoEActivation.GELU_TANH
ULP = {BF16: 2**-8, FP16: 2**-11}
FEW = torch.finfo(FP32).eps * 64
# Of one projection's outputs, whose rounding is 0.0017 and 0.0002 of them; that of int4 weights is 0.0015 and 0.0002.
LARGEST_ERROR = {BF16: 0.0024, FP16: 0.0005}
LARGEST_ERROR_OF_A_CALL = 0.0034
FEWER_SLOTS = (32, 64, 96)
"""Of a tile, beside 160."""
INT4 = ("int4_g32", "int4_g64", "int4_g128")
OTHERS = ("int4_g32_zero", "int4_g64_zero", "int8", "fp8", "fp8_g128", "nvfp4", "mxfp4")


class Case(NamedTuple):
    """A call of both kernels."""

    hidden_states: torch.Tensor
    gate_up: QuantizedWeight
    down: QuantizedWeight
    top_k_index: torch.Tensor


def random_weight(name, num_experts, rows, depth, scale_dtype=None):
    """All codes, scales of either sign where the format has a sign for them, some of them zero; about unit variance of
    the products."""
    weight_format = FORMATS[name]
    shape, groups = (num_experts, rows), weight_format.groups(depth)
    codes = torch.randint(0, 2**weight_format.bits, (*shape, depth), dtype=torch.uint8, device="cuda")
    for code in weight_format.nan_codes:
        codes[codes == code] = 0
    values = torch.tensor(weight_format.values, dtype=torch.float64)
    spread = depth**-0.5 / values[values.isfinite()].std().item()
    scales = zeros = row_scales = None
    if groups:
        dtype = scale_dtype or weight_format.scale_dtypes[0]
        scales = torch.randn(*shape, groups, device="cuda") * spread
        if weight_format.has_row_scales:  # the small numbers are the rows'
            scales = scales.abs() / spread * 16
        if dtype == torch.float8_e8m0fnu:
            scales = scales.abs() + spread / 8
        else:
            scales[torch.rand_like(scales) < 0.05] = 0
        scales = scales.to(dtype)
    if weight_format.has_zeros:
        zeros = torch.randint(0, 16, (*shape, groups), dtype=torch.uint8, device="cuda")
    if weight_format.has_row_scales:
        row_scales = torch.randn(shape, device="cuda") * spread / (16 if groups else 1)
    return QuantizedWeight.of(weight_format, codes, scales, zeros, row_scales)


def random_case(sizes, names, dtype=BF16, activation=GELU_TANH, scale_dtype=None):
    """Of sizes (tokens, experts, hidden, intermediate, top_k) and the formats of gate_up and down."""
    num_tokens, num_experts, hidden, intermediate, top_k = sizes
    of_int4 = [scale_dtype if FORMATS[name].codes == "int4" else None for name in names]
    return Case(
        torch.randn(num_tokens, hidden, dtype=dtype, device="cuda"),
        random_weight(names[0], num_experts, activation.input_size(intermediate), hidden, of_int4[0]),
        random_weight(names[1], num_experts, hidden, intermediate, of_int4[1]),
        random_routing(num_tokens, num_experts, top_k, device="cuda")[1],
    )


def stored(weight):
    return stored_weight(weight.format.name, None if weight.scales is None else weight.scales.dtype)


def scales_of(weight):
    return Scales(weight.scales, weight.zeros, weight.row_scales)


def multiply(case, activation=GELU_TANH, gate_up_bias=None, down_bias=None, keeps_gate_up=False, slots=160):
    """Pairs in expert order; what experts_up gives, in the order of its columns, and, where it is kept, gate_up; what
    experts_down makes of it. By tiles of so many slots, on poisoned memory, without the rows past the last slot."""
    intermediate_size = case.down.shape[-1]
    shape = shape_of(case, activation, gate_up_bias, down_bias, keeps_gate_up, slots)
    poison_free_memory()
    pairs = sort_by_expert(case.top_k_index, len(case.down.codes))
    gate_up = None
    if keeps_gate_up:
        gate_up = case.hidden_states.new_full((case.top_k_index.numel(), shape.gate_up_rows), float("nan"))
    of_gate_up, of_down = scales_of(case.gate_up), scales_of(case.down)
    intermediate = experts_up_codes_wgmma(
        case.hidden_states, case.gate_up.codes, of_gate_up, pairs, shape, gate_up_bias, gate_up
    )
    output = experts_down_codes_wgmma(intermediate, case.down.codes, of_down, pairs, shape, down_bias)
    kept = int(pairs.expert_offsets[-1])
    in_order = turned(intermediate[:kept])
    assert (in_order[:, intermediate_size:] == 0).all()
    return pairs, in_order[:, :intermediate_size], gate_up if gate_up is None else gate_up[:kept], output[:kept]


def shape_of(case, activation=GELU_TANH, gate_up_bias=None, down_bias=None, keeps_gate_up=False, slots=160):
    num_experts, hidden, intermediate_size = case.down.shape
    return tile_shape_of(
        *CUTS[0],
        case.hidden_states.dtype,
        activation,
        num_experts,
        hidden,
        intermediate_size,
        has_gate_up_bias=gate_up_bias is not None,
        has_down_bias=down_bias is not None,
        keeps_gate_up=keeps_gate_up,
        gate_up_stored=stored(case.gate_up),
        down_stored=stored(case.down),
        coded_slots=slots,
    )


def rounded(weight, expert, dtype, factor=1):
    """An expert's weight as the tiles multiply it, in float64, and by how much an element of it may differ.

    A group's scale multiplies before the rounding, a row's scale after it. One that ``dtype`` can't hold is two factors
    of it, and what comes of them is within 0.504 units of the last place. It is ``factor`` times the weight that is
    rounded.
    """
    exact = weight.dequantize(experts=slice(expert, expert + 1))[0]
    of_rows = 1.0
    if weight.row_scales is not None:
        of_rows = weight.row_scales[expert].double().unsqueeze(-1)
        exact = torch.where(of_rows == 0, 0.0, exact / of_rows)
    # Through float32, in which a code times a scale of 16 bits is exact.
    nearest = (exact.float() * factor).to(dtype).double() / factor
    held = weight.scales is None or weight.scales.dtype not in (FP16, FP32) or weight.scales.dtype == dtype
    error = torch.zeros_like(exact) if held else 0.504 * ULP[dtype] * 2 * exact.abs() + 2**-24 / factor
    return nearest * of_rows if held else exact * of_rows, error * of_rows


def operand_of(weight, dtype):
    """What products multiply, and how many times the weight it is: fp16 with a group's small scale may be subnormal."""
    is_scaled = weight.format.group is not None and weight.format.group >= 32
    return dtype, 64 if dtype == FP16 and is_scaled else 1


def assert_close(output, truth, slack, scale=1.0):
    bound = ULP[output.dtype] * truth.abs() + FEW * 8 * scale + slack
    assert ((output.double() - truth).abs() <= bound).all()


def check(case, activation=GELU_TANH, gate_up_bias=None, down_bias=None):
    """gate_up and the output element by element, given the rounded weights; all in norm, given the exact ones."""
    pairs, intermediate, gate_up, output = multiply(case, activation, gate_up_bias, down_bias, keeps_gate_up=True)
    offsets = pairs.expert_offsets.tolist()
    # Of bf16 tokens the gate_up projection multiplies fp16 ones, so that its weights may have more bits.
    is_narrowed = output.dtype == BF16 and stored(case.gate_up).wants_fp16
    up_operand = operand_of(case.gate_up, FP16 if is_narrowed else output.dtype)
    down_operand = operand_of(case.down, output.dtype)
    exact_up = torch.empty_like(intermediate, dtype=torch.float64)
    exact_down = torch.empty_like(output, dtype=torch.float64)
    for expert, (first, last) in enumerate(pairwise(offsets)):
        tokens = case.hidden_states[pairs.token_of_slot[first:last].long()].double()
        for rows, weight, bias, got, exact, operand in (
            (tokens, case.gate_up, gate_up_bias, gate_up, None, up_operand),
            (intermediate[first:last].double(), case.down, down_bias, output, exact_down, down_operand),
        ):
            of_bias = 0.0 if bias is None else bias[expert].double()
            nearest, error = rounded(weight, expert, *operand)
            assert_close(got[first:last], rows @ nearest.T + of_bias, rows.abs() @ error.abs().T)
            truth = rows @ weight.dequantize(experts=slice(expert, expert + 1))[0].T + of_bias
            if exact is None:
                exact_up[first:last] = reference.activate(truth, activation)
            else:
                exact[first:last] = truth
    if offsets[-1]:
        assert relative_error(intermediate, exact_up) <= LARGEST_ERROR[intermediate.dtype]
        assert relative_error(output, exact_down) <= LARGEST_ERROR[output.dtype]
    # What is kept does not change what is given, and the activation is of the unrounded sums; nor do the tiles.
    for slots in (160, *FEWER_SLOTS):
        _, again, _, same = multiply(case, activation, gate_up_bias, down_bias, slots=slots)
        assert torch.equal(again, intermediate), slots
        assert torch.equal(same, output), slots


def random_biases(case):
    return {
        name: torch.randn(weight.shape[:2], dtype=case.hidden_states.dtype, device="cuda")
        for name, weight in (("gate_up_bias", case.gate_up), ("down_bias", case.down))
    }


# (tokens, experts, hidden, intermediate, top_k): one expert with every number of 32 slots, in one tile and in more;
# depths of half a stage and of a stage and a half; Gemma 4's sizes and slices; many experts, some empty.
CASES = [
    (1, 1, 128, 64, 1),
    (32, 1, 128, 64, 1),
    (33, 1, 128, 64, 1),
    (64, 1, 128, 64, 1),
    (65, 1, 128, 96, 1),
    (96, 1, 288, 704, 1),
    (97, 1, 544, 96, 1),
    (128, 1, 192, 96, 1),
    (129, 1, 192, 96, 1),
    (160, 1, 192, 96, 1),
    (161, 1, 192, 96, 1),
    (257, 1, 320, 352, 1),
    (385, 1, 96, 352, 1),
    (530, 1, 192, 192, 1),
    (5001, 2, 64, 32, 1),
    (1001, 5, 224, 96, 3),
    (1000, 16, 2816, 352, 4),
    (300, 128, 2816, 704, 8),
    (400, 700, 96, 64, 5),
]


@pytest.mark.parametrize("sizes", CASES)
def test_every_slot(sizes):
    check(random_case(sizes, ("int4_g32", "int4_g32")))


@pytest.mark.parametrize("num_tokens", [1024, 4096])
def test_gemma_4(num_tokens):
    check(random_case((num_tokens, 128, 2816, 704, 8), ("int4_g32", "int4_g64")))


@pytest.mark.parametrize("scale_dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", INT4)
def test_groups_and_dtypes_of_int4(name, dtype, scale_dtype):
    check(random_case((1001, 5, 384, 128, 3), (name, name), dtype, scale_dtype=scale_dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", OTHERS)
def test_other_formats(name, dtype):
    """Where groups may be cut, at depths that cut them; where a depth may end inside 32 k, at such depths."""
    sizes = {"nvfp4": (208, 144), "int8": (208, 72), "fp8": (232, 72), "fp8_g128": (232, 88)}.get(name, (320, 192))
    sizes = 1001, 5, *sizes, 3
    case = random_case(sizes, (name, name), dtype)
    check(case)
    check(case, **random_biases(case))


@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL], ids=str)
@pytest.mark.parametrize(
    ("names", "width"), [(("int4_g32", "nvfp4"), 368), (("fp8", "int4_g32"), 352), (("nvfp4", "fp8"), 344)], ids=str
)
def test_kinds_of_experts(names, width, activation):
    """With biases; each weight in a format of its own; widths that end inside a box, and inside 32 columns."""
    case = random_case((700, 8, 320, width, 4), names, activation=activation)
    check(case, activation, **random_biases(case))


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_zero", "nvfp4", "fp8"])
def test_masked_pairs_and_empty_experts(name):
    case = random_case((900, 40, 256, 96, 6), (name, name))
    index = case.top_k_index.clone()
    index[index % 3 == 0] = -1
    check(case._replace(top_k_index=index))
    multiply(case._replace(top_k_index=torch.full_like(index, 40)))
    torch.cuda.synchronize()


@pytest.mark.parametrize("activation", [GELU_TANH, MoEActivation.RELU2_NO_MUL], ids=str)
def test_beside_a_plain_weight_rows_are_in_order(activation):
    """What experts_up gives where down_proj is plain, and what experts_down makes of it where gate_up_proj is."""
    case = random_case((700, 8, 320, 344, 4), ("int8", "fp8"), activation=activation)
    _, intermediate, _, output = multiply(case, activation)
    kept, shape = len(output), shape_of(case, activation)
    poison_free_memory()
    pairs = sort_by_expert(case.top_k_index, len(case.down.codes))
    in_order = experts_up_codes_wgmma(
        case.hidden_states, case.gate_up.codes, scales_of(case.gate_up), pairs, replace(shape, down_stored=PLAIN_WEIGHT)
    )
    assert torch.equal(in_order[:kept], intermediate)
    same = experts_down_codes_wgmma(
        in_order, case.down.codes, scales_of(case.down), pairs, replace(shape, gate_up_stored=PLAIN_WEIGHT)
    )
    assert torch.equal(same[:kept], output)


@pytest.mark.parametrize("name", ["int4_g32", "fp8_g128"])
@pytest.mark.parametrize("num_tokens", [1000, 4999])
def test_same_bits_every_time(num_tokens, name):
    case = random_case((num_tokens, 128, 2816, 704, 8), (name, name))
    _, *first = multiply(case, keeps_gate_up=True)
    for _ in range(5):
        _, *again = multiply(case, keeps_gate_up=True)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def nearest_int4(num_experts, rows, depth):
    """A normal weight in int4 with groups of 32, each scaled by its largest magnitude."""
    weight = torch.randn(num_experts, rows, depth // 32, 32, device="cuda") * depth**-0.5
    scales = (weight.abs().amax(-1) / 7.5).to(BF16)
    codes = (weight / scales.unsqueeze(-1).float()).round().clamp(-8, 7) + 8
    return QuantizedWeight.of("int4_g32", codes.flatten(-2).to(torch.uint8), scales)


def test_a_call_is_nearly_as_right_as_of_weights_that_are_not_rounded():
    num_experts, hidden, intermediate_size, top_k = 16, 2816, 704, 8
    weights, index = random_routing(1000, num_experts, top_k, device="cuda")
    # Tokens of every size: each has a factor of its own.
    tokens = torch.randn(1000, hidden, device="cuda") * torch.exp2(torch.randint(-12, 12, (1000, 1), device="cuda"))
    case = Case(
        tokens.to(BF16),
        nearest_int4(num_experts, 2 * intermediate_size, hidden),
        nearest_int4(num_experts, hidden, intermediate_size),
        index,
    )
    pairs, _, _, expert_output = multiply(case)
    output = combine(expert_output, pairs.slot_of_pair, weights)
    exact = (case.gate_up.dequantize(), case.down.dequantize())
    truth = reference.experts(case.hidden_states.double(), *exact, index, weights, GELU_TANH)
    errors = (output.double() - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert errors.square().mean().sqrt() <= LARGEST_ERROR_OF_A_CALL
    assert errors.max() <= 2 * LARGEST_ERROR_OF_A_CALL
