"""The formats of quantised weights: what the codes mean, and which factors belong to them.

A weight ``[E, n, k]`` (rows are outputs, k is the depth) in a format is exactly

    w[e, r, c] = (value(code[e, r, c]) - zero[e, r, c // group]) * scale[e, r, c // group] * row_scale[e, r]

where zero, scale and row_scale are there or not, as the format says. Every published format of experts' weights can be
written so: a scale of a tensor, or of a block of rows, is repeated to its rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

PLAIN = "plain"
"""The name that weights of 16 bits and more have where a quantised one has its format's."""

DEPTH_MULTIPLE = 32
"""The depth of a row is padded to a multiple of this, so that a row of any format is whole 16-byte packs."""


class Field(NamedTuple):
    """Some bits of a code, and where they lie in its word."""

    code: int
    """Which of the neighbouring codes of the word."""
    first_bit: int
    """Of the code."""
    bits: int
    place: int
    """Of the first bit in the word; bit 0 is the lowest."""


class Codec(NamedTuple):
    """What the codes of a format stand for, and how they lie in memory."""

    bits: int
    values: tuple[float, ...]
    """The value of every code; exact in float32."""
    fields: tuple[Field, ...]
    """Of a 4-byte little-endian word of neighbouring codes: together all of its bits."""
    layout: int = 1
    """Counts the fields that this codec has had; what is saved says it, so that no codes are read by other fields."""

    @property
    def codes_of_word(self) -> int:
        """How many neighbouring codes a word holds."""
        return 32 // self.bits


def _float_values(dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).tolist())


def _fields(of_pairs: tuple[tuple[tuple[int, int, int, int], ...], ...]) -> tuple[Field, ...]:
    """Of a word whose pairs of neighbours lie 16 bits apart, so that a mask and a shift of it is a pair, as the
    kernels' products of 16-bit numbers take it: for each pair ``(first_bit, bits, place of the even code, of the
    odd)``."""
    return tuple(
        Field(2 * pair + odd, first_bit, bits, places[odd])
        for pair, of_pair in enumerate(of_pairs)
        for first_bit, bits, *places in of_pair
        for odd in (0, 1)
    )


_NIBBLES = _fields(tuple(((0, 4, 4 * pair, 16 + 4 * pair),) for pair in range(4)))
_BYTES = _fields(tuple(((0, 8, 8 * pair, 16 + 8 * pair),) for pair in range(2)))
# A bfloat16 has its sign at bit 15, the lowest two bits of its exponent at 8 and 7, and the highest of its mantissa
# at 6. There a mask finds pair 0 as it lies, pair 1 shifted up by 6, and pair 2 turned down by 4, whose signs come from
# the other half. Pair 3 has what is left: shifted up by 2, but for a bit that is 6 too high.
_FLOATS = _fields(
    (
        ((0, 3, 6, 22), (3, 1, 15, 31)),
        ((0, 3, 0, 16), (3, 1, 9, 25)),
        ((0, 3, 10, 26), (3, 1, 19, 3)),
        ((0, 2, 4, 20), (2, 1, 14, 30), (3, 1, 13, 29)),
    )
)

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Of bitsandbytes: its float32 numbers, as the shortest decimals that give them.
_NF4 = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip

CODECS = {
    "int4": Codec(4, tuple(float(code - 8) for code in range(16)), _NIBBLES),
    "e2m1": Codec(4, (*_E2M1, *(-value for value in _E2M1)), _FLOATS, layout=2),
    "nf4": Codec(4, tuple(torch.tensor(_NF4, dtype=torch.float32, device="cpu").tolist()), _NIBBLES),
    "int8": Codec(8, tuple(float(code - 256 * (code > 127)) for code in range(256)), _BYTES),
    "e4m3": Codec(8, _float_values(torch.float8_e4m3fn), _BYTES),
}
"""By name. Of ``e2m1`` and ``e4m3`` the highest bit is the sign; two codes of ``e4m3``, 127 and 255, are NaN."""


