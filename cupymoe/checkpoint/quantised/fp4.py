"""Weights of e2m1 codes with an e4m3 scale for each 16 and a global one (NVFP4), as several families name them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from cupymoe.checkpoint.quantised.storage import (
    NaturalWeight,
    Rule,
    Storage,
    check_finite,
    pack_words,
    scalar_shapes,
    unpack_words,
)


@dataclass(frozen=True)
class Fp4Storage(Storage):
    """e2m1 codes, lowest bits first; a subclass says how the tensors are called, and what the global scale does."""

    is_fused: ClassVar[bool] = True
    codes: ClassVar[str]
    global_scale: ClassVar[str]
    activation_scale: ClassVar[str]
    scalar_shape: ClassVar[tuple[int, ...]]

    @abstractmethod
    def row_scale(self, global_scale: torch.Tensor) -> torch.Tensor:
        """The factor of every row."""

    @abstractmethod
    def global_scales(self, row_scale: torch.Tensor) -> torch.Tensor:
        """Global scales, ``[count]``, one of which has ``row_scale`` for its factor if any has; the first rather."""

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        *lead, n, k = shape
        scalar = scalar_shapes(tuple(lead))
        return {
            self.codes: Rule(("U8",), ((*lead, n, k // 2),)),
            "weight_scale": Rule(("F8_E4M3",), ((*lead, n, self.format.groups(k)),)),
            self.global_scale: Rule(("F32",), scalar),
            self.activation_scale: Rule(("F32",), scalar, optional=True),
        }

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        for name in ("weight_scale", self.global_scale, self.activation_scale):
            if name in tensors:
                check_finite(name, tensors[name], negative=False)
        n, k = shape
        row_scale = self.row_scale(tensors[self.global_scale].flatten())
        check_finite(self.global_scale, row_scale)  # the reciprocal of zero is not
        return NaturalWeight(
            unpack_words(tensors[self.codes], 4, k), tensors["weight_scale"], row_scales=row_scale.expand(n)
        )

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        codes, scales, _, row_scales = weight
        assert scales is not None
        assert row_scales is not None
        candidates = self.global_scales(row_scales[0])
        if self.global_scale in like:
            candidates = torch.cat((like[self.global_scale].reshape(1), candidates))
        best = int((self.row_scale(candidates) == row_scales[0]).int().argmax())
        return {
            self.codes: pack_words(codes, 4, torch.uint8),
            "weight_scale": scales,
            self.global_scale: candidates[best].reshape(self.scalar_shape),
        }
