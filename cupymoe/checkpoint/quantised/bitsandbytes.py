"""bitsandbytes' 4-bit files: nf4 codes in blocks of 64, whose absmax may be quantised itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from cupymoe.checkpoint.quantised.storage import (
    BadTensorError,
    NaturalWeight,
    Rule,
    Storage,
    check_finite,
    pack_words,
    unpack_words,
)

_STATE = "weight.quant_state.bitsandbytes__nf4"
_NESTED_BLOCK = 256


@dataclass(frozen=True)
class Nf4(Storage):
    """Codes with the first of two in a byte's high half; blocks run through the flat matrix, so a row must be whole
    blocks."""

    is_nested: bool
    """Whether the absmax of blocks are bytes, with a table and an absmax of their own."""

    family: ClassVar[str] = "bitsandbytes"

    def rules(self, shape: tuple[int, ...], parts: int = 1) -> dict[str, Rule]:
        """See :class:`Storage`."""
        n, k = shape
        blocks = n * self.format.groups(k)
        rules = {
            "weight": Rule(("U8",), ((n * k // 2, 1),)),
            "weight.absmax": Rule(("U8",) if self.is_nested else ("F32",), ((blocks,),)),
            "weight.quant_map": Rule(("F32",), ((16,),)),
            _STATE: Rule(("U8",), ((-1,),)),
        }
        if self.is_nested:
            rules["weight.nested_absmax"] = Rule(("F32",), ((-(-blocks // _NESTED_BLOCK),),))
            rules["weight.nested_quant_map"] = Rule(("F32",), ((256,),))
        return rules

    def read(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> NaturalWeight:
        """See :class:`Storage`."""
        n, k = shape
        state = self._state(tensors[_STATE], shape)
        table = torch.tensor(self.format.values, device=tensors["weight.quant_map"].device)
        if not torch.equal(tensors["weight.quant_map"], table):
            raise BadTensorError("weight.quant_map", "must be bitsandbytes' table of nf4, got another one")
        absmax = tensors["weight.absmax"]
        if self.is_nested:
            factors, offset = self._nested(tensors, state, len(absmax))
            absmax = tensors["weight.nested_quant_map"][absmax.long()] * factors + offset
        check_finite("weight.absmax", absmax)
        codes = unpack_words(tensors["weight"].reshape(n, k // 2), 4, k)
        return NaturalWeight(_swapped(codes), absmax.reshape(n, -1))

    def write(self, weight: NaturalWeight, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See :class:`Storage`."""
        codes, scales, _, _ = weight
        assert scales is not None
        absmax = scales.flatten()
        shape = tuple(codes.shape)
        tensors = {"weight": pack_words(_swapped(codes), 4, torch.uint8).reshape(-1, 1)}
        if self.is_nested:
            if "weight.absmax" not in like:
                raise ValueError("a nested absmax can only be written like that of a file")
            factors, offset = self._nested(like, self._state(like[_STATE], shape), len(absmax))
            steps = (absmax - offset) / factors
            tensors["weight.absmax"] = _nearest(like["weight.nested_quant_map"], steps)
            return tensors
        tensors["weight.absmax"] = absmax
        if _STATE not in like:
            state = {"quant_type": "nf4", "blocksize": self.format.group, "dtype": "bfloat16", "shape": [*shape]}
            tensors[_STATE] = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8, device=codes.device)
            tensors["weight.quant_map"] = torch.tensor(self.format.values, device=codes.device)
        return tensors

    def _state(self, tensor: torch.Tensor, shape: tuple[int, ...]) -> dict[str, Any]:
        """What the JSON of a weight says, once it is seen to be of this one."""
        try:
            state = json.loads(bytes(tensor.tolist()))
        except ValueError as error:
            raise BadTensorError(_STATE, f"must be JSON: {error}") from error
        wanted: dict[str, Any] = {"quant_type": "nf4", "blocksize": self.format.group, "shape": [*shape]}
        if self.is_nested:
            wanted["nested_blocksize"] = _NESTED_BLOCK
        given = {name: state.get(name) for name in wanted} if isinstance(state, dict) else state
        if given != wanted:
            raise BadTensorError(_STATE, f"must say {wanted}, got {given}")
        assert isinstance(state, dict)
        return state

    @staticmethod
    def _nested(
        tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], blocks: int
    ) -> tuple[torch.Tensor, float]:
        """The factor of each block's absmax, ``[blocks]``, and what is added to all."""
        offset = state.get("nested_offset")
        if not isinstance(offset, float):
            raise BadTensorError(_STATE, f"must have the number nested_offset, got {offset!r}")
        for name in ("weight.nested_absmax", "weight.nested_quant_map"):
            check_finite(name, tensors[name])
        return tensors["weight.nested_absmax"].repeat_interleave(_NESTED_BLOCK)[:blocks], offset


def _swapped(codes: torch.Tensor) -> torch.Tensor:
    """The codes of each pair the other way round."""
    return codes.reshape(len(codes), -1, 2).flip(-1).flatten(-2)


def _nearest(table: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The index of the nearest entry of a rising table, uint8."""
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(values, middles).to(torch.uint8)
