"""How ``cuda_src/common/coded_tiles.cuh`` is set up for a quantised weight: its stages, and maps of what these hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.expert_tiles import TileShape, shared_bytes_of_tiles
from cupymoe.kernels.stored_weight import StoredWeight
from cupymoe.kernels.tensor_map import tensor_map

THREADS = 512
TILE_SLOTS = 160
TILE_ROWS = 192
BOX_SLOTS = 32
"""Token rows that the copy engine brings together."""
CODE_ROW_BYTES = 64
"""What a stage has of the codes of a row."""
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

    block_k: int
    """Elements of k in a stage."""
    stages: int
    shared_bytes: int

    def defines(self) -> tuple[str, ...]:
        """The macros of this tiling."""
        return f"BLOCK_THREADS={THREADS}", f"BLOCK_K={self.block_k}", f"STAGES={self.stages}"


@functools.cache
def coded_tiling(num_experts: int, stored: StoredWeight) -> CodedTiling:
    """As many stages as fit."""
    assert stored.format is not None
    block_k = CODE_ROW_BYTES * 8 // stored.format.bits
    row_bytes = CODE_ROW_BYTES + SCALE_ROW_BYTES * (stored.has_scales + stored.has_zeros)
    stage_bytes = TILE_SLOTS * block_k * 2 + TILE_ROWS * row_bytes
    return CodedTiling(block_k, *shared_bytes_of_tiles(stage_bytes, num_experts, HOPPER.shared_bytes_of_block))


class RowOrder(NamedTuple):
    """Which rows of a weight a box brings: where they are gate and up, as many of one and then of the other, of the
    same outputs."""

    halves: int = 1
    """2 where rows are gate and up, else 1."""
    interleaved: bool = False
    """Whether gate and up rows lie in turn."""


@functools.lru_cache(maxsize=4096)
def map_of_rows(address: int, shape: tuple[int, int, int], order: RowOrder, box_bytes: int) -> tuple[int, ...]:
    """The map of what every weight row has of bytes: ``shape`` is ``[E, rows, bytes of a row]``, a box ``box_bytes`` of
    each of ``TILE_ROWS`` rows."""
    num_experts, rows, row = shape
    of_half = rows // order.halves
    next_row, next_half = (2 * row, row) if order.interleaved else (row, of_half * row)
    return tensor_map(
        address,
        torch.uint8,
        sizes=(row, of_half, order.halves, 1, num_experts),
        strides=(next_row, next_half, rows * row, rows * row),
        box=(box_bytes, TILE_ROWS // order.halves, order.halves, 1, 1),
    )


def coded_maps(codes: torch.Tensor, scales: Scales, order: RowOrder) -> tuple[int, ...]:
    """The words of the maps of a quantised weight, of codes, scales and zero points, in the order of the kernels.

    Args:
        codes: uint8 ``[E, n, row bytes]``, contiguous and 16-byte aligned, as all of ``scales`` are.
        scales: what belongs to them.
        order: of the rows in a box.
    """
    num_experts, rows, row_bytes = codes.shape
    words = map_of_rows(codes.data_ptr(), (num_experts, rows, row_bytes), order, CODE_ROW_BYTES)
    for each in (scales.scales, scales.zeros):
        if each is not None:
            of_rows = num_experts, rows, each.shape[-1] * each.itemsize
            words += map_of_rows(each.data_ptr(), of_rows, order, SCALE_ROW_BYTES)
    return words


def defines(shape: TileShape, stored: StoredWeight) -> tuple[str, ...]:
    """The macros of a GEMM with such a weight."""
    return *shape.defines(), *coded_tiling(shape.num_experts, stored).defines(), *stored.defines()
