"""Regimes: how ``cuda_src/common/expert_stream.cuh`` is set up for a range of loads, and which of them is a call's."""

from __future__ import annotations

import bisect
import functools
from dataclasses import dataclass, replace

import torch

from cupymoe.kernels.arch import HOPPER, Arch
from cupymoe.kernels.load import Load
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT, StoredWeight

# The most pairs of a call whose blocks plan for themselves.
_INLINE_PAIRS = 128
# 64 take 161 us with tiles of 32 rows, and 165 with the next regime's; 96 take 225 and 211, because what an adapter
# adds comes from memory for each tile.
_INLINE_PAIRS_WITH_ADAPTER = 64
# Of an expert on average; beyond, some have more than the 8 of a chunk, and their weights would be read twice.
_INLINE_PAIRS_PER_EXPERT = 2


@dataclass(frozen=True)
class Tiling:
    """The ring of one GEMM: a stage is ``block_k`` deep, with 16 times ``row_blocks`` weight rows for each of the warps
    that lie side by side over them."""

    block_k: int
    stages: int
    k_warps: int = 1
    """Warps that share the rows and split the depth of a stage."""
    warps: int = 8
    """That consume the ring."""
    blocks_per_sm: int = 1
    whole_rows: bool = False
    """``block_k`` is the whole depth: a stage is two bulk copies, ordered by one thread."""
    token_warps: int = 1
    """Warps that share the rows and split a chunk's tokens, instead of the depth: 1 or 2."""
    row_blocks: int = 1
    """Of 16 rows, in a warp: 1 or 2."""

    @property
    def rows(self) -> int:
        """Of a weight, in a stage."""
        return self.warps // self.k_warps // self.token_warps * self.row_blocks * 16

    @property
    def threads(self) -> int:
        """Consumers, and one producer warp or four."""
        return (self.warps + (1 if self.whole_rows else 4)) * 32

    def shared_bytes(self, tokens: int, stored: StoredWeight = PLAIN_WEIGHT) -> int:
        """STAGES * STAGE_BYTES + SUMS_BYTES of the source."""
        sums = self.k_warps * min(max(tokens, 8), 16) * (self.rows + 4) * 4
        stage = self.rows * stored.stage_row_bytes(self.block_k) + tokens * self.block_k * 2
        return self.stages * stage + sums

    def defines(self) -> tuple[str, ...]:
        """The macros of this tiling."""
        return (
            f"WARPS={self.warps}",
            f"BLOCKS_PER_SM={self.blocks_per_sm}",
            f"K_WARPS={self.k_warps}",
            f"TOKEN_WARPS={self.token_warps}",
            f"ROW_BLOCKS={self.row_blocks}",
            f"BLOCK_K={self.block_k}",
            f"STAGES={self.stages}",
            f"WHOLE_ROWS={int(self.whole_rows)}",
        )


@functools.cache
def _fitted(tiling: Tiling, tokens: int, shared_bytes: int, stored: StoredWeight = PLAIN_WEIGHT) -> Tiling:
    """The tiling with as many stages as fit: the more of them, the more bytes are on their way."""
    stages = 2
    while replace(tiling, stages=stages + 1).shared_bytes(tokens, stored) <= shared_bytes:
        stages += 1
    return replace(tiling, stages=stages)


