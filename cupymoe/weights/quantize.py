"""Weights of 16 and 32 bits to quantised ones, each code the nearest to its weight for the scale that was chosen.

Nothing is calibrated: there is no data and no search. What that costs is measured in docs/quantised.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from cupymoe.parameters import check_plain
from cupymoe.reference import work_dtype
from cupymoe.weights.format import FORMATS, WeightFormat
from cupymoe.weights.quantized import QuantizedExperts, QuantizedWeight

SCALE_RULES = ("absmax", "q4_0")
GROUP_SIZES = (32, 64, 128)

_ELEMENTS_AT_ONCE = 1 << 24
"""Of whole experts, at least one: temporaries are a few times as large, in float32."""

_LARGEST_INT8 = 127
_LARGEST_E4M3 = 448.0
_LARGEST_E2M1 = 6.0
# Halfway between neighbours of e2m1, and whether that goes up, to the code that is even.
_E2M1_HALFWAYS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


class _Parts(NamedTuple):
    """Of a weight, as :meth:`QuantizedWeight.of` takes them."""

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    row_scales: torch.Tensor | None = None


def quantize(
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    format: str,
    *,
    group_size: int | None = None,
    scale_rule: str = "absmax",
) -> QuantizedExperts:
    """Both weights of a layer's experts, rounded to nearest; what :func:`cupymoe.fused_experts` takes in their place.

    Args:
        gate_up_proj: ``[E, 2I, H]``, or ``[E, I, H]`` for an ungated activation; bfloat16, float16, float32 or float64,
            finite, any strides. It is only read, a few experts at a time.
        down_proj: ``[E, H, I]``: the same.
        format: ``"int4"``, symmetric in groups along the depth; ``"int8"`` or ``"fp8"`` (e4m3), with a scale for each
            row; ``"nvfp4"``, with an e4m3 scale for each 16 weights and a float32 one for each expert's matrix.
        group_size: of ``"int4"``: 32, 64 or 128, a divisor of H and of I; None: 32. None for the others.
        scale_rule: of ``"int4"``. ``"absmax"``: a group's scale is its largest magnitude / 7.5, in bfloat16, never
            negative, and codes are clamped. ``"q4_0"``: the scale is the element of largest magnitude / -8, in float16,
            as in GGUF's Q4_0; normal weights have a tenth less of an error then, and weights that lie on such a grid,
            as those of Google's checkpoints ``-qat-q4_0-unquantized`` do, stay what they are.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
    """
    chosen = _format(format, group_size, scale_rule)
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        check_plain(name, weight)
        if weight.ndim != 3 or not weight.numel():
            raise ValueError(f"{name} must have shape [E, out, in], none of them 0, got {list(weight.shape)}")
        try:
            chosen.groups(weight.shape[2])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if (gate_up_proj.shape[0], gate_up_proj.shape[2]) != tuple(down_proj.shape[:2]):
        raise ValueError(
            f"down_proj must have shape [E, H, I] where gate_up_proj has [E, 2I, H], got {list(down_proj.shape)} and "
            f"{list(gate_up_proj.shape)}"
        )
    rounded = _ROUNDED[format] if scale_rule == "absmax" else _q4_0
    return QuantizedExperts(
        _quantized("gate_up_proj", gate_up_proj, chosen, rounded), _quantized("down_proj", down_proj, chosen, rounded)
    )


def _format(format: str, group_size: int | None, scale_rule: str) -> WeightFormat:
    if format not in [*_ROUNDED]:  # a list: what was given may have no hash
        raise ValueError(f"format must be one of {[*_ROUNDED]}, got {format!r}")
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule must be one of {[*SCALE_RULES]}, got {scale_rule!r}")
    if format != "int4":
        if group_size is not None:
            raise ValueError(f"group_size must be None for {format!r}, whose groups are fixed, got {group_size!r}")
        if scale_rule != "absmax":
            raise ValueError(f"scale_rule must be 'absmax' for {format!r}, got {scale_rule!r}")
        return FORMATS[format]
    size = GROUP_SIZES[0] if group_size is None else group_size
    if size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {[*GROUP_SIZES]} or None, got {group_size!r}")
    return FORMATS[f"int4_g{size}"]


@torch.no_grad()
def _quantized(
    name: str, weight: torch.Tensor, format: WeightFormat, rounded: Callable[[torch.Tensor, WeightFormat], _Parts]
) -> QuantizedWeight:
    num_experts, rows, k = weight.shape
    output: QuantizedWeight | None = None
    step = max(1, _ELEMENTS_AT_ONCE // (rows * k))
    for first in range(0, num_experts, step):
        some = slice(first, first + step)
        wide = weight[some].to(work_dtype(weight.dtype))
        if not bool(wide.isfinite().all()):
            raise ValueError(f"{name} must be finite, got {int((~wide.isfinite()).sum())} NaN or infinite elements")
        part = QuantizedWeight.of(format, *rounded(wide, format))
        if output is None:
            scale_dtype = None if part.scales is None else part.scales.dtype
            output = QuantizedWeight(format, (num_experts, rows, k), scale_dtype=scale_dtype, device=weight.device)
        for buffer_name, buffer in part.named_buffers():
            output.get_buffer(buffer_name)[some] = buffer
    assert output is not None
    return output


def _divided(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Zero where the scale is."""
    return torch.where(scales == 0, 0, values / scales)


