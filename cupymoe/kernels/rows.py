"""How kernels that work on whole rows divide them: elements of an access, and blocks and threads of a row."""

from __future__ import annotations

import torch

from cupymoe.kernels.dtypes import SCALARS


def vector_width(dtype: torch.dtype, columns: int, aligned: bool) -> int:
    """Elements in one access: 16 bytes' worth where the rows and the pointers (``aligned``) allow it, else one."""
    width = 16 // dtype.itemsize
    return width if aligned and columns % width == 0 else 1


def row_geometry(columns: int, width: int) -> tuple[int, int]:
    """(blocks, threads) that cover one row with ``width`` columns a thread: at most 256 threads, in whole warps."""
    threads = -(-columns // width)
    blocks = -(-threads // 256)
    return blocks, -(-threads // (blocks * 32)) * 32


def row_defines(dtype: torch.dtype, columns: int, width: int, top_k: int, threads: int) -> tuple[str, ...]:
    """Defines of a kernel that moves whole rows."""
    return (
        f"SCALAR={SCALARS[dtype]}",
        f"COLS={columns}",
        f"VEC={width}",
        f"TOP_K={top_k}",
        f"BLOCK_THREADS={threads}",
    )
