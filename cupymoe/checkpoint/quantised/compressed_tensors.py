"""compressed-tensors: llm-compressor's files, in its formats of packed integers and of floating-point numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cupymoe.checkpoint.quantised.fp4 import Fp4Storage
from cupymoe.checkpoint.quantised.fp8 import BLOCK, Fp8Storage
from cupymoe.checkpoint.quantised.storage import (
    FLOATS,
    NaturalWeight,
    Rule,
    Storage,
    check_finite,
    check_values,
    in_order,
    pack_words,
    scalar_shapes,
    unpack_words,
)
from cupymoe.weights.format import WeightFormat


@dataclass(frozen=True)
class PackedIntegers(Storage):
    """``pack-quantized``: offset codes, lowest bits first, in int32 words along the depth.

    Four bits are in groups, symmetric or with zero points, which are packed along the rows; eight bits have one scale a
    row.
    """

    family: ClassVar[str] = "compressed-tensors pack-quantized"
    is_fused: ClassVar[bool] = True

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        *lead, n, k = shape
        words = 32 // self.format.bits
        scales = self.format.groups(k) or 1
        rules = {
            "weight_packed": Rule(("I32",), ((*lead, n, -(-k // words)),)),
            "weight_scale": Rule(FLOATS, ((*lead, n, scales),)),
            # Fused files have been published without it.
            "weight_shape": Rule(("I64",), ((len(shape),),), optional=bool(lead), whole=True),
        }
        if self.format.has_zeros:
            rules["weight_zero_point"] = Rule(("I32",), ((*lead, -(-n // words), scales),))
        return rules

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        n, k = shape
        bits = self.format.bits
        if "weight_shape" in tensors:
            given = tensors["weight_shape"][-2:]
            check_values("weight_shape", f"the weight's {[n, k]}", torch.tensor(shape, device=given.device), given)
        codes = unpack_words(tensors["weight_packed"], bits, 32 // bits * tensors["weight_packed"].shape[-1])
        check_values("weight_packed", "zero behind the last code of a row", 0, codes[:, k:])
        codes, scales = codes[:, :k], tensors["weight_scale"]
        check_finite("weight_scale", scales)
        if self.format.group is None:
            return NaturalWeight(codes ^ 0x80, row_scales=scales.float()[:, 0])
        if not self.format.has_zeros:
            return NaturalWeight(codes, scales)
        words = tensors["weight_zero_point"].T
        zeros = unpack_words(words, bits, 32 // bits * words.shape[-1])
        check_values("weight_zero_point", "zero behind the last row", 0, zeros[:, n:])
        return NaturalWeight(codes, scales, zeros[:, :n].T.contiguous())

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        codes, scales, zeros, row_scales = weight
        bits = self.format.bits
        if row_scales is not None:
            codes, scales = codes ^ 0x80, row_scales[:, None]
        assert scales is not None
        tensors = {"weight_packed": pack_words(codes, bits, torch.int32), "weight_scale": scales}
        if "weight_shape" not in like:
            tensors["weight_shape"] = torch.tensor(codes.shape, device=codes.device)
        if zeros is not None:
            tensors["weight_zero_point"] = pack_words(zeros.T, bits, torch.int32).T.contiguous()
        return tensors


@dataclass(frozen=True)
class Floats8(Fp8Storage):
    """``float-quantized``: e4m3 codes with one scale a row, a tensor, or a block of 128 x 128."""

    family: ClassVar[str] = "compressed-tensors float-quantized"
    scale: ClassVar[str] = "weight_scale"
    activation_scale: ClassVar[str] = "input_scale"


@dataclass(frozen=True)
class NvFloats4(Fp4Storage):
    """``nvfp4-pack-quantized``: the global scale divides."""

    family: ClassVar[str] = "compressed-tensors nvfp4-pack-quantized"
    codes: ClassVar[str] = "weight_packed"
    global_scale: ClassVar[str] = "weight_global_scale"
    activation_scale: ClassVar[str] = "input_global_scale"
    scalar_shape: ClassVar[tuple[int, ...]] = (1,)

    def row_scale(self, global_scale: torch.Tensor) -> torch.Tensor:
        """See :class:`Fp4Storage`."""
        return global_scale.reciprocal()

    def global_scales(self, row_scale: torch.Tensor) -> torch.Tensor:
        """See :class:`Fp4Storage`."""
        # The reciprocal of a reciprocal may be its neighbour.
        near = row_scale.reciprocal()
        return torch.stack((near, *(torch.nextafter(near, torch.full_like(near, end)) for end in (0.0, torch.inf))))

    def is_same(self, given: torch.Tensor, read: torch.Tensor) -> bool:
        """Some factors are no float32 number's reciprocal, rounded; the next one is written then."""
        return super().is_same(given, read) or (
            given.ndim == 1 and torch.allclose(given, read, rtol=2.0**-23, atol=0.0)
        )


@dataclass(frozen=True)
class MxFloats4(Storage):
    """``mxfp4-pack-quantized``: e2m1 codes, lowest bits first, and a power of two for each 32."""

    family: ClassVar[str] = "compressed-tensors mxfp4-pack-quantized"
    is_fused: ClassVar[bool] = True

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        *lead, n, k = shape
        return {
            "weight_packed": Rule(("U8",), ((*lead, n, k // 2),)),
            "weight_scale": Rule(("U8", "F8_E8M0"), ((*lead, n, self.format.groups(k)),)),
            "input_global_scale": Rule(FLOATS, scalar_shapes(tuple(lead)), optional=True),
        }

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        scales = in_order(tensors["weight_scale"]).view(torch.float8_e8m0fnu)
        check_finite("weight_scale", scales)
        if "input_global_scale" in tensors:
            check_finite("input_global_scale", tensors["input_global_scale"], negative=False)
        return NaturalWeight(unpack_words(tensors["weight_packed"], 4, shape[1]), scales)

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        assert weight.scales is not None
        scales = weight.scales.view(torch.uint8)
        if "weight_scale" in like:
            scales = scales.view(like["weight_scale"].dtype)
        return {"weight_packed": pack_words(weight.codes, 4, torch.uint8), "weight_scale": scales}


def storage_of(format: WeightFormat) -> tuple[Storage, dict[str, Any]]:
    """How compressed-tensors stores a format, and what its config says of such weights.

    Raises:
        ValueError: it has no such format.
    """
    of_group = {"group_size": format.group, "symmetric": not format.has_zeros}
    integers = {"type": "int", "num_bits": format.bits}
    floats = {"type": "float", "num_bits": format.bits, "symmetric": True}
    if format.codes == "int4":
        return PackedIntegers(format), {**integers, "strategy": "group", **of_group}
    if format.codes == "int8":
        return PackedIntegers(format), {**integers, "strategy": "channel", "symmetric": True}
    if format.codes == "e4m3" and format.group:
        return Floats8(format, "block"), {**floats, "strategy": "block", "block_structure": [BLOCK, BLOCK]}
    if format.codes == "e4m3":
        return Floats8(format, "channel"), {**floats, "strategy": "channel"}
    if format.codes == "e2m1" and format.has_row_scales:
        return NvFloats4(format), {**floats, "strategy": "tensor_group", "group_size": format.group}
    if format.codes == "e2m1":
        return MxFloats4(format), {**floats, "strategy": "group", "group_size": format.group}
    raise ValueError(f"compressed-tensors has no format for {format.name}")
