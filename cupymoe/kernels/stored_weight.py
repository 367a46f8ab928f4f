"""How a weight is stored that the kernels of the weight stream read; ``cuda_src/common/weights`` has the codecs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from cupymoe.kernels.dtypes import SCALARS
from cupymoe.weights.format import PLAIN, WeightFormat, format_of

_CODECS = {"int4": "INT4"}
"""What the sources call the codes that they read."""


@dataclass(frozen=True)
class StoredWeight:
    """One of the two weights of experts, as it lies in memory."""

    format: WeightFormat | None
    """None: a plain one, of the dtype of the hidden states."""
    scale_dtype: torch.dtype | None = None
    """Of the scales of groups, where the format has them."""

    @property
    def is_plain(self) -> bool:
        """Whether what is stored are the operands themselves."""
        return self.format is None

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
            return ("WEIGHTS=PLAIN",)
        macros = [f"WEIGHTS={_CODECS[self.format.codes]}"]
        if self.scale_dtype is not None:
            macros += [f"GROUP={self.format.group}", f"SCALE_SCALAR={SCALARS[self.scale_dtype]}"]
            macros += [f"HAS_ZEROS={int(self.format.has_zeros)}"]
        return tuple(macros)


PLAIN_WEIGHT = StoredWeight(None)


def unsupported_reason(weight_format: str) -> str | None:
    """Why the weight stream does not read a format, by its name; None if it does."""
    if weight_format == PLAIN or format_of(weight_format).codes in _CODECS:
        return None
    return f"the weight stream does not read {weight_format}"


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
