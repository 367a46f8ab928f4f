"""How ``cuda_src/common/expert_tiles.cuh`` is set up for a call: clusters, tiles and the rings of both GEMMs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cupymoe.activation import MoEActivation
from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.load import Load
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT, StoredWeight, turned_columns
from cupymoe.kernels.tensor_map import tensor_map
from cupymoe.kernels.unsorted_pairs import MAX_PAIRS, PairsKind

THREADS = 384
BLOCK_K = 64
"""Elements of k in a stage: rows of 128 bytes."""
BOX_COLUMNS = 64
"""Columns of a transposed weight that the copy engine brings together: 128 bytes."""

_UNIT_SLOTS = 128
_ROW_BYTES = 128
# Weight rows of a product, by the number of products that a warpgroup then has registers for; and what each row costs
# against one of 176, but for those that only fill up the last tile and the last wave.
_WIDTHS = {2: (176, 192, 160, 144, 128), 3: (128,)}
_ROW_COSTS = {192: 1.02, 176: 1.0, 160: 1.02, 144: 1.02, 128: 1.02, 96: 1.02}
# Where so few pairs are kept that almost each hits another expert, the tiles of these fill few waves, and with one
# token of Gemma 4's not half of one: narrow tiles are then for more multiprocessors. Not yet measured.
_FEW_PAIRS = 64
_WIDTHS_OF_FEW = (176, 192, 160, 144, 128, 96)
# Tiles that an expert's slots take where a cut is the fastest; a second one of few slots counts as a quarter.
_SLOT_TILES = {(1, 2): 1.0, (1, 3): 1.0, (2, 2): 2.25}
_MULTIPROCESSORS = 132
# From so many slots an expert on average, tiles beat the weight stream, or lose less to it on one card than they win on
# the other: at Gemma 4's sizes 24 slots take 543 us here and 539 there on an H100, and some 380 and 412 on an H200; 16
# take 533 and 522, and 379 and 376; 32 take 551 and 552 on an H100 (benchmarks/NOTES.md).
_TILES_FROM = 24
# The same where a weight is codes. In int4 at Gemma 4's sizes on an H200 8 slots take 208 us here and 178 there, 16
# take 214 and 228, 32 take 251 and 368, here without what sums the experts' outputs (benchmarks/NOTES.md).
_TILES_FROM_OF_CODES = 16
# (slots of an expert on average, blocks of a cluster, products of a warpgroup), the fastest from so many slots on for
# the gate_up projection. Around 256 half of the experts have a few slots too many for one tile of two products. In us,
# for (1, 2), (1, 3) and (2, 2): 224 slots take 795, 853 and 792; 256 take 1020, 907 and 1019; 320 take 1268, 1063 and
# 1248; 384 take 1340, 1360 and 1346; 512 take 1691, 1745 and 1659 (benchmarks/NOTES.md).
_CUTS_FROM = ((368, 2, 2), (240, 1, 3), (0, 1, 2))
CUTS = tuple(cut[1:] for cut in _CUTS_FROM)
"""Blocks of a cluster and products of a warpgroup, wherever they are the fastest for the gate_up projection."""
MANY_SLOTS = _CUTS_FROM[-2][0]
"""Slots of an expert on average, from which on a batch is not cut as one of few rows."""
# Of intermediate sizes, which are the depth of the down projection. Below the first its stores take most of the time,
# and two blocks store wider rows.
_SHALLOW = 512
# From the first of these to the second, one block is faster than two where an expert has many slots. Of a transposed
# weight two blocks with three products are: on an H200 the way back through gate_up at Gemma 4's sizes and 16384 tokens
# takes 1694 to 1740 us, with one block 1804 to 1880.
_LONE_FROM, _LONE_UP_TO = 1024, 8192
# Weight rows of the down projection's products, by its cut; of a cut that is not here, best_width chooses.
_DOWN_BACK_WIDTH = 128  # leaves the registers that its epilogue loads gate_up into
_DOWN_WIDTHS = {(1, 2): 128, (1, 3): 128, (2, 3): 128}


def prefers_tiles(load: Load, *, has_codes: bool = False) -> bool:
    """Whether a call, where ``has_codes`` with a quantised weight, is faster here than in
    :mod:`cupymoe.kernels.expert_stream`."""
    return load.pairs_per_expert >= (_TILES_FROM_OF_CODES if has_codes else _TILES_FROM)


def cut(load: Load, intermediate_size: int) -> tuple[int, int]:
    """Blocks of a cluster and products of a warpgroup for the gate_up projection; the fastest that were measured.

    Waves are counted for two weight rows of each output, also where experts are not gated.
    """
    chosen = next((blocks, products) for slots, blocks, products in _CUTS_FROM if load.pairs_per_expert >= slots)
    if chosen == (1, 3):
        waves = load.num_experts * -(-2 * intermediate_size // 128) / _MULTIPROCESSORS
        if 1 < waves < 1.6:  # the second would leave most multiprocessors idle
            return 2, 2
    return chosen


def batch_cuts(load: Load, intermediate_size: int) -> tuple[tuple[int, int], ...]:
    """The same for a batch, of which the host knows only how many rows there is room for: the cut for few rows, and
    where there is room for :data:`MANY_SLOTS` of an expert the one for so many, too.

    That serves all greater numbers: at 512 it takes 5% longer than the next one, which at 256 takes 12% longer than it,
    and a third launch of each projection would cost those of fewer rows more.
    """
    few, many = (
        cut(load._replace(expected_pairs=slots * load.num_experts), intermediate_size) for slots in (0, MANY_SLOTS)
    )
    return (few, many) if load.pairs_per_expert >= MANY_SLOTS else (few,)


def down_cut(gate_up_cut: tuple[int, int], intermediate_size: int, transposed: bool) -> tuple[int, int]:
    """The same for the down projection, given the gate_up projection's."""
    if gate_up_cut == (1, 2):
        return 1, 2
    if intermediate_size < _SHALLOW:
        return 2, 3
    is_lone = gate_up_cut == (2, 2) and _LONE_FROM <= intermediate_size <= _LONE_UP_TO
    if is_lone:
        return (2, 3) if transposed else (1, 2)
    return gate_up_cut


