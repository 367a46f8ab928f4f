"""What is checked of the tensors that a quantised weight is made of."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch

from cupymoe.customisation import is_wrapper
from cupymoe.weights.buffers import ROW_SCALE_DTYPE
from cupymoe.weights.format import WeightFormat

_LARGEST_ZERO = 15
_LARGEST_WEIGHTS = {"int4": 340.0, "e4m3": 1023.0}
"""By codes. The tiles of ``fused`` multiply 64 times such weights in float16, in which 24 times an int4 scale must be
finite, too."""


def check_natural(
    format: WeightFormat,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    row_scales: torch.Tensor | None,
) -> None:
    """What :meth:`cupymoe.QuantizedWeight.of` is given: codes in their natural order, and the factors that the format
    has, without padding.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    _check_tensor("codes", codes, (torch.uint8,), None, None)
    if codes.ndim != 3 or not codes.numel():
        raise ValueError(f"codes must have shape [E, n, k], none of them 0, got {list(codes.shape)}")
    num_experts, rows, k = codes.shape
    groups = format.groups(k)
    _check_codes(format, codes)
    of_groups, of_rows = (num_experts, rows, groups), (num_experts, rows)
    if _belongs(scales, "scales", format, bool(groups)):
        _check_tensor("scales", scales, format.scale_dtypes, of_groups, codes.device)
        _check_scales("scales", scales)
        check_range(format, scales)
        if format.name == "nvfp4" and _any(scales.float() < 0):
            raise ValueError("scales must not be negative in nvfp4: their sign bit is not read")
    if _belongs(zeros, "zeros", format, format.has_zeros):
        _check_tensor("zeros", zeros, (torch.uint8,), of_groups, codes.device)
        if _any(zeros > _LARGEST_ZERO):
            raise ValueError(f"zeros must be at most {_LARGEST_ZERO}, got {int(zeros.max())}")
    if _belongs(row_scales, "row_scales", format, format.has_row_scales):
        _check_tensor("row_scales", row_scales, (ROW_SCALE_DTYPE,), of_rows, codes.device)
        _check_scales("row_scales", row_scales)


def check_range(format: WeightFormat, scales: torch.Tensor) -> None:
    """That no weight is infinite in the tiles of ``fused``, which multiply it as a float16 number where a code times
    the scale of its group has more digits than bfloat16.

    Raises:
        ValueError: a scale is too large for that.
    """
    if (largest_weight := _LARGEST_WEIGHTS.get(format.codes)) is None:
        return
    largest = largest_weight / max(abs(value) for value in format.values if not math.isnan(value))
    if _any(scales.float().abs() > largest):
        raise ValueError(
            f"scales must be at most {largest:.5g} in magnitude in {format.name}, so that no weight is beyond "
            f"{largest_weight:g}, got {float(scales.float().abs().max()):.5g}"
        )


def _belongs(given: torch.Tensor | None, name: str, format: WeightFormat, wanted: bool) -> TypeGuard[torch.Tensor]:
    """Whether something is there, which must be as the format says."""
    if (given is not None) != wanted:
        has, got = ("has", "none") if wanted else ("has no", "some")
        raise ValueError(f"{name} must be {'given' if wanted else 'None'}, as {format.name} {has} {name}, got {got}")
    return wanted


def _check_tensor(
    name: str,
    given: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
    device: torch.device | None,
) -> None:
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(given).__name__}")
    if is_wrapper(type(given)):
        raise TypeError(f"{name} must be a plain tensor, got {type(given).__name__}, which wraps another one")
    if given.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {' or '.join(map(str, dtypes))}, got {given.dtype}")
    if shape is not None and tuple(given.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(given.shape)}")
    if device is not None and given.device != device:
        raise ValueError(f"{name} must be on codes's device {device}, got {given.device}")


def _check_codes(format: WeightFormat, codes: torch.Tensor) -> None:
    if format.bits < 8 and _any(codes >= 2**format.bits):
        raise ValueError(f"codes must be below {2**format.bits} in {format.name}, got {int(codes.max())}")
    for code in format.nan_codes:
        if _any(codes == code):
            raise ValueError(f"codes must not be NaN in {format.name}, got {int((codes == code).sum())} of {code:#x}")


def _check_scales(name: str, scales: torch.Tensor) -> None:
    if _any(~scales.float().isfinite()):
        raise ValueError(f"{name} must be finite, got {int((~scales.float().isfinite()).sum())} NaN or infinite ones")


def _any(flags: torch.Tensor) -> bool:
    """Whether one is set; a tensor without values has none."""
    return not flags.is_meta and bool(flags.any())
