"""operand_rows.cu against float64."""

import pytest
import torch

from cupymoe.kernels.operand_rows import operand_rows, turned_rows
from cupymoe.kernels.plan_batch import plan_batch
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import every_value, poison_free_memory, random_routing
from tests.kernels.quantised import turned

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def in_order(rows, columns):
    """Turned rows with their columns in order again; what is past the last is zero."""
    rows = turned(rows)
    assert (rows[:, columns:] == 0).all()
    return rows[:, :columns]


def narrowed_rows(rows):
    """The rows, their columns in order again, and their factors."""
    pairs = sort_by_expert(torch.zeros(len(rows), 1, dtype=torch.int64, device="cuda"), 1)
    poison_free_memory()
    narrowed, factors = operand_rows(rows, pairs, narrowed=True)
    return in_order(narrowed, rows.shape[1]), factors


def check(rows):
    narrowed, factors = narrowed_rows(rows)
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


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "columns", "top_k"), [(1, 4, 8, 4), (130, 16, 2816, 8), (77, 5, 264, 3)]
)
def test_every_token_has_its_row(num_tokens, num_experts, columns, top_k, dtype):
    """Also those whose pairs are masked; rows in expert order are turned by themselves, those past the last not."""
    rows = torch.randn(num_tokens, columns, device="cuda").to(dtype)
    index = random_routing(num_tokens, num_experts, top_k, device="cuda")[1]
    index[::3] = -1
    pairs = sort_by_expert(index, num_experts)
    kept = int(pairs.expert_offsets[-1])
    in_expert_order = torch.randn(index.numel(), columns, device="cuda").to(dtype)
    poison_free_memory()
    garbage = torch.full_like(turned(in_expert_order), torch.nan)  # whose memory the next tensor of its size gets
    del garbage
    copied = turned_rows(in_expert_order, pairs)
    assert torch.equal(copied[:kept], turned(in_expert_order[:kept]))
    assert copied[kept:].isnan().all()
    copied, factors = operand_rows(rows, pairs, narrowed=False)
    assert factors is None
    assert torch.equal(copied, turned(rows))
    if dtype == BF16:
        narrowed, factors = operand_rows(rows, pairs, narrowed=True)
        assert torch.equal(narrowed.float() * factors[:, None], turned(rows).float())


# Less than 32 columns, less than a warp's packs, whole packs of a warp, Gemma 4's; ends of every kind in a 32.
@pytest.mark.parametrize("columns", [8, 64, 208, 256, 264, 2816, 2840])
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
    narrowed, factors = narrowed_rows(rows)
    assert torch.equal(narrowed.isnan(), rows.isnan())
    assert torch.equal(narrowed.isinf(), rows.isinf())
    assert factors.isfinite().all()
    assert (narrowed.sign() == rows.sign())[~rows.isnan() & (narrowed != 0)].all()


@pytest.mark.parametrize("max_tokens", [1, 9, 300])
def test_rows_of_a_batch(max_tokens):
    """Those that count, each in its place; no other row of the output is written."""
    rows = torch.randn(12 * max_tokens, 264, device="cuda").to(BF16)
    counts = torch.randint(-1, max_tokens + 2, (12,), dtype=torch.int32, device="cuda")
    counted = (torch.arange(max_tokens, device="cuda") < counts.unsqueeze(1)).flatten()
    (slots,) = plan_batch(counts, max_tokens)
    poison_free_memory()
    garbage = torch.full_like(turned(rows), torch.nan)  # whose memory the next tensor of its size gets
    del garbage
    narrowed, factors = operand_rows(rows, slots, narrowed=True)
    copied, _ = operand_rows(rows, slots, narrowed=False)
    assert torch.equal(copied[counted], turned(rows[counted]))
    assert torch.equal(narrowed[counted].float() * factors[counted, None], turned(rows[counted]).float())
    assert narrowed[~counted].isnan().all()


def test_zeros():
    narrowed, factors = narrowed_rows(torch.zeros(9, 64, dtype=BF16, device="cuda"))
    assert (narrowed == 0).all()
    assert (factors > 0).all()
