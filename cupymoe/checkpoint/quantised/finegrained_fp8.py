"""transformers' ``fp8``: blocks of 128 x 128 or whole tensors, as DeepSeek and Qwen publish them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cupymoe.checkpoint.quantised.fp8 import BLOCK, Fp8Storage
from cupymoe.checkpoint.quantised.storage import Rule, block_counts


@dataclass(frozen=True)
class FineGrainedFp8(Fp8Storage):
    """``weight_scale_inv`` multiplies, its name notwithstanding."""

    family: ClassVar[str] = "transformers"
    scale: ClassVar[str] = "weight_scale_inv"
    activation_scale: ClassVar[str] = "activation_scale"

    def leaves_plain(self, shape: tuple[int, ...]) -> bool:
        """transformers' quantiser cuts no block: it leaves the whole weight as it is."""
        return self.strategy == "block" and any(size % BLOCK for size in shape[-2:])

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        rules = super().rules(shape, parts)
        scale = rules[self.scale]
        return rules | {self.scale: scale._replace(dtypes=(*scale.dtypes, "F8_E8M0"))}

    def scale_shapes(self, shape: tuple[int, ...], parts: int) -> tuple[tuple[int, ...], ...]:
        """Where gate and up were fused after they were quantised, each of them has scales of its own."""
        *lead, n, k = shape
        shapes = super().scale_shapes(shape, parts)
        if parts == 1:
            return shapes
        rows, columns = block_counts((n // parts, k), BLOCK) if self.strategy == "block" else (1, 1)
        return (*shapes, (*lead, parts * rows, columns))
