"""AutoGPTQ's and AutoAWQ's files: weights as [k, n] in int32 words, 4 bits in groups along k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from cupymoe.checkpoint.quantised.storage import (
    BadTensorError,
    NaturalWeight,
    Rule,
    Storage,
    check_finite,
    check_values,
    pack_words,
    unpack_words,
)

_SYMMETRIC_ZERO = 8
# Which of 8 neighbouring columns lies at each place of an AWQ word, and where each column lies.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = tuple(_AWQ_ORDER.index(column) for column in range(8))


def _check_words(n: int) -> None:
    if n % 8:
        raise ValueError(f"n must be a multiple of 8, since 8 zero points share a word, got {n}")


@dataclass(frozen=True)
class Gptq(Storage):
    """``qweight`` in words along the depth, groups in their order: an act-order has no place in a format."""

    zero_offset: int
    """What is subtracted from a zero point before it is stored: 1 in version 1 of the format, 0 in version 2."""
    needs_order: bool = False
    """Whether config.json says desc_act: ``g_idx``, which may still name the groups in their order, is needed then."""

    family: ClassVar[str] = "GPTQ"

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        n, k = shape
        _check_words(n)
        groups = self.format.groups(k)
        return {
            "qweight": Rule(("I32",), ((k // 8, n),)),
            "qzeros": Rule(("I32",), ((groups, n // 8),)),
            "scales": Rule(("F16", "BF16"), ((groups, n),)),
            "g_idx": Rule(("I32",), ((k,),), optional=not self.needs_order),
        }

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        n, k = shape
        check_finite("scales", tensors["scales"])
        if "g_idx" in tensors:
            g_idx = tensors["g_idx"]
            if not torch.equal(g_idx, self._in_order(k, g_idx.device)):
                raise BadTensorError("g_idx", "must name the groups in their order, got an act-order (desc_act)")
        codes = unpack_words(tensors["qweight"].T, 4, k).contiguous()
        zeros = unpack_words(tensors["qzeros"], 4, n).T.contiguous() + self.zero_offset
        if bool((zeros > 15).any()):
            raise BadTensorError("qzeros", "must be zero points up to 15, got 16, which carries into its neighbour")
        scales = tensors["scales"].T.contiguous()
        if self.format.has_zeros:
            return NaturalWeight(codes, scales, zeros)
        check_values("qzeros", f"{_SYMMETRIC_ZERO} where config.json says sym", _SYMMETRIC_ZERO, zeros)
        return NaturalWeight(codes, scales)

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        codes, scales, zeros, _ = weight
        assert scales is not None
        if zeros is None:
            zeros = torch.full_like(scales, _SYMMETRIC_ZERO, dtype=torch.uint8)
        if zeros.min() < self.zero_offset:
            raise ValueError("GPTQ's version 1 can't hold a zero point of 0")
        tensors = {
            "qweight": pack_words(codes, 4, torch.int32).T.contiguous(),
            "qzeros": pack_words((zeros - self.zero_offset).T, 4, torch.int32),
            "scales": scales.T.contiguous(),
        }
        if "g_idx" not in like:
            tensors["g_idx"] = self._in_order(codes.shape[1], codes.device)
        return tensors

    def _in_order(self, k: int, device: torch.device) -> torch.Tensor:
        """The group of each place of a row, ``[k]`` int32."""
        assert self.format.group is not None
        return torch.arange(k, dtype=torch.int32, device=device) // self.format.group


@dataclass(frozen=True)
class Awq(Storage):
    """``qweight`` in words along the rows, 8 columns of [k, n] to a word in an order of their own."""

    family: ClassVar[str] = "AWQ"

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        n, k = shape
        _check_words(n)
        groups = self.format.groups(k)
        return {
            "qweight": Rule(("I32",), ((k, n // 8),)),
            "qzeros": Rule(("I32",), ((groups, n // 8),)),
            "scales": Rule(("F16", "BF16"), ((groups, n),)),
        }

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        check_finite("scales", tensors["scales"])
        codes, zeros = (self._rows(tensors[name]) for name in ("qweight", "qzeros"))
        return NaturalWeight(codes, tensors["scales"].T.contiguous(), zeros)

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        codes, scales, zeros, _ = weight
        assert scales is not None
        assert zeros is not None
        return {"qweight": self._words(codes), "qzeros": self._words(zeros), "scales": scales.T.contiguous()}

    @staticmethod
    def _rows(words: torch.Tensor) -> torch.Tensor:
        codes = unpack_words(words, 4, 8 * words.shape[-1]).reshape(len(words), -1, 8)
        return codes[..., _AWQ_PLACES].flatten(-2).T.contiguous()

    @staticmethod
    def _words(rows: torch.Tensor) -> torch.Tensor:
        codes = rows.T.reshape(rows.shape[1], -1, 8)
        return pack_words(codes[..., _AWQ_ORDER].flatten(-2), 4, torch.int32)
