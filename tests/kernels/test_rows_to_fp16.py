"""rows_to_fp16.cu against float64."""

import pytest
import torch

from cupymoe.kernels.rows_to_fp16 import rows_to_fp16
from tests.helpers import every_value, poison_free_memory

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def check(rows):
    poison_free_memory()
    narrowed, factors = rows_to_fp16(rows)
    assert narrowed.dtype == torch.float16
    assert narrowed.shape == rows.shape
    largest = rows.double().abs().amax(-1, keepdim=True)
    factor = factors.double().unsqueeze(-1)
    assert torch.equal(torch.frexp(factor).mantissa, torch.full_like(factor, 0.5))
    scaled = largest / factor
    is_usual = (largest >= 2**-111) & (largest < torch.inf)
    assert ((scaled >= 2**14) & (scaled < 2**15))[is_usual].all()
    exact = rows.double().abs() >= largest * 2**-31
    error = (narrowed.double() * factor - rows.double()).abs()
    assert (error[exact & is_usual] == 0).all()
    assert (error <= largest * 2**-39).all()
    return narrowed, factor


# Less than a warp's packs, whole packs of a warp, Gemma 4's; rows that fill no block.
@pytest.mark.parametrize("columns", [8, 64, 256, 264, 2816])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 1000])
def test_rows_of_every_size(num_rows, columns):
    sizes = torch.exp2(torch.randint(-100, 100, (num_rows, 1), device="cuda").double())
    spread = torch.exp2(torch.randint(-40, 1, (num_rows, columns), device="cuda").double())
    check((torch.randn(num_rows, columns, device="cuda") * sizes * spread).to(BF16))


def test_every_finite_value():
    """Each alone in its row: the largest and subnormals among them."""
    values = every_value(BF16, "cuda")
    values = values[values.isfinite()]
    rows = torch.zeros(len(values), 8, dtype=BF16, device="cuda")
    rows[:, 3] = values
    check(rows)


def test_what_is_no_number_stays_so():
    rows = torch.randn(4, 64, device="cuda").to(BF16)
    rows[0, 5], rows[1, 6], rows[2, 7] = torch.inf, -torch.inf, torch.nan
    narrowed, factors = rows_to_fp16(rows)
    assert torch.equal(narrowed.isnan(), rows.isnan())
    assert torch.equal(narrowed.isinf(), rows.isinf())
    assert factors.isfinite().all()
    assert (narrowed.sign() == rows.sign())[~rows.isnan() & (narrowed != 0)].all()


@pytest.mark.parametrize("max_tokens", [1, 9, 300])
def test_rows_of_a_batch(max_tokens):
    """Those that count are as without the others, which are not written."""
    rows = torch.randn(12 * max_tokens, 264, device="cuda").to(BF16)
    counts = torch.randint(-1, max_tokens + 2, (12,), dtype=torch.int32, device="cuda")
    counted = (torch.arange(max_tokens, device="cuda") < counts.unsqueeze(1)).flatten()
    expected = rows_to_fp16(rows)
    poison_free_memory()
    narrowed = rows_to_fp16(rows, counts)
    for got, wanted in zip(narrowed, expected, strict=True):
        assert torch.equal(got[counted], wanted[counted])
        assert got[~counted].isnan().all()


def test_zeros():
    narrowed, factors = rows_to_fp16(torch.zeros(9, 64, dtype=BF16, device="cuda"))
    assert (narrowed == 0).all()
    assert (factors > 0).all()
