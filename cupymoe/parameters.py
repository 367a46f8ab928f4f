"""What a copy of weights may come from and go into; it is asked of all tensors before the first one is written."""

from __future__ import annotations

from typing import Any

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Of weights. What has fewer bits is quantised, and without its scales a cast of it is not the weight."""


def check_plain(name: str, tensor: Any) -> None:
    """A tensor whose elements lie in its own memory, so that a plain copy of them is a copy of the weight.

    Raises:
        TypeError: ``tensor`` is no tensor, or a sparse or nested one, or of a class that computes in its own way (a
            DTensor, which holds a shard, or a quantised one of torchao); or its dtype is none of :data:`DTYPES`.
        ValueError: it is on the meta device, which has no memory.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise TypeError(
            f"{name} must be a plain tensor, whose elements lie in its own memory, got a {type(tensor).__name__}"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{name} must be a plain tensor, whose elements lie in its own memory, got a {kind} one")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must have a dtype of {DTYPES}, got {tensor.dtype} (no quantised weights)")
    if tensor.is_meta:
        raise ValueError(f"{name} must not be on the meta device, where there are no elements to copy")


def check_writable(name: str, parameter: Any) -> None:
    """A parameter that weights can be copied into.

    Raises:
        TypeError, ValueError: as of :func:`check_plain`, or it was made in inference mode, outside of which torch does
            not let it be written.
    """
    if isinstance(parameter, torch.Tensor) and parameter.is_meta:
        raise ValueError(f"{name} must not be on the meta device, where a copy into it would be lost")
    check_plain(name, parameter)
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made in torch.inference_mode(), and can be written there only")
