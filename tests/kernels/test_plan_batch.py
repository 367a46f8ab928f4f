"""plan_batch.cu against sums on the CPU: the slots of the tiles, and the chunks of the weight stream."""

import itertools

import pytest
import torch

from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.expert_stream import shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.plan_batch import plan_batch, plan_batch_chunks
from cupymoe.kernels.stream_regimes import batch_regime
from cupymoe.kernels.stream_workspace import most_chunks, new_batch_workspace
from tests.helpers import poison_free_memory

NUM_EXPERTS = [1, 8, 33, 128, 1000]
MAX_TOKENS = [1, 7, 65, 300]


def random_counts(num_experts, max_tokens):
    """Some negative and some beyond the most; and what they are taken as."""
    counts = torch.randint(-2, max_tokens + 3, (num_experts,), dtype=torch.int32)
    counts[::5] = 0
    return counts, counts.clamp(0, max_tokens).tolist()


def batch_shape(num_experts, max_tokens):
    load = Load.of(num_experts * max_tokens, 1, num_experts)
    chosen = batch_regime(load, 704, HOPPER, has_codes=False)
    return shape_of(chosen, torch.bfloat16, torch.int32, None, num_experts, 256, 704, 1, sorted_pairs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_slots(num_experts, max_tokens):
    counts, kept = random_counts(num_experts, max_tokens)
    poison_free_memory()
    (slots,) = plan_batch(counts.cuda(), max_tokens)
    assert slots.expert_offsets.tolist() == [0, *itertools.accumulate(kept)]
    check_rows_and_tickets(slots, kept, max_tokens)


def check_rows_and_tickets(slots, kept, max_tokens):
    rows = [expert * max_tokens + row for expert, count in enumerate(kept) for row in range(count)]
    assert slots.token_of_slot[: len(rows)].tolist() == rows
    assert slots.tickets.tolist() == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
@pytest.mark.parametrize("beyond", [None, -1, 0, 1])
def test_one_of_two_plans_has_the_slots(num_experts, beyond):
    """Of as many slots as make them many, of one fewer and one more; and of none at all."""
    many_from, max_tokens = 5, 9
    counts = torch.full((num_experts,), 0 if beyond is None else many_from, dtype=torch.int32)
    if beyond is not None:
        half = num_experts // 2
        counts[half] += beyond
        counts[:half] -= 3  # what counts is how many there are in all
        counts[num_experts - half :] += 3
    kept = counts.tolist()
    poison_free_memory()
    few, many = plan_batch(counts.cuda(), max_tokens, many_from)
    is_many = sum(kept) >= many_from * num_experts
    assert is_many == (beyond is not None and beyond >= 0)
    offsets, none = [0, *itertools.accumulate(kept)], [0] * (num_experts + 1)
    assert few.expert_offsets.tolist() == (none if is_many else offsets)
    assert many.expert_offsets.tolist() == (offsets if is_many else none)
    for slots in (few, many):
        check_rows_and_tickets(slots, kept, max_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 24, 48])
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
def test_chunks(num_experts, max_tokens, tokens):
    """Of each expert as few as hold its rows, of nearly equal size."""
    counts, kept = random_counts(num_experts, max_tokens)
    output = torch.empty(num_experts * max_tokens, 1, device="cuda")
    # Of chunks as small as they are here, for which the memory must do.
    shape = batch_shape(num_experts, max_tokens)
    memory = new_batch_workspace(output, shape, output)
    chunks = torch.full((num_experts * -(-max_tokens // tokens), 4), -1, dtype=torch.int32, device="cuda")
    row_of_slot = torch.full((num_experts, max_tokens), -1, dtype=torch.int32, device="cuda")
    num_chunks = torch.full((1,), -1, dtype=torch.int32, device="cuda")
    workspace = memory._replace(
        chunks=chunks.data_ptr(), pair_of_slot=row_of_slot.data_ptr(), num_chunks=num_chunks.data_ptr()
    )
    plan_batch_chunks(counts.cuda(), max_tokens, tokens, workspace)
    assert num_chunks.item() == sum(-(-count // tokens) for count in kept)
    found = [[] for _ in kept]
    for expert, first, size, _ in chunks[: num_chunks.item()].tolist():
        found[expert].append((first - expert * max_tokens, size))
    for count, of_expert in zip(kept, found, strict=True):
        sizes = [size for _, size in of_expert]
        assert [first for first, _ in of_expert] == [*itertools.accumulate(sizes, initial=0)][:-1]
        assert sum(sizes) == count
        assert len(sizes) == -(-count // tokens)
        assert max(sizes, default=0) <= tokens
        assert all(size == sizes[0] for size in sizes[:-1])
    assert (chunks[num_chunks.item() :] == -1).all()
    for expert, count in enumerate(kept):
        rows = row_of_slot[expert].tolist()
        assert rows[:count] == [expert * max_tokens + row for row in range(count)]
        assert rows[count:] == [-1] * (max_tokens - count)


@pytest.mark.parametrize("has_codes", [False, True])
@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_a_batch_is_planned_before_and_stores_its_own_dtype(num_experts, max_tokens, has_codes):
    load = Load.of(num_experts * max_tokens, 1, num_experts)
    chosen = batch_regime(load, 704, HOPPER, has_codes=has_codes)
    assert chosen.inline_pairs == 0
    assert not chosen.fp32_slots


@pytest.mark.parametrize("max_tokens", MAX_TOKENS)
@pytest.mark.parametrize("num_experts", NUM_EXPERTS)
def test_the_memory_holds_all_chunks(num_experts, max_tokens):
    shape = batch_shape(num_experts, max_tokens)
    most = num_experts * -(-max_tokens // shape.regime.tokens)
    assert most <= most_chunks(shape, num_experts * max_tokens)
