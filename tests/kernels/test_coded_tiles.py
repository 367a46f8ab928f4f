"""Quantised weights in the tiles, without a GPU: stages, maps, what lanes read of a stage, what it becomes there."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.kernels import coded_tiles, experts_down_codes_wgmma, experts_up_codes_wgmma
from cupymoe.kernels.coded_tiles import SLOTS, RowOrder, Scales, coded_maps, coded_slots, coded_tiling
from cupymoe.kernels.expert_tiles import CUTS, tile_shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.stored_weight import stored_weight, turned_columns, unsupported_reason
from cupymoe.weights import FORMATS, pack_codes, unpack_codes
from tests.helpers import compiled
from tests.kernels.quantised import turned
from tests.kernels.test_expert_tiles import rows_of_box

SHARED_BYTES_OF_HOPPER = 227 * 1024
SILU, SWIGLUOAI, RELU2 = MoEActivation.SILU, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL
SERVED = [name for name in FORMATS if unsupported_reason(name) is None]
PAIRS_OF_32_BITS = np.arange(0, 32, 16)


def stored_as(name, which=0):
    dtypes = FORMATS[name].scale_dtypes
    return stored_weight(name, dtypes[which] if dtypes else None)


@pytest.mark.parametrize("num_experts", [1, 128, 1024])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", SERVED)
def test_stages_fit_a_multiprocessor(name, slots, num_experts):
    stored = stored_as(name, which=-1)  # int4 with scales in float32, the largest
    tiling = coded_tiling(num_experts, stored, slots)
    assert tiling.block_k * FORMATS[name].bits == 8 * tiling.code_row_bytes
    if stored.has_scales:
        assert tiling.block_k // FORMATS[name].group * stored.scale_dtype.itemsize <= 16
    stage_bytes = slots * 2 * tiling.block_k + tiling.rows * (tiling.code_row_bytes + 16 * (stored.maps - 1))
    needed = tiling.stages * (stage_bytes + 16) + 64 + 8 * (num_experts + 1)
    assert needed <= tiling.shared_bytes <= SHARED_BYTES_OF_HOPPER < needed + stage_bytes + 48
    assert tiling.stages * tiling.block_k >= 384
    assert stage_bytes % 1024 == 0  # where tokens begin


def test_which_formats_are_read():
    assert "nf4" in unsupported_reason("nf4")
    assert unsupported_reason("plain") is None


@pytest.fixture
def described(monkeypatch):
    """What the launchers ask of the driver, which is not there."""
    maps = []

    def describe(address, dtype, sizes, strides, box):
        assert dtype == torch.uint8
        assert all(stride % 16 == 0 for stride in strides)
        assert max(box) <= 256
        maps.append((sizes, strides, box))
        return (len(maps) - 1,)

    monkeypatch.setattr(coded_tiles, "tensor_map", describe)
    coded_tiles.map_of_rows.cache_clear()
    yield maps
    coded_tiles.map_of_rows.cache_clear()


@pytest.mark.parametrize("order", [RowOrder(), RowOrder(2), RowOrder(2, True)], ids=str)
@pytest.mark.parametrize("name", ["int4_g32_zero", "nvfp4", "int8"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("rows", [272, 1408])
def test_boxes_have_the_rows_of_a_tile(described, rows, slots, name, order):
    """Gate rows and then the up rows of the same columns, in one box; all others in their order, in one or two."""
    num_experts, depth = 5, 160
    stored = stored_as(name)
    groups = FORMATS[name].groups(depth)
    codes = torch.zeros(num_experts, rows, FORMATS[name].row_bytes(depth), dtype=torch.uint8)
    of_groups = torch.zeros(num_experts, rows, -(-groups // 16) * 16, dtype=torch.uint8) if groups else None
    scales = Scales(of_groups, of_groups if stored.has_zeros else None)
    tiling = coded_tiling(num_experts, stored, slots)
    words = coded_maps(codes, scales, order, tiling)
    assert len(words) == stored.maps
    columns = tiling.rows // order.halves
    for part, expert in product((0, -(-rows // tiling.rows) - 1), (0, num_experts - 1)):
        of_half = rows // order.halves
        expected = [
            expert * rows + (column * 2 + half if order.interleaved else half * of_half + column)
            for half in range(order.halves)
            for column in range(part * columns, (part + 1) * columns)
        ]
        for word, tensor, box_bytes in zip(words, (codes, of_groups, of_groups), (None, 16, 16), strict=False):
            sizes, strides, box = described[word]
            assert box[0] == (box_bytes or tiling.code_row_bytes)
            assert order.halves == 1 or box[1] == columns
            assert sizes[0] == tensor.shape[-1]
            got = [
                row
                for first in range(part * columns, (part + 1) * columns, box[1])
                for row in rows_of_box((sizes, strides, box), (first, 0, 0, expert), tensor.shape[-1])
            ]
            assert len(got) == tiling.rows
            inside = [
                column < of_half for _ in range(order.halves) for column in range(part * columns, (part + 1) * columns)
            ]
            assert [row for row, there in zip(got, inside, strict=True) if there] == [
                row for row, there in zip(expected, inside, strict=True) if there
            ]
            assert all(row is None for row, there in zip(got, inside, strict=True) if not there)


# LaneRows of cuda_src/common/coded_tiles.cuh, address by address.
LANES = np.arange(32)


def swizzled(address, row_bytes):
    """Where the copy engine puts a byte: CU_TENSOR_MAP_SWIZZLE_64B or _128B."""
    return address ^ (address >> 7 & row_bytes // 16 - 1) << 4


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("name", ["int4_g32", "int8"])
def test_lanes_read_the_codes_of_their_operands(name, slots, is_gated):
    """Of every row and every 32 k each lane its 8 codes, and no other lane; every row of a stage is some lane's. Words
    of 4 bits come without bank conflicts; of 8 bits two rows of four that are read together share their banks."""
    tiling, bits = coded_tiling(128, stored_as(name), slots), FORMATS[name].bits
    row_bytes, words = tiling.code_row_bytes, bits // 4
    ring = {}
    for row, word in product(range(tiling.rows), range(row_bytes // 4)):
        ring[swizzled(row * row_bytes + word * 4, row_bytes)] = (row, word)
    # Rows of a stage from a warp's to the next one's, and from a half's.
    of_warp, of_half = (8, tiling.rows // 2) if is_gated else (16, 8)
    seen = set()
    for warp, half, chunk in product(range(tiling.warpgroups * 4), range(2), range(tiling.block_k // 32)):
        first = warp * of_warp + LANES // 4
        swap = first // 2 % 4 if row_bytes == 64 else first % 8
        codes = first * row_bytes + (LANES % 4 * words * 4 ^ swap * 16)
        places = half * of_half * row_bytes + (codes ^ chunk * 4 * bits)
        for word in range(words):
            expected = zip(first + half * of_half, (chunk * 4 + LANES % 4) * words + word, strict=True)
            assert [ring[place + word * 4] for place in places] == [*expected]
        for together in np.split(places, words):
            banks = Counter((place // 4 + word) % 32 for place in together for word in range(words))
            assert [*banks.values()] == ([1] * 32 if words == 1 else [2] * 16)
        seen.update(first + half * of_half)
    assert seen == {*range(tiling.rows)}


def place_of(column):
    """turned() of cuda_src/common/turned_rows.cuh."""
    return column // 32 * 32 + column // 2 % 4 * 8 + column // 8 % 4 * 2 + column % 2


@pytest.mark.parametrize("columns", [8, 32, 40, 208, 704])
def test_a_place_has_the_column_whose_place_it_is(columns):
    rows = torch.arange(1, columns + 1)
    places = place_of(torch.arange(turned_columns(columns)))
    assert torch.equal(places[places], torch.arange(len(places)))
    assert torch.equal(turned(rows)[places[:columns]], rows)
    assert (turned(rows)[places[columns:]] == 0).all()


@pytest.mark.parametrize("depth", [704, 40, 48, 8])
@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "int8"])
def test_products_of_turned_rows_are_those_of_rows(name, depth):
    """Each lane's pairs of codes, at the k where a product has them, times what a turned row has there. Past the depth
    codes are what pads them, and a row is zeros."""
    its, seen = FORMATS[name], []
    if its.codes == "int4" and depth % 32:
        depth -= depth % 32 - 32  # its groups are whole
    codes, tokens = torch.randint(2**its.bits, (1, 1, depth), dtype=torch.uint8), torch.randint(-9, 9, (depth,))
    rows = unpack_codes(its, pack_codes(its, codes), turned_columns(depth))[0, 0].long()
    values, in_turn = torch.tensor(its.values, dtype=torch.float64)[rows], turned(tokens).double()
    total = 0.0
    for k16, lane, i in product(range(turned_columns(depth) // 16), range(4), range(2)):
        # Pair `pair` of the lane's four of these 32 k, in words 0 and 1 of an operand or, where i is 1, 2 and 3.
        pair = k16 % 2 * 2 + i
        own = k16 // 2 * 32 + lane * 8 + pair * 2
        there = k16 * 16 + i * 8 + lane * 2
        seen += [own, own + 1]
        total += float(values[own : own + 2] @ in_turn[there : there + 2])
    assert sorted(seen) == [*range(turned_columns(depth))]
    exact = torch.tensor(its.values, dtype=torch.float64)[codes[0, 0].long()] @ tokens.double()
    assert total == exact


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("columns", [704, 352, 72, 8])
def test_turned_rows_are_stored_whole(columns, slots, is_gated):
    """Each place of a row by one lane; past the last column zeros."""
    warps = coded_tiling(128, stored_as("nvfp4"), slots).warpgroups * 4
    of_warp = 8 if is_gated else 16
    row = torch.full((turned_columns(columns),), -1)
    for part in range(-(-columns // (warps * of_warp))):
        for warp in range(warps):
            first = (part * warps + warp) * of_warp
            if (part * warps + warp // 4 * 4) * of_warp >= columns:  # the warpgroup has no rows
                continue
            for quad, eight, i in product(range(4), range(of_warp // 8), range(2)):
                # Of sixteen columns the lane stores its pair of the second eight behind that of the first.
                column, place = first + eight * 8 + quad * 2 + i, place_of(first + quad * 2) + eight * 2 + i
                assert place == place_of(column)
                if column < len(row):
                    assert row[place] == -1
                    row[place] = column + 1 if column < columns else 0
    assert torch.equal(row, turned(torch.arange(1, columns + 1)))


@pytest.mark.parametrize("group_of_16", range(2))
@pytest.mark.parametrize("chunk", range(2))
def test_a_lane_takes_the_scale_of_its_16_of_32_k(chunk, group_of_16):
    """By one permutation of the bytes of four scales: LaneRows::of_group()."""
    scales = [11, 22, 33, 44, 0, 0, 0, 0]  # of 64 k, and the zeros beside them
    for lane in range(group_of_16 * 2, group_of_16 * 2 + 2):
        selector = 0x4240 + lane // 2 * 0x0101
        picked = [scales[selector >> 4 * byte & 7] for byte in range(4)]
        assert picked[1] == picked[3] == 0
        assert picked[chunk * 2] == scales[chunk * 2 + lane * 8 // 16]


@pytest.mark.parametrize("slots", SLOTS)
def test_a_lane_reads_the_scale_of_its_group(slots):
    """The place of a group's scale in a stage's 16 bytes, for every step of a depth and every format with groups."""
    for name in SERVED:
        if FORMATS[name].group is None:
            continue
        for which in range(len(FORMATS[name].scale_dtypes)):
            stored = stored_as(name, which)
            group, size = FORMATS[name].group, stored.scale_dtype.itemsize
            block_k = coded_tiling(128, stored, slots).block_k
            for step, k64 in product(range(64), range(block_k // 64)):
                box = step * block_k // group * size // 16 * 16
                first = (step * block_k + k64 * 64) // group
                for of_64 in range(max(64 // group, 1)):
                    place = first * size % 16 + of_64 * size
                    assert place + size <= 16
                    assert box + place == (first + of_64) * size


def test_slots_of_a_tile_by_load():
    """The fewest that most experts' slots fit in: two deviations above the mean."""
    means = [16, 20, 21, 45, 46, 72, 73, 10000]
    slots = [coded_slots(Load.of(mean, 1, 1)) for mean in means]
    assert slots == [32, 32, 64, 64, 96, 96, 160, 160]
    assert all(mean + 2 * mean**0.5 < most for mean, most in zip(means[:6], slots, strict=False))


