"""How ``cuda_src/common/coded_tiles.cuh`` is set up for a quantised weight: its stages, and maps of what these hold."""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.expert_tiles import TileShape, shared_bytes_of_tiles
from cupymoe.kernels.load import Load
from cupymoe.kernels.stored_weight import StoredWeight
from cupymoe.kernels.tensor_map import tensor_map

BOX_SLOTS = 32
"""Token rows that the copy engine brings together."""
_MOST_BOX_ROWS = 256  # of the copy engine
SCALE_ROW_BYTES = 16
"""What a stage has of the scales of a row, and of its zero points."""


class Scales(NamedTuple):
    """What belongs to the codes of a quantised weight, as :class:`cupymoe.QuantizedWeight` keeps it; None where its
    format has none."""

    scales: torch.Tensor | None = None
    """``[E, n, G]``, rows of whole 16 bytes."""
    zeros: torch.Tensor | None = None
    """uint8 ``[E, n, G]``, rows of whole 16 bytes."""
    row_scales: torch.Tensor | None = None
    """float32 ``[E, n]``."""

    @property
    def row_scales_address(self) -> int:
        """0 where there are none."""
        return 0 if self.row_scales is None else self.row_scales.data_ptr()


@dataclass(frozen=True, eq=False)
class CodedTiling:
    """The ring of one GEMM."""

    slots: int
    """Most of a tile."""
    warpgroups: int
    """That multiply, 64 weight rows each."""
    registers: int
    """Of each thread of theirs."""
    code_row_bytes: int
    """What a stage has of the codes of a row."""
    block_k: int
    """Elements of k in a stage."""
    stages: int
    shared_bytes: int

    @property
    def threads(self) -> int:
        """Of a block: those that multiply, and four warps that fill the ring."""
        return (self.warpgroups + 1) * 128

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return self.warpgroups * 64

    def defines(self) -> tuple[str, ...]:
        """The macros of this tiling."""
        return (
            f"BLOCK_THREADS={self.threads}",
            f"WARPGROUPS={self.warpgroups}",
            f"CONSUMER_REGISTERS={self.registers}",
            f"TILE_SLOTS={self.slots}",
            f"CODE_ROW_BYTES={self.code_row_bytes}",
            f"BLOCK_K={self.block_k}",
            f"STAGES={self.stages}",
        )


class _Cut(NamedTuple):
    """How tiles of so many slots are computed: with fewer of them, sums take fewer registers, and more warps share the
    decoding."""

    warpgroups: int
    code_row_bytes: int
    """What a stage has of the codes of a row; 128 where these have 8 bits and no groups."""
    registers: int
    """Of each thread that multiplies; those that fill the ring have 40 or 56."""


# By the most slots of a tile. In int4 at Gemma 4's sizes on an H200 a call with 16 slots an expert takes 196 us by
# tiles of 32 slots, 210 with rows of 64 bytes, and 222 by tiles of 160; with 64 slots an expert by tiles of 96 it takes
# 316 us, 318 with rows of 64 bytes, and 334 by tiles of 160. At 4096 tokens int8 takes 858 us by rows of 128 bytes
# and 917 by 64, FP8 861 and 878 (benchmarks/NOTES.md).
_CUTS = {32: _Cut(6, 128, 72), 64: _Cut(5, 128, 88), 96: _Cut(4, 64, 104), 160: _Cut(3, 64, 152)}
SLOTS = (*_CUTS,)
"""The most of a tile, by :func:`coded_slots`."""
# The most slots of an expert, on average, that the first three serve: most experts have few enough for one tile then.
_MOST_MEAN_SLOTS = (20, 45, 72)


def coded_slots(load: Load) -> int:
    """The most slots of a tile of codes, the fastest for such a call; its bits do not depend on it."""
    return SLOTS[bisect.bisect_left(_MOST_MEAN_SLOTS, load.pairs_per_expert)]


