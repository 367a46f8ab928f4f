"""Launcher of ``cuda_src/pack_adapter.cu``. Oracle: ``scale * source``, padded with zeros, by torch's ``copy_``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cupymoe.kernels.bridge import current_stream
from cupymoe.kernels.dtypes import SCALARS
from cupymoe.kernels.jit import Variant, kernel
from cupymoe.kernels.launch import Kernel, word_of

_THREADS = 256


class Tiling(NamedTuple):
    """Elements of a tile, and on which side threads go through the experts first."""

    experts: int
    rows: int
    columns: int
    source_experts_innermost: bool = False
    output_experts_innermost: bool = False


WIDE, NARROW, FROM_INNERMOST, TO_INNERMOST = (
    Tiling(1, 16, 128),
    Tiling(1, 128, 16),
    Tiling(32, 8, 16, source_experts_innermost=True),
    Tiling(32, 8, 16, output_experts_innermost=True),
)
_TILINGS = {"WIDE": WIDE, "NARROW": NARROW, "FROM_INNERMOST": FROM_INNERMOST, "TO_INNERMOST": TO_INNERMOST}
_INDEX_OF = {tiling: index for index, tiling in enumerate(_TILINGS.values())}
_COPIES = 4
"""Of a launch: both factors of both weights' adapters."""
_WORDS_OF_COPY = 16


class Copy(NamedTuple):
    """``output = scale * source``, with zeros where ``output`` is larger."""

    source: torch.Tensor
    """``[E, m, n]``, bfloat16, float16 or float32, any strides."""
    output: torch.Tensor
    """``[E, M, N]`` with M >= m and N >= n, any of these dtypes, any strides without overlap."""
    scale: float = 1.0
    """Used in float32."""


def variant(source_dtype: torch.dtype, output_dtype: torch.dtype, *, old_sources: bool = False) -> Variant:
    """The compilation for two dtypes; it serves every size and all strides. See :func:`pack_adapter`."""
    return Variant(
        "pack_adapter",
        (
            f"IN_SCALAR={SCALARS[source_dtype]}",
            f"OUT_SCALAR={SCALARS[output_dtype]}",
            f"COPIES={_COPIES}",
            *(f"{name}={','.join(str(int(part)) for part in tiling)}" for name, tiling in _TILINGS.items()),
            f"OLD_SOURCES={int(old_sources)}",
            f"BLOCK_THREADS={_THREADS}",
        ),
    )


@functools.cache
def _kernel(source_dtype: torch.dtype, output_dtype: torch.dtype, old_sources: bool, device: int) -> Kernel:
    chosen = variant(source_dtype, output_dtype, old_sources=old_sources)
    return kernel(chosen, "pack_adapter", device, dependent=True)


def has_experts_innermost(factor: torch.Tensor) -> bool:
    """Whether the elements of ``[E, M, N]`` that lie together are those of different experts, as in PEFT's B."""
    return _are_experts_innermost(factor.stride())


def _are_experts_innermost(strides: tuple[int, ...]) -> bool:
    return strides[0] == 1 and strides[2] != 1


@functools.lru_cache(maxsize=4096)
def _geometry(
    source_shape: torch.Size, source_strides: tuple[int, ...], shape: torch.Size, strides: tuple[int, ...]
) -> tuple[int, ...]:
    """How many tiles a copy has, which tiling, and what else the kernel is told of its sizes and strides."""
    to_innermost = _are_experts_innermost(strides)
    side = source_strides if to_innermost else strides
    order = (0, 2, 1) if side[1] < side[2] else (0, 1, 2)  # columns are what lies together
    (experts, source_rows, source_columns), (_, rows, columns) = (
        [size[dimension] for dimension in order] for size in (source_shape, shape)
    )
    if to_innermost:
        tiling = TO_INNERMOST
    elif _are_experts_innermost(source_strides):
        tiling = FROM_INNERMOST
    else:
        tiling = WIDE if columns >= WIDE.columns else NARROW
    return (
        -(-experts // tiling.experts) * -(-rows // tiling.rows) * -(-columns // tiling.columns),
        _INDEX_OF[tiling],
        experts,
        source_rows,
        source_columns,
        rows,
        columns,
        *(source_strides[dimension] for dimension in order),
        *(strides[dimension] for dimension in order),
    )


def pack_adapter(copies: Sequence[Copy], *, old_sources: bool = False) -> None:
    """Make the copies, each computed in float32 and rounded once.

    Up to four neighbours of the same dtypes take one launch.

    Args:
        copies: none reads what another writes.
        old_sources: whether a launch of ours comes between the last write to any source and this one, and all memory
            that it reads or writes is still held, so that no output lies there. It may then run at the same time.
    """
    of_launch: list[Copy] = []
    dtypes = None
    for copy in copies:
        if not copy.output.numel():
            continue
        own = copy.source.dtype, copy.output.dtype
        if of_launch and (own != dtypes or len(of_launch) == _COPIES):
            _launch(of_launch, old_sources)
            of_launch = []
        dtypes = own
        of_launch.append(copy)
    if of_launch:
        _launch(of_launch, old_sources)


def _launch(copies: list[Copy], old_sources: bool) -> None:
    words: list[int] = []
    tiles = 0
    for source, output, scale in copies:
        geometry = _geometry(source.shape, source.stride(), output.shape, output.stride())
        words += source.data_ptr(), output.data_ptr(), word_of(scale)
        words += geometry
        tiles += geometry[0]
    words += [0] * (_COPIES * _WORDS_OF_COPY - len(words))
    device = output.get_device()
    _kernel(source.dtype, output.dtype, old_sources, device)((tiles, 1), _THREADS, current_stream(device), *words)