def numbers(words, dtype):
    """The numbers of 16 bits in words of two, in float64."""
    halves = (words[..., None] >> PAIRS_OF_32_BITS & 0xFFFF).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(dtype).double()


def both(half):
    return half * 0x10001


def bits_of_eight(codes, words, dtype):
    """Pairs as the codecs make them, by masks and shifts, and what brings them to the codes' values: a sum or a
    product."""
    exponent_at, bias, whole = {torch.bfloat16: (7, 127, 0x4300), torch.float16: (10, 15, 0x6400)}[dtype]
    pairs = [words[j // 2] >> j % 2 * 8 if FORMATS[codes].bits == 8 else words[0] >> 4 * j for j in range(4)]
    pairs = np.stack(pairs, axis=-1)
    if codes == "int4_g32":
        return numbers(pairs & 0x000F000F | both(whole), dtype) - numbers(np.array(both(whole | 8)), dtype)
    if codes == "int8":
        if dtype == torch.float16:
            return numbers(pairs & 0x00FF00FF ^ both(0x6480), dtype) - numbers(np.array(both(0x6480)), dtype)
        lower, minus = pairs & 0x007F007F | both(0x4300), pairs & 0x00800080 | both(0xC300)
        return numbers(lower, dtype) + numbers(minus, dtype)
    if codes == "fp8":
        bits = (pairs & 0x00800080) << 8 | (pairs & 0x007F007F) << (exponent_at - 3)
        return numbers(bits, dtype) * 2.0 ** (bias - 7)
    word, mask = words[0], 0x81C081C0
    turned = (word & 0xF) << 28 | word >> 4
    of_last = word << 2 & 0x80C080C0 | word >> 6 & 0x01000100
    floats = np.stack([word & mask, word << 6 & mask, turned & mask, of_last], axis=-1)
    if dtype == torch.float16:
        floats = (floats & both(0x01C0)) << 3 | floats & both(0x8000)
    return numbers(floats, dtype) * 2.0 ** (bias - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["int4_g32", "int8", "fp8", "mxfp4"])
def test_every_code_becomes_its_value_exactly(name, dtype):
    weight_format = FORMATS[name]
    codes = torch.arange(2**weight_format.bits, dtype=torch.uint8).repeat(1, 2, 2)
    words = pack_codes(weight_format, codes).numpy().view(np.uint32).astype(np.int64)
    words = words.reshape(-1, weight_format.bits // 4).T
    values = bits_of_eight(name, words, dtype).flatten()
    expected = torch.tensor(weight_format.values, dtype=torch.float64)[codes.flatten().long()]
    is_number = expected.isfinite()
    assert torch.equal(values[is_number], expected[is_number])
    assert torch.equal(values.to(dtype).double(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_of_two_factors_rounds_once_but_for_a_little(dtype):
    """PairScale of a float32 scale: high and low, each rounded; the product by low is rounded, the sum is rounded."""
    ulp = torch.finfo(dtype).eps
    scale = (torch.rand(4096, dtype=torch.float64) + 0.5).float()
    high = scale.to(dtype)
    low = (scale - high.float()).to(dtype)
    for value in (*range(-8, 8), *range(-15, 16, 6)):
        of_low = (low.double() * value).to(dtype)
        got = (high.double() * value + of_low.double()).float().to(dtype).double()
        exact = scale.double() * value
        units = torch.exp2((torch.frexp(exact).exponent - 1).double()) * ulp
        assert (((got - exact) / units)[exact != 0].abs() <= 0.502).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_compiles_for_other_models(name):
    for sizes, activation, which in (
        ((32, 2880, 2880), SWIGLUOAI, 0),
        ((8, 4096, 14336), SILU, -1),
        ((1024, 2048, 512), RELU2, 0),
    ):
        stored = stored_as(name, which)
        shape = tile_shape_of(
            *CUTS[0],
            torch.bfloat16,
            activation,
            *sizes,
            has_gate_up_bias=True,
            has_down_bias=True,
            keeps_gate_up=True,
            gate_up_stored=stored,
            down_stored=stored,
        )
        for variant in (experts_up_codes_wgmma.variant(shape), experts_down_codes_wgmma.variant(shape)):
            report = compiled(variant, "sm_90a")
            assert report.spill_bytes == 0, report.log
            assert "warning" not in report.log, report.log
            assert "C75" not in report.log, report.log  # products that ptxas runs one by one
