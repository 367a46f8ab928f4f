"""Weights of e4m3 codes: one scale a row, a tensor, or a block of 128 x 128, as several families name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from cupymoe.checkpoint.quantised.storage import (
    FLOATS,
    NaturalWeight,
    Rule,
    Storage,
    block_counts,
    check_codes,
    check_finite,
    scalar_shapes,
)

BLOCK = 128


@dataclass(frozen=True)
class Fp8Storage(Storage):
    """e4m3 codes as they are, and scales that multiply; a subclass says how the tensors are called."""

    strategy: str
    """``channel``, ``tensor`` or ``block``: what has one scale."""

    is_fused: ClassVar[bool] = True
    scale: ClassVar[str]
    activation_scale: ClassVar[str]

    def __str__(self) -> str:
        return f"{super().__str__()} ({self.strategy} scales)"

    def scale_shapes(self, shape: tuple[int, ...], parts: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that the tensor of scales may have; arguments are as of :meth:`rules`."""
        *lead, n, _ = shape
        if self.strategy == "channel":
            return ((*lead, n, 1), (*lead, n))
        if self.strategy == "tensor":
            return scalar_shapes(tuple(lead))
        return ((*lead, *block_counts(shape, BLOCK)),)

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        return {
            "weight": Rule(("F8_E4M3",), (shape,)),
            self.scale: Rule(FLOATS, self.scale_shapes(shape, parts)),
            self.activation_scale: Rule(FLOATS, scalar_shapes(shape[:-2]), optional=True),
        }

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        codes = tensors["weight"].view(torch.uint8)
        check_codes(self.format, "weight", codes)
        for name in (self.scale, self.activation_scale):
            if name in tensors:
                check_finite(name, tensors[name], negative=False)
        scales = tensors[self.scale].float()
        if self.strategy == "block":
            return NaturalWeight(codes, scales[self._scale_of_row(shape[0], len(scales), scales.device)])
        scales = scales.flatten()
        return NaturalWeight(codes, row_scales=scales[self._scale_of_row(shape[0], len(scales), scales.device)])

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        codes, scales, _, row_scales = weight
        n = len(codes)
        of_rows = scales if row_scales is None else row_scales
        assert of_rows is not None
        count = {"channel": n, "tensor": 1, "block": -(-n // BLOCK)}[self.strategy]
        if self.scale in like:
            count = len(like[self.scale]) if self.strategy == "block" else like[self.scale].numel()
        written = of_rows.new_empty(count, *of_rows.shape[1:])
        written[self._scale_of_row(n, count, of_rows.device)] = of_rows
        if self.strategy == "channel":
            written = written[:, None]
        return {"weight": codes.view(torch.float8_e4m3fn), self.scale: written}

    def _scale_of_row(self, n: int, count: int, device: torch.device) -> torch.Tensor:
        """Which of ``count`` scales, or rows of scales of blocks, each of ``n`` rows has: ``[n]`` int64."""
        rows = torch.arange(n, device=device)
        if self.strategy != "block":
            return rows // (n // count)
        if count == -(-n // BLOCK):
            return rows // BLOCK
        half = n // 2  # gate and up have blocks of their own
        return rows % half // BLOCK + rows // half * (count // 2)