def down_back_cut(gate_up_cut: tuple[int, int]) -> tuple[int, int]:
    """The same for the way back through the down projection, whose epilogue needs the registers of a third product."""
    return (2, 2) if gate_up_cut == (1, 3) else gate_up_cut


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tiles of one GEMM."""

    blocks: int
    """Of a cluster."""
    products: int
    """Of a warpgroup: the most times 64 slots that it multiplies in a tile."""
    block_n: int
    """Weight rows that a block loads of a tile, and that each product multiplies."""
    stages: int
    shared_bytes: int

    def defines(self) -> tuple[str, ...]:
        """The macros of this tiling."""
        return (
            f"BLOCK_THREADS={THREADS}",
            f"BLOCKS={self.blocks}",
            f"PRODUCTS={self.products}",
            f"BLOCK_N={self.block_n}",
            f"BLOCK_K={BLOCK_K}",
            f"STAGES={self.stages}",
        )


def shared_bytes_of_tiles(stage_bytes: int, num_experts: int, most: int, inline_pairs: int = 0) -> tuple[int, int]:
    """How many stages fit, and the shared memory of a block with them: the ring and struct Shared."""
    barrier_bytes, tile_bytes = 16, 64 + 8 * (num_experts + 1 + inline_pairs)  # of a stage; struct Shared without these
    stages = (most - tile_bytes - 16) // (stage_bytes + barrier_bytes)
    return stages, -(-(stages * (stage_bytes + barrier_bytes) + tile_bytes) // 16) * 16


@functools.cache
def tiling(blocks: int, products: int, block_n: int, num_experts: int, inline_pairs: int = 0) -> Tiling:
    """Tiles of ``block_n`` weight rows a block, and as many stages as fit beside the plan of so many pairs."""
    stage_bytes = (_UNIT_SLOTS * products // blocks + blocks * block_n) * _ROW_BYTES
    most = HOPPER.shared_bytes_of_block
    return Tiling(blocks, products, block_n, *shared_bytes_of_tiles(stage_bytes, num_experts, most, inline_pairs))


def few_pairs(load: Load) -> int:
    """The kept pairs of a call, up to a power of two, where these are so few that each may hit another expert; else
    0."""
    return 1 << (load.expected_pairs - 1).bit_length() if 0 < load.expected_pairs <= _FEW_PAIRS else 0


@functools.cache
def best_width(
    blocks: int, products: int, rows: int, num_experts: int, box_rows: int, widths: tuple[int, ...] | None = None
) -> int:
    """Weight rows of a product, those that pad least: ``rows`` of each expert to whole tiles, and these to whole waves.

    A width is a multiple of ``box_rows``, which are what the copy engine brings together, and one of ``widths``; None:
    those that a warpgroup has registers for.
    """

    def cost(width: int) -> float:
        tile_rows = blocks * width
        tiles = -(-rows // tile_rows) * num_experts * _SLOT_TILES[blocks, products]
        waves = math.ceil(tiles / (_MULTIPROCESSORS // blocks))
        return waves * tile_rows * _ROW_COSTS[width]

    return min((width for width in widths or _WIDTHS[products] if width % box_rows == 0), key=cost)


@dataclass(frozen=True, eq=False)
class TileShape:
    """What the kernels of a call are compiled for; :func:`tile_shape_of` gives one object for one shape."""

    blocks: int
    """Of a cluster that computes the gate_up projection, see :func:`cut`."""
    products: int
    dtype: torch.dtype
    activation: MoEActivation
    num_experts: int
    hidden_size: int
    intermediate_size: int
    gate_up_transposed: bool = False
    """Whether gate_up_proj is ``[E, H, 2 I]`` in memory, and not ``[E, 2 I, H]``."""
    down_transposed: bool = False
    """Whether down_proj is ``[E, I, H]`` in memory, and not ``[E, H, I]``."""
    has_gate_up_bias: bool = False
    has_down_bias: bool = False
    keeps_gate_up: bool = False
    """Whether the gate_up projection also stores what the activation is applied to."""
    gate_up_rank: int = 0
    """Of an adapter of gate_up_proj, a multiple of 16; 0 without one."""
    down_rank: int = 0
    gate_up_stored: StoredWeight = PLAIN_WEIGHT
    """How gate_up_proj is stored; a quantised weight is never transposed."""
    down_stored: StoredWeight = PLAIN_WEIGHT
    scatters: bool = False
    """Whether the down projection stores each slot's output in the slot's row of a batch, and not in slot order."""
    few_pairs: int = 0
    """How many experts of plain weights are hit, where these are few, see :func:`few_pairs`; else 0."""
    coded_slots: int = 160
    """The most slots of a tile of a quantised weight, see :func:`cupymoe.kernels.coded_tiles.coded_slots`."""
    unsorted: PairsKind | None = None
    """Of pairs that the projections put in order themselves, see :mod:`cupymoe.kernels.unsorted_pairs`; else None."""

    @property
    def scales_tokens(self) -> bool:
        """Whether the gate_up projection multiplies narrowed rows, see :mod:`cupymoe.kernels.operand_rows`."""
        return self.dtype == torch.bfloat16 and self.gate_up_stored.wants_fp16

    @property
    def turns_intermediate(self) -> bool:
        """Whether the gate_up projection stores its output turned: both weights are quantised. Where down_proj alone
        is, the rows are turned between the projections."""
        return self.gate_up_stored.format is not None and self.down_stored.format is not None

    @property
    def intermediate_columns(self) -> int:
        """Of the gate_up projection's output."""
        return turned_columns(self.intermediate_size) if self.turns_intermediate else self.intermediate_size

    @property
    def gate_up_rows(self) -> int:
        """Weight rows of an expert's gate_up projection."""
        return self.activation.input_size(self.intermediate_size)

    @property
    def gate_up_halves(self) -> int:
        """2 where all gate rows come before all up rows, else 1."""
        return 2 if self.activation.is_gated and not self.activation.is_interleaved else 1

    @property
    def up(self) -> Tiling:
        """Of the gate_up projection with a plain weight."""
        cut = self.blocks, self.products
        box_rows = BOX_COLUMNS * self.gate_up_halves if self.gate_up_transposed else 16
        width = self._width_of_few(cut, self.gate_up_rows, box_rows)
        width = width or best_width(*cut, self.gate_up_rows, self.num_experts, box_rows)
        return tiling(*cut, width, self.num_experts, self._inline_pairs)

    @property
    def down(self) -> Tiling:
        """Of the down projection with a plain weight."""
        cut = down_cut((self.blocks, self.products), self.intermediate_size, self.down_transposed)
        box_rows = BOX_COLUMNS if self.down_transposed else 16
        width = self._width_of_few(cut, self.hidden_size, box_rows) or _DOWN_WIDTHS.get(cut)
        width = width or best_width(*cut, self.hidden_size, self.num_experts, box_rows)
        return tiling(*cut, width, self.num_experts, self._inline_pairs)

    @property
    def _inline_pairs(self) -> int:
        return 0 if self.unsorted is None else MAX_PAIRS

    def _width_of_few(self, cut: tuple[int, int], rows: int, box_rows: int) -> int:
        """Of a projection, where the experts that are hit are few; else 0."""
        if not self.few_pairs or cut != (1, 2):
            return 0
        return best_width(*cut, rows, min(self.few_pairs, self.num_experts), box_rows, _WIDTHS_OF_FEW)

    @property
    def up_back(self) -> TileShape:
        """Of the way back through the gate_up projection: a down projection as deep as gate_up has rows, on the
        transposed weight."""
        return tile_shape_of(
            self.blocks,
            self.products,
            self.dtype,
            self.activation,
            self.num_experts,
            self.hidden_size,
            self.gate_up_rows,
            down_transposed=not self.gate_up_transposed,
            down_rank=self.gate_up_rank,
        )

    @property
    def down_back(self) -> Tiling:
        """Of the way back through the down projection."""
        return tiling(*down_back_cut((self.blocks, self.products)), _DOWN_BACK_WIDTH, self.num_experts)

    def defines(self) -> tuple[str, ...]:
        """The macros that the GEMMs share."""
        return (
            f"SCALAR={SCALARS[self.dtype]}",
            f"NUM_EXPERTS={self.num_experts}",
            f"HIDDEN={self.hidden_size}",
            f"INTERMEDIATE={self.intermediate_size}",
            *(() if self.unsorted is None else self.unsorted.defines()),
        )


