"""What the tiles are told of a quantised weight: macros and maps of ``cuda_src/common/decoded_weights.cuh``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from cupymoe.kernels.dtypes import SCALARS
from cupymoe.weights.format import FORMATS, PLAIN

CODE_ROW_BYTES = 64
"""Of the codes of a row, in a stage of codes; a whole number of steps of ``expert_tiles.BLOCK_K``."""
SCALE_ROW_BYTES = 16
"""Of the scales of a row, and of its zero points."""

_CODECS = {"int4": "Int4", "int8": "Int8", "e4m3": "E4m3", "e2m1": "E2m1"}
_ROUNDED_CODES = ("int4", "e4m3")  # times scales of 8 bits and more; e2m1 times its scales of 8 bits fits
_SCALE_SCALARS = {**SCALARS, torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}


class Scales(NamedTuple):
    """What belongs to the codes of a quantised weight, as :class:`cupymoe.weights.QuantizedWeight` keeps it; None where
    its format has none."""

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


class Codes(NamedTuple):
    """How a projection's weight is stored; the default is plain, in the dtype of the rows that it multiplies."""

    format: str = PLAIN
    """A name of :data:`cupymoe.weights.FORMATS`, or ``PLAIN``."""
    scale_dtype: torch.dtype | None = None
    """Of the scales of groups, where the format has them."""

    @property
    def are_plain(self) -> bool:
        """Whether there are no codes."""
        return self.format == PLAIN

    @property
    def has_scales(self) -> bool:
        """Whether groups have scales."""
        return not self.are_plain and FORMATS[self.format].group is not None

    @property
    def has_zeros(self) -> bool:
        """Whether groups have zero points."""
        return not self.are_plain and FORMATS[self.format].has_zeros

    @property
    def rounds_bf16(self) -> bool:
        """Whether decoded weights have more bits than bfloat16, so that they are float16 where tokens can be."""
        return self.has_scales and FORMATS[self.format].codes in _ROUNDED_CODES

    @property
    def maps(self) -> int:
        """Tensor maps of the weight: of codes, scales and zero points."""
        return 1 + self.has_scales + self.has_zeros

    @property
    def row_bytes(self) -> int:
        """What a row takes in a stage of codes; 0 of a plain weight."""
        if self.are_plain:
            return 0
        return CODE_ROW_BYTES + SCALE_ROW_BYTES * (self.has_scales + self.has_zeros)

    def defines(self) -> tuple[str, ...]:
        """The macros of the codec; none of a plain weight."""
        if self.are_plain:
            return ()
        form = FORMATS[self.format]
        scale_scalar = _SCALE_SCALARS[torch.float32 if self.scale_dtype is None else self.scale_dtype]
        return (
            f"WEIGHT_CODEC={_CODECS[form.codes]}",
            f"WEIGHT_GROUP={form.group or 0}",
            f"SCALE_SCALAR={scale_scalar}",
            f"HAS_ZEROS={int(form.has_zeros)}",
            f"HAS_ROW_SCALES={int(form.has_row_scales)}",
        )


PLAIN_CODES = Codes()


def unsupported_reason(format: str) -> str | None:
    """Why the tiles don't decode weights of a format; None if they do, or if they are plain."""
    if format == PLAIN or FORMATS[format].codes in _CODECS:
        return None
    return f"the tiles decode {', '.join(sorted(_CODECS))}, not {FORMATS[format].codes}"


def coded_maps(
    codes: torch.Tensor, scales: Scales, map_of_rows: Callable[[int, int, int], tuple[int, ...]]
) -> tuple[int, ...]:
    """The words of the maps of a quantised weight, in the order in which the kernels take them.

    Args:
        codes: uint8 ``[E, n, row bytes]``, contiguous and 16-byte aligned, as all of ``scales`` are.
        scales: what belongs to them.
        map_of_rows: gives the map of the bytes at an address that are so many a row, in boxes of so many.
    """
    words = map_of_rows(codes.data_ptr(), codes.shape[-1], CODE_ROW_BYTES)
    for each in (scales.scales, scales.zeros):
        if each is not None:
            words += map_of_rows(each.data_ptr(), each.shape[-1] * each.itemsize, SCALE_ROW_BYTES)
    return words
