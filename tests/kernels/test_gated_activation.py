"""gated_activation.cu against float64, in ulps of the output's dtype."""

import pytest
import torch

from cupymoe import MoEActivation, reference
from cupymoe.kernels.gated_activation import gated_activation
from tests.helpers import DTYPES, GATED, WITH_PARAMETERS, assert_ulps, every_value

pytestmark = pytest.mark.gpu

BOUND = {torch.bfloat16: 0.51, torch.float16: 0.51, torch.float32: 4.0}
COLUMNS = 1024
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def join(gate, up, activation):
    """The input that an activation reads its gates and ups from."""
    if not activation.is_gated:
        return gate.contiguous()
    return torch.stack((gate, up), -1).flatten(-2) if activation.is_interleaved else torch.cat((gate, up), -1)


def check(input, activation):
    output = torch.full((*input.shape[:-1], input.shape[-1] // activation.input_size(1)), 123.0).to(input)
    assert gated_activation(input, output, activation) is output
    assert_ulps(output, reference.activate(input.double(), activation), BOUND[input.dtype])


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("activation", [*MoEActivation, *WITH_PARAMETERS])
def test_every_16_bit_value(activation, dtype):
    """All finite gates, infinities and NaN; for a gated member against random ups."""
    gate = every_value(dtype, "cuda").view(-1, COLUMNS)
    check(join(gate, torch.randn_like(gate), activation), activation)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize(
    "activation", [MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.SWIGLUSTEP, *WITH_PARAMETERS]
)
def test_every_16_bit_up(activation, dtype):
    """The clamps, and that an infinite or NaN up comes through."""
    up = every_value(dtype, "cuda").view(-1, COLUMNS)
    check(join(torch.randn_like(up), up, activation), activation)


def float32_gates():
    """Every magnitude, and dense where the functions bend and where they fall to zero."""
    bits = torch.randint(-(2**31), 2**31, (2**21,), device="cuda").to(torch.int32).view(torch.float32)
    dense = [torch.linspace(-end, end, 2**20, device="cuda") for end in (0.1, 30.0, 120.0)]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 7.0, -7.0], device="cuda")
    padded = torch.cat((special, torch.zeros(COLUMNS - len(special), device="cuda")))
    return torch.cat((bits, *dense, padded)).view(-1, COLUMNS)


@pytest.mark.parametrize("activation", [member for member in MoEActivation if not member.is_gated])
def test_float32(activation):
    check(float32_gates(), activation)


@pytest.mark.parametrize("activation", [*GATED, *WITH_PARAMETERS])
def test_float32_times_up(activation):
    """Where act(gate) is a normal number: a subnormal one has lost bits that a large up would show."""
    gate = float32_gates()
    one = join(gate, torch.full_like(gate, 0.0 if activation.function == "SWIGLUOAI" else 1.0), activation)
    factor = reference.activate(one.double(), activation).abs()
    info = torch.finfo(torch.float32)
    gate = torch.where((factor >= info.tiny) & (factor <= info.max), gate, 1.0)
    check(join(gate, torch.randn_like(gate), activation), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [512, 13824])
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH])
def test_vllm_s_cases(activation, columns, dtype):
    for num_tokens in (7, 83, 2048):
        check(torch.randn(num_tokens, 2 * columns, device="cuda", dtype=dtype), activation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1, 13, 88, 176, 352])
@pytest.mark.parametrize("activation", [MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL])
def test_odd_widths(activation, columns, dtype):
    """Rows that are no whole number of 16-byte packs, and that end within a block."""
    check(3 * torch.randn(37, activation.input_size(columns), device="cuda", dtype=dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", MoEActivation)
def test_misaligned_storage(activation, dtype):
    """One element past a 16-byte boundary: element-wise access, of every member and dtype."""
    rows, width = 5, activation.input_size(COLUMNS)
    input = torch.randn(rows * width + 1, device="cuda", dtype=dtype)[1:].view(rows, width)
    check(input, activation)
    buffer = torch.full((rows * COLUMNS + 2,), 123.0, device="cuda", dtype=dtype)
    output = gated_activation(input.clone(), buffer[1:-1].view(rows, COLUMNS), activation)
    assert_ulps(output, reference.activate(input.double(), activation), BOUND[dtype])
    assert buffer[0] == buffer[-1] == 123


@pytest.mark.parametrize("num_rows", [0, 1, 7, 10])
@pytest.mark.parametrize("activation", [MoEActivation.GELU_TANH, MoEActivation.SWIGLUOAI, MoEActivation.SILU_NO_MUL])
def test_rows_past_num_rows_stay(activation, num_rows):
    input = torch.randn(10, activation.input_size(COLUMNS), device="cuda", dtype=torch.bfloat16)
    input[num_rows:] = torch.nan
    output = torch.full((10, COLUMNS), 123.0, device="cuda", dtype=torch.bfloat16)
    truth = reference.activate(input.double(), activation)
    truth[num_rows:] = 123
    gated_activation(input, output, activation, torch.tensor([num_rows], dtype=torch.int32, device="cuda"))
    assert_ulps(output, truth, 0.51)


def test_three_dimensions_and_in_place():
    input = torch.randn(2, 3, 64, device="cuda")
    expected = reference.activate(input.double(), MoEActivation.SILU_NO_MUL)
    assert gated_activation(input, input, MoEActivation.SILU_NO_MUL) is input
    assert_ulps(input, expected, 4)
