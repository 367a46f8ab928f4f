"""Q4_0, of GGUF files: blocks of 32 along the depth, each with its scale before its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from cupymoe.checkpoint.quantised.storage import NaturalWeight, Rule, Storage, check_finite, in_order

_SCALE_BYTES = 2


@dataclass(frozen=True)
class Q4_0(Storage):
    """The low halves of a block's bytes are its first 16 codes, the high halves the others."""

    family: ClassVar[str] = "GGUF Q4_0"
    is_fused: ClassVar[bool] = True

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        self.format.groups(shape[-1])
        return {"weight": Rule(("Q4_0",), (shape,))}

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        blocks = tensors["weight"]
        scales = in_order(blocks[..., :_SCALE_BYTES]).view(torch.float16)[..., 0]
        check_finite("weight", scales)
        codes = blocks[..., _SCALE_BYTES:]
        return NaturalWeight(torch.cat((codes & 15, codes >> 4), dim=-1).reshape(shape), scales)

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        assert weight.scales is not None
        low, high = weight.codes.reshape(*weight.scales.shape, 2, -1).unbind(-2)
        scales = in_order(weight.scales)[..., None].view(torch.uint8)
        return {"weight": torch.cat((scales, low | (high << 4)), dim=-1)}