@functools.cache
def coded_tiling(num_experts: int, stored: StoredWeight, slots: int) -> CodedTiling:
    """Tiles of so many slots, one of what :func:`coded_slots` chooses from, and as many stages as fit."""
    assert stored.format is not None
    warpgroups, code_row_bytes, registers = _CUTS[slots]
    if stored.format.bits == 8 and stored.format.group is None:
        code_row_bytes = 128  # half as many waits; not of FP8 with groups, whose products ptxas would serialise
    if _scale_bytes(stored, code_row_bytes) > SCALE_ROW_BYTES:
        code_row_bytes //= 2
    block_k = code_row_bytes * 8 // stored.format.bits
    row_bytes = code_row_bytes + SCALE_ROW_BYTES * (stored.has_scales + stored.has_zeros)
    stage_bytes = slots * block_k * 2 + warpgroups * 64 * row_bytes
    stages, shared_bytes = shared_bytes_of_tiles(stage_bytes, num_experts, HOPPER.shared_bytes_of_block)
    return CodedTiling(slots, warpgroups, registers, code_row_bytes, block_k, stages, shared_bytes)


def _scale_bytes(stored: StoredWeight, code_row_bytes: int) -> int:
    """Of the scales that belong to so many bytes of codes."""
    if stored.format is None or stored.format.group is None or stored.scale_dtype is None:
        return 0
    return code_row_bytes * 8 // stored.format.bits // stored.format.group * stored.scale_dtype.itemsize


class RowOrder(NamedTuple):
    """Which rows of a weight a box brings: where they are gate and up, as many of one and then of the other, of the
    same outputs."""

    halves: int = 1
    """2 where rows are gate and up, else 1."""
    interleaved: bool = False
    """Whether gate and up rows lie in turn."""


@functools.lru_cache(maxsize=4096)
def map_of_rows(
    address: int, shape: tuple[int, int, int], order: RowOrder, box_rows: int, box_bytes: int
) -> tuple[int, ...]:
    """The map of what every weight row has of bytes: ``shape`` is ``[E, rows, bytes of a row]``, a box ``box_bytes`` of
    each of ``box_rows`` rows, of either half."""
    num_experts, rows, row = shape
    of_half = rows // order.halves
    next_row, next_half = (2 * row, row) if order.interleaved else (row, of_half * row)
    return tensor_map(
        address,
        torch.uint8,
        sizes=(row, of_half, order.halves, 1, num_experts),
        strides=(next_row, next_half, rows * row, rows * row),
        box=(box_bytes, box_rows, order.halves, 1, 1),
    )


def coded_maps(codes: torch.Tensor, scales: Scales, order: RowOrder, tiling: CodedTiling) -> tuple[int, ...]:
    """The words of the maps of a quantised weight, of codes, scales and zero points, in the order of the kernels.

    Args:
        codes: uint8 ``[E, n, row bytes]``, contiguous and 16-byte aligned, as all of ``scales`` are.
        scales: what belongs to them.
        order: of the rows in a box.
        tiling: of the GEMM.
    """
    num_experts, rows, row_bytes = codes.shape
    boxes = -(-tiling.rows // order.halves // _MOST_BOX_ROWS)
    box_rows = tiling.rows // order.halves // boxes
    words = map_of_rows(codes.data_ptr(), (num_experts, rows, row_bytes), order, box_rows, tiling.code_row_bytes)
    for each in (scales.scales, scales.zeros):
        if each is not None:
            of_rows = num_experts, rows, each.shape[-1] * each.itemsize
            words += map_of_rows(each.data_ptr(), of_rows, order, box_rows, SCALE_ROW_BYTES)
    return words


def tiling_of(shape: TileShape, stored: StoredWeight) -> CodedTiling:
    """Of a GEMM with such a weight."""
    return coded_tiling(shape.num_experts, stored, shape.coded_slots)


def defines(shape: TileShape, stored: StoredWeight) -> tuple[str, ...]:
    """The macros of a GEMM with such a weight."""
    return *shape.defines(), *tiling_of(shape, stored).defines(), *stored.defines()
