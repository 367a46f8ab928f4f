"""Quantised weights in the tiles, without a GPU: rings, maps, the way of codes into a stage, what they become there."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.kernels import codes as kernel_codes
from cupymoe.kernels import experts_down_wgmma, experts_up_wgmma
from cupymoe.kernels.codes import CODE_ROW_BYTES, PLAIN_CODES, SCALE_ROW_BYTES, Codes, Scales, coded_maps
from cupymoe.kernels.expert_tiles import BLOCK_K, CUTS, tile_shape_of
from cupymoe.weights import FORMATS, pack_codes
from tests.helpers import compiled
from tests.kernels.test_expert_tiles import SIZES, STAGES_AT_LEAST, rows_of_box

SHARED_BYTES_OF_HOPPER = 227 * 1024
SILU, SWIGLUOAI, RELU2 = MoEActivation.SILU, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL
BYTES_OF_BOX = (CODE_ROW_BYTES, SCALE_ROW_BYTES)
SERVED = [name for name in FORMATS if kernel_codes.unsupported_reason(name) is None]
PAIRS_OF_32_BITS = np.arange(0, 32, 16)


def codes_of(name):
    dtypes = FORMATS[name].scale_dtypes
    return Codes(name, dtypes[0] if dtypes else None)


def coded_shape(cut, num_experts, hidden, intermediate, name="int4_g32", *, activation=SILU):
    codes = codes_of(name)
    sizes = (num_experts, hidden, intermediate)
    return tile_shape_of(*cut, torch.bfloat16, activation, *sizes, gate_up_codes=codes, down_codes=codes)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cut", CUTS)
def test_both_rings_fit_a_multiprocessor(cut, sizes, name):
    shape = coded_shape(cut, *sizes, name)
    for tiling in (shape.up, shape.down):
        assert tiling.blocks == 1
        assert tiling.stages >= STAGES_AT_LEAST
        assert tiling.code_stages >= 2
        stage_bytes = (128 * tiling.products + tiling.block_n) * 128
        row_bytes = 64 + 16 * (shape.gate_up_codes.maps - 1)
        code_bytes = tiling.block_n * row_bytes + 16
        shared_struct = 16 * tiling.stages + 64 + 8 * (sizes[0] + 1)
        spare_bytes = -tiling.block_n % 64 * row_bytes
        needed = tiling.stages * stage_bytes + tiling.code_stages * code_bytes + spare_bytes + shared_struct
        assert needed <= tiling.shared_bytes <= SHARED_BYTES_OF_HOPPER


def test_plain_weights_have_no_ring_of_codes():
    plain = tile_shape_of(1, 2, torch.bfloat16, SILU, 8, 128, 64, gate_up_codes=PLAIN_CODES)
    assert plain.up.code_stages == 0
    assert not [define for define in experts_up_wgmma.variant(plain).defines if "COD" in define]
    mixed = replace(plain, blocks=2, gate_up_codes=Codes("int8"))
    assert (mixed.up.blocks, mixed.down.blocks) == (1, 2)
    assert [define for define in experts_up_wgmma.variant(mixed).defines if define == "WEIGHT_CODEC=Int8"]
    assert not [define for define in experts_down_wgmma.variant(mixed).defines if "CODEC" in define]


def test_who_is_not_decoded():
    assert "nf4" in kernel_codes.unsupported_reason("nf4")
    assert kernel_codes.unsupported_reason("plain") is None


@pytest.fixture
def described(monkeypatch):
    """What the launchers ask of the driver, which is not there."""
    maps = []

    def describe(address, dtype, sizes, strides, box):
        assert all(stride % 16 == 0 for stride in strides)
        assert max(box) <= 256
        maps.append((dtype, sizes, strides, box))
        return (len(maps) - 1,)

    for module in (experts_up_wgmma, experts_down_wgmma):
        monkeypatch.setattr(module, "tensor_map", describe)
    return maps


@pytest.mark.parametrize("sizes", [(5, 272, 72), (16, 2816, 352)])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("activation", [SILU, SWIGLUOAI, RELU2], ids=str)
@pytest.mark.parametrize("name", ["int4_g32_zero", "nvfp4", "int8"])
def test_codes_and_scales_come_in_the_order_of_plain_rows(described, name, activation, cut, sizes):
    num_experts, hidden, intermediate = sizes
    if FORMATS[name].group:
        hidden, intermediate = -(-hidden // 32) * 32, -(-intermediate // 32) * 32
    shape = coded_shape(cut, num_experts, hidden, intermediate, name, activation=activation)
    for module, rows, depth in (
        (experts_up_wgmma, shape.gate_up_rows, hidden),
        (experts_down_wgmma, hidden, intermediate),
    ):
        described.clear()
        groups = FORMATS[name].groups(depth)
        codes = torch.zeros(num_experts, rows, FORMATS[name].row_bytes(depth), dtype=torch.uint8)
        of_groups = torch.zeros(num_experts, rows, -(-groups // 16) * 16, dtype=torch.uint8) if groups else None
        scales = Scales(of_groups, of_groups if FORMATS[name].has_zeros else None)
        words = coded_maps(codes, scales, lambda *row, module=module: module._map_of_bytes.__wrapped__(shape, *row))
        assert len(words) == shape.gate_up_codes.maps
        plain = module._map_of_rows(0, shape, torch.bfloat16, depth, BLOCK_K)
        dtype, *of_plain = described[plain[0]]
        tiling = shape.up if module is experts_up_wgmma else shape.down
        for part, expert in product((0, -(-rows // tiling.block_n) - 1), (0, num_experts - 1)):
            start = box_start(module, shape, part, expert, tiling.block_n)
            expected = rows_of_box(of_plain, start, depth * dtype.itemsize)
            assert len(expected) == tiling.block_n
            for word, tensor, box_bytes in zip(words, (codes, of_groups, of_groups), (64, 16, 16), strict=False):
                dtype_of_bytes, *of_bytes = described[word]
                assert dtype_of_bytes == torch.uint8
                assert of_bytes[2][0] == box_bytes
                assert of_bytes[0][0] == tensor.shape[-1]
                assert rows_of_box(of_bytes, start, tensor.shape[-1]) == expected


def box_start(module, shape, part, expert, block_n):
    """As the sources' box_start, without the innermost."""
    if module is experts_down_wgmma:
        return 0, 0, 0, expert * (shape.hidden_size // 16) + part * (block_n // 16)
    return 0, 0, part * (block_n // (16 if shape.activation.is_gated else 8)), expert


# Decoder of cuda_src/common/decoded_weights.cuh, address by address.
LANES = np.arange(32)


def rows_of_lanes(warp, sixteen):
    return (warp + 4 * sixteen) * 16 + LANES // 16 * 8 + LANES % 8


def are_spread(places):
    """Whether every eight neighbouring lanes, which access memory together, reach all banks."""
    return all(len({*(eight // 16 % 8)}) == 8 for eight in places.reshape(4, 8))


@pytest.mark.parametrize("block_n", [128, 144, 160, 176, 192])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_a_stage_reach_the_places_that_products_read(bits, block_n):
    """From the places where the copy engine puts 64 bytes of each row, swizzled, to those of rows of 128 bytes; each
    eight codes once. A number here stands for eight codes, of which a row of a stage of codes has 128 / bits."""
    eights_of_row, packs, eights_of_pack = CODE_ROW_BYTES // bits, bits // 4, 4 * 4 // bits
    steps = eights_of_row // 8
    eights = np.arange(block_n * eights_of_row).reshape(block_n, eights_of_row)
    ring = {}
    for row, pack in product(range(block_n), range(4)):
        address = row * CODE_ROW_BYTES + pack * 16
        of_pack = eights[row, pack * eights_of_pack : (pack + 1) * eights_of_pack]
        ring[address ^ (address >> 7 & 3) << 4] = of_pack  # CU_TENSOR_MAP_SWIZZLE_64B
    for step in range(steps):
        stage = {}
        for warp, sixteen in product(range(4), range(-(-block_n // 64))):
            rows, half = rows_of_lanes(warp, sixteen), LANES // 8 % 2
            if rows[0] >= block_n:
                assert (rows >= block_n).all()
                continue
            to = rows * 128 + ((half * 4) ^ LANES % 8) * 16
            for pack in range(packs):
                places = ((step % steps * 2 + half) * packs + pack) ^ (LANES % 8 // 2)
                sources = rows * CODE_ROW_BYTES + places * 16
                assert are_spread(sources)
                for i in range(eights_of_pack):
                    destinations = to ^ (pack * eights_of_pack + i) * 16
                    assert are_spread(destinations)
                    for source, destination in zip(sources, destinations, strict=True):
                        assert destination not in stage
                        stage[destination] = ring[source][i]
        for row, pack in product(range(block_n), range(8)):
            assert stage[row * 128 + (pack ^ row % 8) * 16] == eights[row, step * 8 + pack]


def numbers(words, dtype):
    """The numbers of 16 bits in words of two, in float64."""
    halves = (words[..., None] >> PAIRS_OF_32_BITS & 0xFFFF).astype(np.uint16)
    return torch.from_numpy(halves.view(np.int16)).view(dtype).double()


def both(half):
    return half * 0x10001


def bits_of_eight(codes, words, dtype):
    """Pairs as code_pairs.cuh makes them, by masks and shifts, and what brings them to the codes' values: a sum or a
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
    bits = (pairs & 0x00080008) << 12 | (pairs & 0x00070007) << (exponent_at - 1)
    return numbers(bits, dtype) * 2.0 ** (bias - 1)


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
@pytest.mark.parametrize("cut", CUTS)
def test_compiles_for_other_models(cut, name):
    for sizes, activation, scale_dtype in (
        ((32, 2880, 2880), SWIGLUOAI, 0),
        ((8, 4096, 14336), SILU, -1),
        ((1024, 2048, 512), RELU2, 0),
    ):
        allowed = FORMATS[name].scale_dtypes
        codes = Codes(name, allowed[scale_dtype] if allowed else None)
        shape = tile_shape_of(
            *cut,
            torch.bfloat16,
            activation,
            *sizes,
            has_gate_up_bias=True,
            has_down_bias=True,
            gate_up_codes=codes,
            down_codes=codes,
        )
        for variant in (
            experts_up_wgmma.variant(shape),
            experts_up_wgmma.variant(replace(shape, keeps_gate_up=True)),
            experts_down_wgmma.variant(shape),
        ):
            report = compiled(variant, "sm_90a")
            assert report.spill_bytes <= 64, report.log
            assert "warning" not in report.log, report.log
            assert "C75" not in report.log, report.log