def _stage_depth(depth: int, most: int) -> int:
    """The largest multiple of 64 up to ``most`` that divides the depth of a weight, if that is at least half of it;
    else 256, where the last stage is cut off."""
    dividing = [k for k in range(-(-most // 128) * 64, most + 1, 64) if depth % k == 0]
    return max(dividing, default=min(most, 256))


# What a block has in static shared memory beside its ring: barriers, and where each plans for itself the plan.
_STATIC_BYTES, _STATIC_BYTES_OF_PLAN = 512, 4096


@dataclass(frozen=True, eq=False)
class Regime:
    """How a range of loads is computed. Within one, a token's result depends on no other token of the call."""

    tokens: int
    """Most tokens of a chunk: of one expert and one pass over its weights."""
    up: Tiling
    down: Tiling
    transposed: Tiling
    """Of either GEMM, where its weight is transposed."""
    inline_pairs: int = 0
    """The most pairs of a call, where each block plans for itself; 0: any number, and plan_experts.cu plans before."""
    fp32_slots: bool = False
    """Whether the experts' outputs stay fp32 until they are combined; else they are rounded to the dtype."""
    four_bits: Tiling | None = None
    """Of either GEMM, where its weight is codes of 4 bits. ``block_k`` is the most that it may be, and of stages there
    are as many as fit, whatever the scales are. None where regimes are of plain weights."""
    eight_bits: Tiling | None = None
    """The same of codes of 8 bits."""
    shares_multiprocessor: bool = False
    """Whether the rings of both GEMMs have to fit together where their weights are codes of 4 bits."""

    @property
    def static_bytes(self) -> int:
        """Static shared memory of a block of either GEMM."""
        return _STATIC_BYTES_OF_PLAN if self.inline_pairs else _STATIC_BYTES

    def tiling_of_codes(self, stored: StoredWeight, depth: int, shared_bytes: int, *, has_adapter: bool) -> Tiling:
        """Of a GEMM whose weight is codes, ``depth`` of them in a row, where its ring may have ``shared_bytes``."""
        assert stored.format is not None
        tiling = self.four_bits if stored.format.bits == 4 else self.eight_bits
        assert tiling is not None
        tiling = replace(tiling, block_k=_stage_depth(depth, tiling.block_k))
        # Beside an adapter's registers, or a float32 scale and a zero for each 32 weights, a warp has none for 32 rows.
        has_most_groups = stored.has_zeros and stored.format.group == 32 and stored.scale_dtype == torch.float32
        if (has_adapter or has_most_groups) and self.tokens > 48:
            tiling = replace(tiling, row_blocks=1)
        if tiling.shared_bytes(self.tokens, stored) > shared_bytes:  # of two stages; scales and zeros may be many
            tiling = replace(tiling, block_k=min(tiling.block_k, 256))
        return _fitted(tiling, self.tokens, shared_bytes, stored)


# 128 rows, so that each k is 256 bytes of memory. Of ten tiles the fastest at GPT-OSS 20b's sizes from 32 tokens on;
# with fewer tokens 64 rows and 256 k are (benchmarks/NOTES.md).
_TRANSPOSED = Tiling(128, 4)

_UP_TO_4_PAIRS = Regime(
    tokens=32,
    up=Tiling(256, 4, k_warps=2),
    down=Tiling(256, 4, k_warps=2),
    transposed=_TRANSPOSED,
    fp32_slots=True,
)
_UP_TO_16_PAIRS = Regime(
    tokens=32,
    up=Tiling(256, 3, k_warps=2, warps=4, blocks_per_sm=2),
    down=Tiling(256, 4, k_warps=2),
    transposed=_TRANSPOSED,
)
_UP_TO_32_PAIRS = Regime(
    tokens=48,
    up=Tiling(256, 3, k_warps=2),
    down=Tiling(256, 3, k_warps=2),
    transposed=_TRANSPOSED,
)
_MORE_PAIRS = Regime(
    tokens=80,
    up=Tiling(128, 4),
    down=Tiling(128, 4),
    transposed=_TRANSPOSED,
)
_PLANNED = (_UP_TO_4_PAIRS, _UP_TO_16_PAIRS, _UP_TO_32_PAIRS, _MORE_PAIRS)
# The most pairs of an expert, on average, that each of these serves; the last serves all that are more.
_MOST_PAIRS: tuple[int, ...] = (4, 16, 32)
# The same of the planned regimes of weights that are codes.
_MOST_PAIRS_OF_CODES: tuple[int, ...] = (4, 8, 16, 32)


@functools.cache
def _inline_regime(intermediate_size: int) -> Regime:
    # Both rings of contiguous weights fit a multiprocessor together, so that experts_down fills its own while
    # experts_up still runs.
    whole_rows = intermediate_size % 32 == 0 and intermediate_size <= 768
    down = Tiling(intermediate_size, 2, k_warps=4, whole_rows=True) if whole_rows else Tiling(256, 5, k_warps=4)
    return Regime(
        tokens=8,
        up=Tiling(256, 4, k_warps=4),
        down=down,
        transposed=Tiling(256, 3, k_warps=2),
        inline_pairs=_INLINE_PAIRS,
        fp32_slots=True,
    )


# Tiles of codes. Those of 704 k are of whole rows of Gemma 4's down_proj and of quarters of gate_up_proj's: a warp then
# has 11 steps of 64 k for each time that it waits for a stage.
_DEEP, _DEEP_OF_FEW, _DEEP_OF_TWO = Tiling(704, 2), Tiling(704, 2, warps=4), Tiling(704, 2, warps=4, row_blocks=2)
# 64 rows of bytes, as those of few codes of 4 bits.
_BYTES_OF_FEW = Tiling(704, 2, k_warps=2)
# 96 rows for one token: a block's part of gate_up_proj is then 85 rows on Hopper, one tile and not two.
_DEEP_OF_ONE, _BYTES_OF_ONE = Tiling(704, 2, warps=6), Tiling(704, 2, warps=12, k_warps=2)
# 128 rows, 32 of them for a warp, which so loads tokens half as often as with 16.
_CODES = Tiling(256, 2, k_warps=2, row_blocks=2)
# For cards with less shared memory than Hopper: 48 rows of bytes for one token; 64 rows of 256 k, of which two warps
# split the depth; and 128 rows of 256 k.
_HALF_OF_ONE, _HALF_OF_CODES, _SHALLOW = Tiling(704, 2, warps=6, k_warps=2), Tiling(256, 2, k_warps=2), Tiling(256, 2)
# 64 rows of 256 k, as they were chosen for 163 KB of shared memory.
_BYTES_OF_8 = Tiling(256, 2, k_warps=4, row_blocks=2)
# Of more tokens; for all of them in a warp there are no registers.
_CODES_OF_48, _CODES_OF_80 = (Tiling(block_k, 2, token_warps=2, row_blocks=2) for block_k in (256, 128))
_MOST_PAIRS_OF_FEW = 32
"""Of a call on codes that is one of few. Both rings of those fit a Hopper multiprocessor together, see
``_inline_regime``: with longer rings one token took 22 us in the place of 20, but 8 tokens 66 in the place of 73."""
_MUCH_SHARED_BYTES = 160 * 1024
"""Of a block, from which on a portable regime is for the cards that have 163 KB; below they are for 99 KB."""


@functools.cache
def _regimes_of_codes(intermediate_size: int) -> tuple[Regime, ...]:
    """Hopper's, where a weight is codes: three whose blocks plan for themselves, which are for one token, for few and
    for more, then those of :data:`_MOST_PAIRS_OF_CODES`.

    Fewer tokens in a chunk than beside plain weights: what codes take is instructions, more with each eight tokens.
    """
    inline = _inline_regime(intermediate_size)
    return (
        replace(inline, tokens=1, four_bits=_DEEP_OF_ONE, eight_bits=_BYTES_OF_ONE, shares_multiprocessor=True),
        replace(inline, four_bits=_DEEP_OF_FEW, eight_bits=_BYTES_OF_FEW, shares_multiprocessor=True),
        replace(inline, four_bits=_DEEP, eight_bits=_DEEP),
        replace(_UP_TO_4_PAIRS, tokens=16, four_bits=_DEEP, eight_bits=_CODES),
        replace(_UP_TO_16_PAIRS, tokens=16, four_bits=_DEEP, eight_bits=_CODES),
        replace(_UP_TO_16_PAIRS, tokens=24, four_bits=_DEEP_OF_TWO, eight_bits=_CODES),
        replace(_UP_TO_32_PAIRS, four_bits=_CODES_OF_48, eight_bits=_CODES_OF_48),
        replace(_MORE_PAIRS, four_bits=_CODES_OF_80, eight_bits=_CODES_OF_80),
    )


@functools.cache
def _portable_regimes(shared_bytes: int) -> tuple[Regime, ...]:
    """Regimes of cards whose blocks have less shared memory than Hopper's, in the order of :func:`regime`.

    No ring is of whole rows, which would need more. Beyond the fewest tokens of each size of card, tiles were chosen
    from some six each by their builds' times on an H200 (benchmarks/NOTES.md): with 99 KB, 128 rows of 64 k are faster
    than 64 rows of 128, because a warp then shares its tokens with no other. From 32 pairs an expert on, products take
    the time, and warps lie two by four over tokens and rows.
    """

    def new(tokens: int, tiling: Tiling, transposed: Tiling, *, fp32_slots: bool = False) -> Regime:
        room = shared_bytes - _STATIC_BYTES
        of_both = _fitted(tiling, tokens, room)
        return Regime(tokens, of_both, of_both, _fitted(transposed, tokens, room), 0, fp32_slots)

    def inline(transposed: Tiling) -> Regime:
        # Not as many stages as fit: with seven in 163 KB a call of 16 tokens takes 248 us, with four 239.
        tiling, room = Tiling(256, 4, k_warps=4), shared_bytes - _STATIC_BYTES_OF_PLAN
        return Regime(8, tiling, tiling, _fitted(transposed, 8, room), _INLINE_PAIRS, True)

    wide, square = Tiling(64, 2), Tiling(64, 2, token_warps=2, row_blocks=2)
    if shared_bytes < _MUCH_SHARED_BYTES:
        return (
            inline(Tiling(128, 2, k_warps=2)),
            new(16, wide, wide, fp32_slots=True),
            new(32, wide, wide),
            new(48, square, wide),
            new(96, square, square),
        )
    deep, deep_square = Tiling(256, 2, k_warps=2), replace(square, block_k=128)
    return (
        inline(deep),
        new(32, deep, Tiling(128, 2), fp32_slots=True),
        new(32, deep, Tiling(128, 2)),
        new(48, deep_square, wide),
        new(64, deep_square, square),
    )


@functools.cache
def _portable_regimes_of_codes(shared_bytes: int) -> tuple[Regime, ...]:
    """The same where a weight is codes, in the order of :func:`_regimes_of_codes`.

    With 99 KB, tiles up to 128 tokens at Gemma 4's sizes were chosen from some ten each (benchmarks/NOTES.md). Those
    with 163 KB are older, and three regimes are one there.
    """
    inline, few, *more = _portable_regimes(shared_bytes)

    def of_codes(plain: Regime, four_bits: Tiling, eight_bits: Tiling | None = None) -> Regime:
        return replace(plain, four_bits=four_bits, eight_bits=eight_bits or four_bits)

    if shared_bytes < _MUCH_SHARED_BYTES:
        tilings = Tiling(128, 2), Tiling(128, 2), Tiling(64, 2, token_warps=2)
        first = (
            of_codes(replace(inline, tokens=1), _BYTES_OF_ONE, _HALF_OF_ONE),
            of_codes(inline, _BYTES_OF_FEW, _HALF_OF_CODES),
            of_codes(inline, _SHALLOW, _HALF_OF_CODES),
            of_codes(replace(few, tokens=8), _SHALLOW),
            of_codes(few, _SHALLOW),
        )
    else:
        tilings = _CODES, _CODES_OF_48, _CODES_OF_80
        of_inline, of_few = of_codes(inline, _DEEP_OF_FEW, _BYTES_OF_8), of_codes(few, _CODES)
        first = of_inline, of_inline, of_inline, of_few, of_few
    return *first, *(of_codes(plain, tiling) for plain, tiling in zip(more, tilings, strict=True))


@functools.lru_cache(maxsize=4096)
def regime(
    load: Load,
    intermediate_size: int,
    arch: Arch = HOPPER,
    *,
    has_adapter: bool = False,
    has_codes: bool = False,
    plans_inline: bool = True,
    is_invariant: bool = False,
) -> Regime:
    """The regime of a call; without ``plans_inline`` none whose blocks plan for themselves.

    Each bound was measured on an H100 at Gemma 4's sizes, and held at other models' (benchmarks/NOTES.md); with an
    adapter, or where a weight is codes, on an H200.

    Where it ``is_invariant``, that of the most tokens, whatever the load is: it serves any number of them, and fastest
    where calls take the longest.
    """
    pairs = load.pairs_per_expert
    most_inline = _INLINE_PAIRS_WITH_ADAPTER if has_adapter else _INLINE_PAIRS
    is_inline = plans_inline and load.num_pairs <= most_inline and pairs <= _INLINE_PAIRS_PER_EXPERT
    shared_bytes = arch.shared_bytes_of_block
    is_portable = shared_bytes < HOPPER.shared_bytes_of_block
    if has_codes:
        of_codes = _portable_regimes_of_codes(shared_bytes) if is_portable else _regimes_of_codes(intermediate_size)
        of_one, of_few, inline, *planned = of_codes
        bounds = _MOST_PAIRS_OF_CODES
        if load.num_pairs <= _MOST_PAIRS_OF_FEW:
            inline = of_one if load.num_tokens == 1 else of_few
    else:
        inline, *planned = (
            _portable_regimes(shared_bytes) if is_portable else (_inline_regime(intermediate_size), *_PLANNED)
        )
        bounds = _MOST_PAIRS
    if is_invariant:
        return planned[-1]
    return inline if is_inline else planned[bisect.bisect_left(bounds, pairs)]


@functools.lru_cache(maxsize=4096)
def batch_regime(load: Load, intermediate_size: int, arch: Arch, *, has_codes: bool) -> Regime:
    """The regime of a batch, whose experts' outputs are the call's, and so of its dtype."""
    chosen = regime(load, intermediate_size, arch, has_codes=has_codes, plans_inline=False)
    return _with_slots_of_dtype(chosen)


@functools.cache
def _with_slots_of_dtype(regime: Regime) -> Regime:
    return replace(regime, fp32_slots=False) if regime.fp32_slots else regime