def _groups(weight: torch.Tensor, format: WeightFormat) -> torch.Tensor:
    """``[E, n, k / group, group]``"""
    assert format.group is not None
    return weight.reshape(*weight.shape[:2], -1, format.group)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row, which stays a row of one."""
    return values.abs().amax(-1, keepdim=True)


def _absmax(weight: torch.Tensor, format: WeightFormat) -> _Parts:
    groups = _groups(weight, format)
    scales = (_largest(groups) / 7.5).to(torch.bfloat16)
    codes = _divided(groups, scales.to(weight.dtype)).round().clamp(-8, 7) + 8
    return _Parts(codes.to(torch.uint8).view(weight.shape), scales.squeeze(-1))


def _q4_0(weight: torch.Tensor, format: WeightFormat) -> _Parts:
    groups = _groups(weight, format).float()  # GGUF's arithmetic
    exact = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    scales = exact.to(torch.float16)
    # By the scale before it is rounded, and halves go up. One that is rounded to zero has no codes to tell apart.
    codes = torch.where(scales == 0, 8, _divided(groups, exact) + 8.5).floor().clamp(max=15)
    return _Parts(codes.to(torch.uint8).view(weight.shape), scales.squeeze(-1))


def _int8(weight: torch.Tensor, format: WeightFormat) -> _Parts:
    scales = (_largest(weight) / _LARGEST_INT8).float()
    codes = _divided(weight, scales.to(weight.dtype)).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return _Parts(codes.to(torch.int8).view(torch.uint8), row_scales=scales.squeeze(-1))


def _to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest. What is a little too large, because its scale was rounded, is the largest."""
    return values.clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(torch.float8_e4m3fn)


def _fp8(weight: torch.Tensor, format: WeightFormat) -> _Parts:
    scales = (_largest(weight) / _LARGEST_E4M3).float()
    codes = _to_e4m3(_divided(weight, scales.to(weight.dtype)))
    return _Parts(codes.view(torch.uint8), row_scales=scales.squeeze(-1))


def _nvfp4(weight: torch.Tensor, format: WeightFormat) -> _Parts:
    groups = _groups(weight, format)
    of_expert = (weight.abs().amax((1, 2), keepdim=True) / (_LARGEST_E4M3 * _LARGEST_E2M1)).float()
    row_scales = of_expert.expand(-1, weight.shape[1], 1)
    wide = row_scales.to(weight.dtype)
    scales = _to_e4m3(_divided(_largest(groups).squeeze(-1) / _LARGEST_E2M1, wide))
    values = _divided(groups, (scales.to(weight.dtype) * wide).unsqueeze(-1))
    magnitudes = values.abs()
    codes = torch.zeros_like(magnitudes, dtype=torch.uint8)
    for halfway, goes_up in _E2M1_HALFWAYS:
        codes += magnitudes >= halfway if goes_up else magnitudes > halfway
    codes += 8 * ((values < 0) & (codes > 0)).to(torch.uint8)
    return _Parts(codes.view(weight.shape), scales, row_scales=row_scales.squeeze(-1))


_ROUNDED: dict[str, Callable[[torch.Tensor, WeightFormat], _Parts]] = {
    "int4": _absmax,
    "int8": _int8,
    "fp8": _fp8,
    "nvfp4": _nvfp4,
}
