"""(d): memory is shared with CuPy and with transformers' modules, never copied."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cupymoe.kernels.bridge import as_cupy, as_torch
from cupymoe.verification.result import Result, Setting


def checks(setting: Setting) -> Iterator[Result]:
    """Equal pointers both ways, and a write on one side that is seen on the other."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = f"DLPack is zero-copy both ways ({str(dtype).removeprefix('torch.')})"
        if not setting.on_gpu:
            yield Result(name, "skipped", "no CUDA device")
            continue
        tensor = torch.randn(64, 96, device=setting.device).to(dtype)
        before = torch.cuda.memory_allocated(setting.device)
        array = as_cupy(tensor)
        back = as_torch(array, dtype)
        same_pointer = tensor.data_ptr() == array.data.ptr == back.data_ptr()
        no_allocation = torch.cuda.memory_allocated(setting.device) == before
        back.zero_()
        shared = not tensor.any().item()
        detail = (
            f"pointers {'equal' if same_pointer else 'differ'}, allocated {'nothing' if no_allocation else 'memory'}"
        )
        yield Result.of(name, same_pointer and no_allocation and shared, detail)
