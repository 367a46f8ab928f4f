"""Memory is shared with CuPy, never copied."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cupymoe.kernels.bridge import as_cupy, as_torch
from cupymoe.tools.verification.result import Result, Setting


def checks(setting: Setting) -> Iterator[Result]:
    """Equal pointers both ways, and a write on one side that is seen on the other."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = f"DLPack is zero-copy both ways ({str(dtype).removeprefix('torch.')})"
        yield _round_trip(name, dtype, setting) if setting.on_gpu else Result(name, "skipped", "no CUDA device")


def _round_trip(name: str, dtype: torch.dtype, setting: Setting) -> Result:
    tensor = torch.randn(64, 96, device=setting.device).to(dtype)
    before = torch.cuda.memory_allocated(setting.device)
    array = as_cupy(tensor)
    back = as_torch(array, dtype)
    pointers = {tensor.data_ptr(), array.data.ptr, back.data_ptr()}
    allocated = torch.cuda.memory_allocated(setting.device) - before
    back.zero_()
    seen = not tensor.any().item()
    return Result.of(
        name,
        len(pointers) == 1 and allocated == 0 and seen,
        f"{len(pointers)} pointer for 3 arrays, {allocated} bytes allocated, a write is {'seen' if seen else 'lost'}",
    )
