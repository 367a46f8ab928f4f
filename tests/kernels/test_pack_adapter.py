"""pack_adapter.cu, bit for bit, against what torch copies, casts and scales."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad

from cupymoe import LowRank
from cupymoe.backends.adapters import lay_out_gradients, new_gradient, packed
from cupymoe.kernels import pack_adapter as pack_adapter_module
from cupymoe.kernels.launch import word_of
from cupymoe.kernels.pack_adapter import Copy, pack_adapter
from cupymoe.kernels.sort_by_expert import sort_by_expert
from tests.helpers import poison_free_memory, transposed

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ORDERS = {"in order": (0, 1, 2), "rows innermost": (0, 2, 1), "experts innermost": (1, 2, 0)}
# Experts, rows and columns: whole tiles, odd ones, fewer than a tile, and one of each.
SIZES = [(128, 32, 256), (33, 17, 129), (3, 200, 5), (1, 1, 1)]


def laid_out(size, order, dtype):
    """Uninitialised, of this size, with its dimensions in this order in memory."""
    dimensions = ORDERS[order]
    memory = torch.empty([size[dimension] for dimension in dimensions], device="cuda", dtype=dtype)
    return memory.permute([dimensions.index(dimension) for dimension in range(3)])


def random_source(size, order, dtype):
    return laid_out(size, order, dtype).copy_(torch.randn(size, device="cuda"))


def expected_of(source, size, dtype, scale):
    scaled = (source.float() * scale).to(dtype)
    return pad(scaled, (0, size[2] - source.shape[2], 0, size[1] - source.shape[1]))


@pytest.mark.gpu
@pytest.mark.parametrize(("source_order", "output_order"), [*product(ORDERS, ORDERS)])
def test_any_order_into_any_other(source_order, output_order):
    for size, padding in product(SIZES, ((0, 0), (3, 0), (0, 15))):
        padded = size[0], size[1] + padding[0], size[2] + padding[1]
        source = random_source(size, source_order, torch.float32)
        output = laid_out(padded, output_order, torch.bfloat16).fill_(torch.nan)
        pack_adapter([Copy(source, output, -0.3)])
        assert torch.equal(output, expected_of(source, padded, torch.bfloat16, -0.3)), (size, padded)


@pytest.mark.gpu
@pytest.mark.parametrize(("source_dtype", "output_dtype"), [*product(DTYPES, DTYPES)])
def test_dtypes(source_dtype, output_dtype):
    """Values that are subnormal, or infinite once they are rounded, among them."""
    source = random_source((40, 30, 10), "experts innermost", source_dtype)
    source[0] *= 1e-7 if source_dtype == torch.float16 else 1e-39
    source[1] *= 3e4
    for scale in (1.0, 2 / 3):
        output = laid_out((40, 30, 16), "in order", output_dtype).fill_(torch.nan)
        pack_adapter([Copy(source, output, scale)])
        assert torch.equal(output, expected_of(source, output.shape, output_dtype, scale))


@pytest.mark.gpu
def test_a_part_of_a_larger_tensor():
    """Neither side reads or writes what lies between."""
    whole = torch.full((8, 40, 60), torch.nan, device="cuda")
    source = whole[1:7, ::2, 3:40:5]
    source.copy_(torch.randn(source.shape, device="cuda"))
    outputs = torch.full((6, 50, 90), 7.0, device="cuda")
    pack_adapter([Copy(source, outputs[:, 10:40:1, ::3][:, :25], 2.0)])
    changed = outputs.clone()
    assert torch.equal(changed[:, 10:35, ::3], expected_of(source, (6, 25, 30), torch.float32, 2.0))
    changed[:, 10:35, ::3] = 7.0
    assert bool((changed == 7.0).all())


@pytest.mark.gpu
def test_copies_of_every_kind_at_once():
    """More than a launch holds, by every tiling, an empty one and those of other dtypes among them."""
    copies = []
    for size, source_order, output_order in product(SIZES, ORDERS, ORDERS):
        for dtype in (torch.float32, torch.bfloat16)[: 1 + (source_order == output_order)]:
            source = random_source(size, source_order, dtype)
            output = laid_out((size[0], size[1] + 3, size[2] + 9), output_order, torch.bfloat16).fill_(torch.nan)
            copies.append(Copy(source, output, 1.0 + len(copies)))
    copies.insert(5, Copy(copies[5].source[:0], copies[5].output[:0]))
    pack_adapter(copies)
    for source, output, scale in copies:
        assert torch.equal(output, expected_of(source, output.shape, torch.bfloat16, scale))
    pack_adapter([])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 5000])
def test_old_sources_are_packed_beside_the_launch_before(num_tokens):
    """Both are right, over memory that held something else, and of a source that was written just before."""
    index = torch.randint(128, (num_tokens, 8), device="cuda")
    weight = torch.empty(128, 352, 704, device="cuda", dtype=torch.bfloat16)
    expected_pairs = sort_by_expert(index, 128)
    for scaling in (0.5, 1.5, 2.5):
        adapter = peft_adapter(weight, 16, torch.float32, scaling)
        poison_free_memory()
        adapter.a.normal_()
        pairs = sort_by_expert(index, 128)
        (found,) = packed([adapter], [weight], old_factors=True)
        expected = adapter.packed(weight)
        assert torch.equal(found.a, expected.a)
        assert torch.equal(found.b, expected.b)
        assert torch.equal(pairs.expert_offsets, expected_pairs.expert_offsets)
        assert torch.equal(pairs.token_of_slot, expected_pairs.token_of_slot)


def test_neighbours_of_the_same_dtypes_share_launches(monkeypatch):
    """Up to four; a launch says where each of its copies lies, how large and how dense it is, and nothing of others."""
    launches = []

    def kernel(*dtypes_and_more):
        return lambda grid, _, __, *words: launches.append((dtypes_and_more[:3], grid, words))

    monkeypatch.setattr(pack_adapter_module, "_kernel", kernel)
    monkeypatch.setattr(pack_adapter_module, "current_stream", lambda _: 0)
    in_order, innermost = torch.empty(33, 5, 200), torch.empty(5, 200, 33).permute(2, 0, 1)
    output = torch.empty(33, 16, 200, dtype=torch.bfloat16)
    copies = [Copy(in_order, output), Copy(innermost, output, 2.0), Copy(in_order[:0], output[:0])]
    pack_adapter([*copies, *copies, Copy(in_order, output), Copy(in_order.bfloat16(), output)], old_sources=True)
    of_dtypes, grids, words = zip(*launches, strict=True)
    assert of_dtypes == ((torch.float32, torch.bfloat16, True),) * 2 + ((torch.bfloat16, torch.bfloat16, True),)
    wide, from_innermost = 33 * 1 * 2, 2 * 2 * 13
    assert grids == ((2 * (wide + from_innermost), 1), (wide, 1), (wide, 1))
    assert [[each[16 * copy + 3] for copy in range(4)] for each in words] == [
        [wide, from_innermost] * 2,
        [wide, 0, 0, 0],
        [wide, 0, 0, 0],
    ]
    assert words[0][16:32] == (
        *(innermost.data_ptr(), output.data_ptr(), word_of(2.0), from_innermost, 2),
        *(33, 5, 200, 16, 200),
        *(1, 200 * 33, 33, 16 * 200, 200, 1),
    )
    assert all(len(each) == 64 for each in words)


def peft_adapter(weight, rank, dtype, scaling):
    """As PEFT keeps it: A in order, B [out, r, E]."""
    num_experts, out_size, in_size = weight.shape
    a = torch.randn(num_experts, rank, in_size, device="cuda", dtype=dtype)
    b = torch.randn(out_size, rank, num_experts, device="cuda", dtype=dtype)
    return LowRank(a, b.permute(2, 0, 1), scaling)


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [0, 1, 4, 8, 12, 16, 64])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_adapters_are_packed_as_by_torch(rank, is_transposed):
    for size in ((128, 352, 704), (5, 72, 88), (1, 16, 8)):
        weight = torch.empty(size, device="cuda", dtype=torch.bfloat16)
        weight = transposed(weight) if is_transposed else weight
        for dtype in (torch.float32, torch.bfloat16):
            adapter = peft_adapter(weight, rank, dtype, 1.5)
            poison_free_memory()
            (found,), expected = packed([adapter], [weight]), adapter.packed(weight)
            for ours, theirs in zip(found[:2], expected[:2], strict=True):
                assert ours.dtype == torch.bfloat16
                strides = zip(ours.stride(), theirs.stride(), ours.shape, strict=True)
                assert all(own == other for own, other, size in strides if size > 1)
                assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_both_weights_adapters_are_packed_by_one_launch(monkeypatch):
    launches = []
    launch = pack_adapter_module._launch
    monkeypatch.setattr(pack_adapter_module, "_launch", lambda *given: (launches.append(given), launch(*given)))
    weights = [torch.empty(33, *size, device="cuda", dtype=torch.bfloat16) for size in ((48, 64), (64, 24))]
    adapters = [
        peft_adapter(weight, 5, torch.float32, scaling) for weight, scaling in zip(weights, (0.5, 3.0), strict=True)
    ]
    poison_free_memory()
    for adapter, weight, found in zip(adapters, weights, packed(adapters, weights), strict=True):
        expected = adapter.packed(weight)
        assert torch.equal(found.a, expected.a)
        assert torch.equal(found.b, expected.b)
    assert len(launches) == 1
    assert packed([None, adapters[1]], weights)[0] is None


@pytest.mark.gpu
def test_what_is_packed_already_is_taken_as_it_is():
    weight = torch.empty(4, 48, 64, device="cuda", dtype=torch.bfloat16)
    (once,) = packed([peft_adapter(weight, 12, torch.float32, 0.5)], [weight])
    again, scaled = packed([LowRank(once.a, once.b), LowRank(once.a, once.b, 2.0)], [weight, weight])
    assert (again.a.data_ptr(), again.b.data_ptr()) == (once.a.data_ptr(), once.b.data_ptr())
    assert scaled.b.data_ptr() != once.b.data_ptr()


@pytest.mark.gpu
def test_gradients_of_factors_are_laid_out_as_they_are():
    sizes = {"gate_up": (33, 48, 64), "down": (33, 64, 24)}
    adapters = {
        name: peft_adapter(torch.empty(size, device="cuda", dtype=torch.bfloat16), 5, torch.float32, 1.0)
        for name, size in sizes.items()
    }
    factors = {f"{name}_{part}": getattr(adapter, part) for name, adapter in adapters.items() for part in "ab"}
    stored = {name: new_gradient(factor).normal_() for name, factor in factors.items()}
    found = {**stored, "hidden_states": None}
    lay_out_gradients(found, SimpleNamespace(**factors))
    for name, factor in factors.items():
        assert found[name].stride() == factor.stride()
        assert torch.equal(found[name], stored[name])
        assert (found[name] is stored[name]) == name.endswith("_a")
        assert stored[name].is_contiguous()