@dataclass(frozen=True)
class WeightFormat:
    """A format of quantised weights; those that are served are :data:`FORMATS`."""

    name: str
    codes: str
    """Of the codec, one of :data:`CODECS`."""
    bits: int
    """Of a code."""
    group: int | None
    """Along the depth, how many codes share a scale; None: there are no scales of groups."""
    has_zeros: bool
    """Whether a zero point, 0 to 15, is subtracted from a group's codes, which are unsigned then."""
    has_row_scales: bool
    """Whether a row has a factor of its own."""

    @property
    def codec(self) -> Codec:
        """How the codes lie in memory, and what they stand for where there are no zero points."""
        return CODECS[self.codes]

    @property
    def values(self) -> tuple[float, ...]:
        """The value of every code, exact in float32; from these a zero point is subtracted."""
        return tuple(map(float, range(2**self.bits))) if self.has_zeros else self.codec.values

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """What the scales of groups may be; none, if there are no such scales."""
        if self.group is None:
            return ()
        if self.codes == "int4":
            return torch.bfloat16, torch.float16, torch.float32
        if self.codes == "e2m1":
            return (torch.float8_e4m3fn if self.has_row_scales else torch.float8_e8m0fnu,)
        return (torch.float32,)

    @property
    def cuts_groups(self) -> bool:
        """Whether a row's last group may be shorter than the others: where groups are blocks of a matrix, cut at its
        edge."""
        return self.codes == "e4m3"

    @property
    def nan_codes(self) -> tuple[int, ...]:
        """The codes whose value is no number."""
        return tuple(code for code, value in enumerate(self.values) if math.isnan(value))

    @property
    def padding_code(self) -> int:
        """The code that rows are padded with; its value is zero."""
        return self.values.index(0.0)

    def row_bytes(self, k: int) -> int:
        """Of the codes of a row of depth ``k``, padded."""
        return -(-k // DEPTH_MULTIPLE) * DEPTH_MULTIPLE * self.bits // 8

    def groups(self, k: int) -> int:
        """How many groups a row of depth ``k`` has; 0 where the format has no groups.

        Raises:
            ValueError: the groups of this format are whole, and they do not divide ``k``.
        """
        if self.group is None:
            return 0
        if k % self.group and not self.cuts_groups:
            raise ValueError(f"k must be a multiple of {self.name}'s groups of {self.group}, got {k}")
        return -(-k // self.group)


def _formats() -> dict[str, WeightFormat]:
    int4 = [
        WeightFormat(f"int4_g{group}{'_zero' if zeros else ''}", "int4", 4, group, zeros, False)
        for zeros in (False, True)
        for group in (32, 64, 128)
    ]
    others = [
        WeightFormat("int8", "int8", 8, None, False, True),
        WeightFormat("fp8", "e4m3", 8, None, False, True),
        WeightFormat("fp8_g128", "e4m3", 8, 128, False, False),
        WeightFormat("nvfp4", "e2m1", 4, 16, False, True),
        WeightFormat("mxfp4", "e2m1", 4, 32, False, False),
        WeightFormat("nf4", "nf4", 4, 64, False, False),
    ]
    return {each.name: each for each in (*int4, *others)}


FORMATS: dict[str, WeightFormat] = _formats()
"""Every format by name."""


def format_of(name: str | WeightFormat) -> WeightFormat:
    """The format of a name; a format is its own.

    Raises:
        ValueError: there is no such format.
    """
    if isinstance(name, WeightFormat):
        return name
    if name not in [*FORMATS]:  # a list: what was given may have no hash
        raise ValueError(f"format must be one of {[*FORMATS]}, got {name!r}")
    return FORMATS[name]


@functools.lru_cache(maxsize=256)
def formats_of(weight_format: str) -> tuple[WeightFormat | None, WeightFormat | None]:
    """Of gate_up_proj and down_proj, from the text that ops and backends have for both; None: it is plain."""
    if weight_format == PLAIN:
        return None, None
    gate_up, down = (None if name == PLAIN else FORMATS[name] for name in weight_format.split(","))
    return gate_up, down


def join_formats(gate_up: WeightFormat | None, down: WeightFormat | None) -> str:
    """The text that :func:`formats_of` reads."""
    names = [PLAIN if format is None else format.name for format in (gate_up, down)]
    return PLAIN if names == [PLAIN, PLAIN] else ",".join(names)
