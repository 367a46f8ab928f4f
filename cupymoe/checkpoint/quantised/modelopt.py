"""NVIDIA's ModelOpt: NVFP4, and e4m3 with one scale a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cupymoe.checkpoint.quantised.fp4 import Fp4Storage
from cupymoe.checkpoint.quantised.fp8 import Fp8Storage


@dataclass(frozen=True)
class ModelOptFp4(Fp4Storage):
    """``NVFP4``: the second scale multiplies."""

    family: ClassVar[str] = "ModelOpt"
    codes: ClassVar[str] = "weight"
    global_scale: ClassVar[str] = "weight_scale_2"
    activation_scale: ClassVar[str] = "input_scale"
    scalar_shape: ClassVar[tuple[int, ...]] = ()

    def row_scale(self, global_scale: torch.Tensor) -> torch.Tensor:
        """See :class:`Fp4Storage`."""
        return global_scale

    def global_scales(self, row_scale: torch.Tensor) -> torch.Tensor:
        """See :class:`Fp4Storage`."""
        return row_scale[None]


@dataclass(frozen=True)
class ModelOptFp8(Fp8Storage):
    """``FP8``: one scale a tensor."""

    family: ClassVar[str] = "ModelOpt"
    scale: ClassVar[str] = "weight_scale"
    activation_scale: ClassVar[str] = "input_scale"
