"""How a weight is stored that the expert kernels read; ``cuda_src/common/weights`` has the codecs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from cupymoe.kernels.dtypes import SCALARS
from cupymoe.weights.format import DEPTH_MULTIPLE, PLAIN, WeightFormat, format_of

_CODECS = {"int4": "INT4", "int8": "INT8", "e4m3": "E4M3", "e2m1": "E2M1"}
"""What the sources call the codes that they read."""
# int4 times scales of 16 bits has more bits than bfloat16, and Hopper has one instruction that makes two fp16 of e4m3.
_FP16_CODES = ("int4", "e4m3")
_SCALE_SCALARS = {**SCALARS, torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}


@dataclass(frozen=True)
class StoredWeight:
    """One of the two weights of experts, as it lies in memory."""

    format: WeightFormat | None
    """None: a plain one, of the dtype of the hidden states."""
    scale_dtype: torch.dtype | None = None
    """Of the scales of groups, where the format has them."""

    @property
    def has_scales(self) -> bool:
        """Whether groups have scales."""
        return self.format is not None and self.format.group is not None

    @property
    def has_zeros(self) -> bool:
        """Whether groups have zero points."""
        return self.format is not None and self.format.has_zeros

    @property
    def maps(self) -> int:
        """Tensor maps of the weight: of codes, scales and zero points."""
        return 1 + self.has_scales + self.has_zeros

    @property
    def wants_fp16(self) -> bool:
        """Whether the tiles decode the weight to float16, which has more bits than bfloat16 or is faster to make, where
        the tokens can be float16, too."""
        return self.format is not None and self.format.codes in _FP16_CODES

    @property
    def _group_values(self) -> tuple[int, ...]:
        """Bytes of each of the values that a group of weights shares."""
        if self.format is None or self.scale_dtype is None:
            return ()
        return (self.scale_dtype.itemsize, 1) if self.format.has_zeros else (self.scale_dtype.itemsize,)

    def stage_row_bytes(self, block_k: int) -> int:
        """Of one row in a stage that is ``block_k`` deep, with what its groups share: WEIGHT_ROW_BYTES of the sources,
        and each GroupValues::kStageRowBytes."""
        if self.format is None:
            return block_k * 2
        return self.format.row_bytes(block_k) + sum(
            map(functools.partial(self._packs_bytes, block_k), self._group_values)
        )

    def _packs_bytes(self, block_k: int, size: int) -> int:
        assert self.format is not None
        assert self.format.group is not None
        groups, rest = divmod(block_k, self.format.group)
        of_groups = (groups if not rest else groups + 2) * size
        if not rest and of_groups % 16 == 0:
            return of_groups
        if not rest and 16 % of_groups == 0:
            return 16
        return (of_groups - size + 31) // 16 * 16

    def defines(self) -> tuple[str, ...]:
        """The macros of this weight."""
        if self.format is None:
            return ("WEIGHTS=PLAIN", "HAS_ROW_SCALES=0")
        return (
            f"WEIGHTS={_CODECS[self.format.codes]}",
            f"GROUP={self.format.group or 0}",
            f"SCALE_SCALAR={_SCALE_SCALARS[self.scale_dtype or torch.float32]}",
            f"HAS_ZEROS={int(self.format.has_zeros)}",
            f"HAS_ROW_SCALES={int(self.format.has_row_scales)}",
        )


PLAIN_WEIGHT = StoredWeight(None)


def turned_columns(columns: int) -> int:
    """Of a row of tokens as the tiles of quantised weights take it, see ``cuda_src/common/turned_rows.cuh``: as many as
    a row of codes has, with its padding."""
    return -(-columns // DEPTH_MULTIPLE) * DEPTH_MULTIPLE


def unsupported_reason(weight_format: str) -> str | None:
    """Why the expert kernels do not read a format, by its name; None if they do."""
    if weight_format == PLAIN or format_of(weight_format).codes in _CODECS:
        return None
    return f"its kernels read codes of {', '.join(_CODECS)}, not of {weight_format}"


@functools.cache
def stored_weight(weight_format: str, scale_dtype: torch.dtype | None = None) -> StoredWeight:
    """A weight of a format, by its name, whose scales of groups have a dtype; None where it has no such scales.

    Raises:
        ValueError: there is no such format, or its scales are never of that dtype.
    """
    if weight_format == PLAIN:
        return PLAIN_WEIGHT
    its_format = format_of(weight_format)
    if scale_dtype not in (its_format.scale_dtypes or (None,)):
        raise ValueError(f"scales of {weight_format} must be one of {its_format.scale_dtypes}, got {scale_dtype}")
    return StoredWeight(its_format, scale_dtype)