tile_shape_of = functools.cache(TileShape)


class AdapterStep(NamedTuple):
    """What the tiles add to a product for an adapter: ``low @ factor[e].T``, before anything is rounded."""

    low: torch.Tensor
    """``[T * K, R]`` of ``lora_shrink``, in expert order."""
    factor: torch.Tensor
    """``[E, rows, R]``, 16-byte aligned; contiguous or transposed, as the weight is."""


def slot_map(rows: torch.Tensor, box_rows: int = 64) -> tuple[int, ...]:
    """Of rows in expert order; boxes of so many of them and ``BLOCK_K`` columns."""
    slots, columns = rows.shape
    row = columns * rows.element_size()
    return tensor_map(rows.data_ptr(), rows.dtype, (columns, slots), (row,), (BLOCK_K, box_rows))


def transposed_boxes(
    num_experts: int, depth: int, rows: int, halves: int, itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sizes, strides and box of the map of a transposed weight, ``[E, depth, rows]`` in memory.

    A box is ``BLOCK_K`` of the depth and 64 rows, which are columns in memory; of two halves, the same 64 of each.
    """
    expert = depth * rows * itemsize
    half = rows // halves
    return (
        (half, depth, halves, 1, num_experts),
        (rows * itemsize, half * itemsize, expert, expert),
        (BOX_COLUMNS, BLOCK_K, halves, 1, 1),
    )


def grid(device: int, blocks: int = 1) -> tuple[int, int]:
    """One block on each multiprocessor, in whole clusters of so many ``blocks``."""
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return count // blocks * blocks, 1
