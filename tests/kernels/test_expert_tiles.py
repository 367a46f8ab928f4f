"""The tiles without a GPU: rings, bounds, and the order in which the maps bring weight rows."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.kernels import expert_tiles, experts_down_back_wgmma, experts_down_wgmma, experts_up_wgmma
from cupymoe.kernels.expert_tiles import CUTS, prefers_tiles, tile_shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.unsorted_pairs import PairsKind
from tests.helpers import compiled

SHARED_BYTES_OF_HOPPER = 227 * 1024
STAGES_AT_LEAST = 3

# (experts, hidden, intermediate): Gemma 4 and its slices, Qwen3, Mixtral, many experts, and sizes that divide badly.
SIZES = [
    (128, 2816, 704),
    (128, 2816, 352),
    (128, 2816, 176),
    (128, 2048, 768),
    (8, 4096, 14336),
    (1024, 2048, 512),
    (60, 256, 88),
    (5, 272, 72),
    (3, 16, 8),
]


UNSORTED = PairsKind(torch.int64, 8)
SILU, SWIGLUOAI, RELU2 = MoEActivation.SILU, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL


def shape(
    cut,
    num_experts,
    hidden,
    intermediate,
    dtype=torch.bfloat16,
    *,
    activation=SILU,
    transposed=False,
    has_bias=False,
    few_pairs=0,
    unsorted=None,
):
    """Of which both weights are transposed, or neither, and both have a bias, or neither."""
    kind = (transposed, transposed, has_bias, has_bias)
    few = {"few_pairs": few_pairs, "unsorted": unsorted}
    return tile_shape_of(*cut, dtype, activation, num_experts, hidden, intermediate, *kind, **few)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("cut", "few_pairs", "unsorted"),
    [
        *((cut, 0, None) for cut in CUTS),
        *(((1, 2), few, unsorted) for few, unsorted in product((1, 8, 64), (None, UNSORTED))),
        ((1, 2), 0, UNSORTED),
    ],
)
def test_rings_fit_a_multiprocessor(cut, few_pairs, unsorted, sizes):
    its_shape = shape(cut, *sizes, few_pairs=few_pairs, unsorted=unsorted)
    for tiling in (its_shape.up, its_shape.down):
        assert tiling.shared_bytes <= SHARED_BYTES_OF_HOPPER
        assert tiling.stages >= STAGES_AT_LEAST
        blocks, products = tiling.blocks, tiling.products
        stage_bytes = (128 * products // blocks + blocks * tiling.block_n) * 128
        assert stage_bytes % 1024 == 0
        shared_struct = 16 * tiling.stages + 64 + 8 * (sizes[0] + 1) + (8 * 128 if unsorted else 0)
        assert tiling.shared_bytes >= tiling.stages * stage_bytes + shared_struct
        assert tiling.shared_bytes + stage_bytes > SHARED_BYTES_OF_HOPPER


def assert_compiles(its_shape):
    for variant in (
        experts_up_wgmma.variant(its_shape),
        experts_up_wgmma.variant(replace(its_shape, keeps_gate_up=True)),
        experts_down_wgmma.variant(its_shape),
        experts_down_wgmma.variant(its_shape.up_back),
        experts_down_back_wgmma.variant(its_shape, stores_weighted=True),
    ):
        assert_compiled(variant)


def assert_compiled(variant):
    """Few spills are in the activation, outside the loop over k; a warning would be of serialised products."""
    report = compiled(variant, "sm_90a")
    assert report.spill_bytes <= 64, report.log
    assert "warning" not in report.log, report.log
    assert "C75" not in report.log, report.log


@pytest.mark.slow
@pytest.mark.parametrize(("cut", "sizes"), [*product(CUTS, SIZES)])
def test_compiles_for_other_models(cut, sizes):
    for dtype in (torch.bfloat16, torch.float16):
        assert_compiles(shape(cut, *sizes, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("few_pairs", [1, 8, 64])
@pytest.mark.parametrize("sizes", SIZES)
def test_compiles_for_few_tokens(sizes, few_pairs):
    assert_compiles(shape((1, 2), *sizes, few_pairs=few_pairs))


@pytest.mark.slow
@pytest.mark.parametrize("few_pairs", [0, 1, 8])
@pytest.mark.parametrize("sizes", SIZES)
def test_compiles_for_pairs_that_are_not_sorted(sizes, few_pairs):
    its_shape = shape((1, 2), *sizes, few_pairs=few_pairs, unsorted=UNSORTED)
    for variant in (experts_up_wgmma.variant(its_shape), experts_down_wgmma.variant(its_shape)):
        assert_compiled(variant)


# GPT-OSS, and sizes that divide badly.
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(32, 2880, 2880), (5, 272, 72)])
@pytest.mark.parametrize("activation", [SILU, SWIGLUOAI, RELU2])
@pytest.mark.parametrize("cut", CUTS)
def test_compiles_for_every_kind_of_experts(cut, activation, sizes):
    for transposed, has_bias in product((False, True), repeat=2):
        assert_compiles(shape(cut, *sizes, activation=activation, transposed=transposed, has_bias=has_bias))


@pytest.mark.parametrize(
    ("cut", "multiprocessors", "blocks"), [((1, 2), 131, 131), ((2, 2), 132, 132), ((2, 2), 131, 130)]
)
def test_the_grid_is_whole_clusters(monkeypatch, cut, multiprocessors, blocks):
    card = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert expert_tiles.grid(0, shape(cut, *SIZES[0]).up.blocks) == (blocks, 1)


def test_two_products_pad_nothing_of_gemma_4():
    for blocks in (1, 2):
        gemma = shape((blocks, 2), 128, 2816, 704)
        assert 2 * 704 % (blocks * gemma.up.block_n) == 0
        assert 2816 % (gemma.down.blocks * gemma.down.block_n) == 0


def test_few_experts_get_tiles_that_fill_their_waves():
    """One of eight ranks of Gemma 4: 176 tiles of 128 rows would take two waves of 132 multiprocessors."""
    rank = Load.of(4096, 8, 16, 128)
    assert (expert_tiles.cut(rank, 704), expert_tiles.cut(Load.of(4096, 8, 128), 704)) == ((2, 2), (1, 3))
    of_rank, of_all = shape((2, 2), 16, 2816, 704).up, shape((2, 2), 128, 2816, 704).up
    assert (of_rank.block_n, of_all.block_n) == (144, 176)


def test_the_down_projection_has_a_cut_of_its_own():
    """By its depth: a tensor-parallel slice, Gemma 4, GLM 4.5 Air, Mixtral."""
    cuts = {cut: [expert_tiles.down_cut(cut, size, False) for size in (352, 704, 1408, 14336)] for cut in CUTS}
    assert cuts == {
        (2, 2): [(2, 3), (2, 2), (1, 2), (2, 2)],
        (1, 3): [(2, 3), (1, 3), (1, 3), (1, 3)],
        (1, 2): [(1, 2), (1, 2), (1, 2), (1, 2)],
    }
    assert [shape((2, 2), *sizes).down.block_n for sizes in ((128, 2816, 704), (8, 4096, 14336))] == [176, 192]


def test_bounds_are_those_that_were_measured():
    """At 128 experts and 8 choices."""
    assert [prefers_tiles(Load.of(tokens, 8, 128)) for tokens in (256, 383, 384, 1024)] == [False, False, True, True]
    of_codes = [prefers_tiles(Load.of(tokens, 8, 128), has_codes=True) for tokens in (128, 255, 256, 512)]
    assert of_codes == [False, False, True, True]
    assert [expert_tiles.cut(Load.of(tokens, 8, 128), 704) for tokens in (512, 3839)] == [(1, 2)] * 2
    assert [expert_tiles.cut(Load.of(tokens, 8, 128), 704) for tokens in (3840, 5887)] == [(1, 3)] * 2
    assert [expert_tiles.cut(Load.of(tokens, 8, 128), 704) for tokens in (5888, 32768)] == [(2, 2)] * 2


def test_a_batch_is_cut_for_few_rows_and_where_there_may_be_many_for_these_too():
    """The bound is that of other calls; of one rank of eight the second cut is another, as of these."""
    cuts = [expert_tiles.batch_cuts(Load.of(128 * room, 1, 128), 704) for room in (32, 239, 240, 368, 8192)]
    assert cuts == [((1, 2),)] * 2 + [((1, 2), (1, 3))] * 3
    assert expert_tiles.batch_cuts(Load.of(16 * 1024, 1, 16), 704) == ((1, 2), (2, 2))
    most, many = (Load.of(128 * (expert_tiles.MANY_SLOTS - less), 1, 128) for less in (1, 0))
    assert (expert_tiles.cut(most, 704), expert_tiles.cut(many, 704)) == expert_tiles.batch_cuts(many, 704)


def rows_of_box(tensor_map, start, row_bytes):
    """The tensor's rows in the order in which the box at these coordinates, but for the innermost, brings them."""
    sizes, strides, box = tensor_map
    rows = []
    for indices in product(*map(range, reversed(box[1:]))):
        coordinates = [first + index for first, index in zip(start, reversed(indices), strict=True)]
        inside = all(coordinate < size for coordinate, size in zip(coordinates, sizes[1:], strict=True))
        offset = sum(coordinate * stride for coordinate, stride in zip(coordinates, strides, strict=True))
        assert offset % row_bytes == 0
        rows.append(offset // row_bytes if inside else None)
    return rows


@pytest.fixture
def maps(monkeypatch):
    """What the launchers ask of the driver, which is not there."""

    def described(address, dtype, sizes, strides, box):
        assert all(stride % 16 == 0 for stride in strides)
        assert max(box) <= 256
        assert box[0] * dtype.itemsize == 128
        return sizes, strides, box

    for module in (experts_up_wgmma, experts_down_wgmma):
        monkeypatch.setattr(module, "tensor_map", described)
    return {
        "up": experts_up_wgmma._gate_up_map.__wrapped__,
        "down": experts_down_wgmma._down_map.__wrapped__,
    }


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("activation", [SILU, SWIGLUOAI])
def test_gate_and_up_rows_come_in_turn(maps, activation, cut, sizes):
    """Eight of gate and the up of the same columns, whether these are I rows on or the next ones."""
    its_shape = shape(cut, *sizes, activation=activation)
    _, hidden, intermediate = sizes
    block_n, expert = its_shape.up.block_n, sizes[0] - 1
    for part in range(-(-2 * intermediate // block_n)):
        rows = rows_of_box(maps["up"](0, its_shape, hidden), (0, 0, part * (block_n // 16), expert), 2 * hidden)
        expected = []
        for eight in range(part * (block_n // 16), (part + 1) * (block_n // 16)):
            for half in range(2):
                for column in range(8 * eight, 8 * eight + 8):
                    row = 2 * column + half if activation.is_interleaved else half * intermediate + column
                    expected.append(2 * expert * intermediate + row if column < intermediate else None)
        assert rows == expected


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cut", CUTS)
def test_rows_of_ungated_experts_come_as_they_lie(maps, cut, sizes):
    its_shape = shape(cut, *sizes, activation=RELU2)
    _, hidden, intermediate = sizes
    block_n, expert = its_shape.up.block_n, sizes[0] - 1
    for part in range(-(-intermediate // block_n)):
        rows = rows_of_box(maps["up"](0, its_shape, hidden), (0, 0, part * (block_n // 8), expert), 2 * hidden)
        columns = range(part * block_n, (part + 1) * block_n)
        assert rows == [expert * intermediate + column if column < intermediate else None for column in columns]


def check_transposed_box(tensor_map, columns, depth, halves, num_experts):
    """Of the last expert, boxes of 64 k and 64 columns: of a single matrix, or the same of both halves side by side."""
    expert, row_bytes = num_experts - 1, 2 * columns * halves
    sizes, strides, box = tensor_map
    assert (sizes[0], box[0]) == (columns, 64)
    for k in (0, (depth - 1) // 64 * 64):
        lines = rows_of_box((sizes, strides, box), (k, 0, 0, expert), 2 * columns)
        expected = []
        for half in range(halves):
            for line in range(k, k + 64):
                expected.append((expert * depth + line) * halves + half if line < depth else None)
        assert lines == expected
    assert strides[0] == row_bytes


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("activation", [SILU, SWIGLUOAI, RELU2])
def test_boxes_of_transposed_weights(maps, activation, cut, sizes):
    its_shape = shape(cut, *sizes, activation=activation, transposed=True)
    num_experts, hidden, intermediate = sizes
    halves = 2 if activation is SILU else 1
    columns = activation.input_size(intermediate) // halves
    check_transposed_box(maps["up"](0, its_shape, hidden), columns, hidden, halves, num_experts)
    check_transposed_box(maps["down"](0, its_shape, intermediate), hidden, intermediate, 1, num_experts)
    assert its_shape.up.block_n % (64 * halves) == 0
    assert its_shape.down.block_n % 64 == 0


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("cut", CUTS)
def test_down_rows_come_so_that_a_lane_has_four_neighbours(maps, cut, sizes):
    """A lane q has the sums of rows 8 j + 2 q and the next of each product j = 0, 1 of sixteen rows."""
    its_shape = shape(cut, *sizes)
    num_experts, hidden, intermediate = sizes
    block_n, expert = its_shape.down.block_n, num_experts - 1
    for part in range(-(-hidden // block_n)):
        start = (0, 0, 0, expert * (hidden // 16) + part * (block_n // 16))
        rows = rows_of_box(maps["down"](0, its_shape, intermediate), start, 2 * intermediate)
        for sixteen in range(block_n // 16):
            first = expert * hidden + part * block_n + 16 * sixteen
            for quad in range(4):
                of_lane = [rows[16 * sixteen + 8 * j + 2 * quad + i] for j in range(2) for i in range(2)]
                inside = first < num_experts * hidden
                assert of_lane == [first + 4 * quad + i if inside else None for i in range(4)]
