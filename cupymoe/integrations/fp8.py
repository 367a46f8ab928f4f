"""transformers' ``FP8Experts``: weights in e4m3, with a scale for each block of 128 x 128, or one for an expert.

cupymoe computes them as weights of 8 bits with hidden states of 16, where transformers rounds these to 8 bits too. The
kernels read codes in another order, so the first call lets a :class:`cupymoe.QuantizedWeight` take the place of each
parameter and its scales. No copy of more than 8 bits a weight is made.
"""

from __future__ import annotations

from typing import Any

import torch

from cupymoe.customisation import is_wrapper
from cupymoe.weights.format import FORMATS
from cupymoe.weights.quantized import QuantizedWeight, put_weight

_SCALES = "_scale_inv"
_SCALE_DTYPES = (torch.float32, torch.float8_e8m0fnu)


def take_over(experts: Any, *names: str) -> bool:
    """Let quantised weights take the place of those of the parameters ``names`` that are in e4m3; others stay.

    Returns:
        Whether there was one.

    Raises:
        ValueError: the codes or the scales of one can't be served, or a graph is being compiled. Nothing was changed
            then, or the weights before it were taken over.
    """
    found = False
    for name in names:
        weight, scales = getattr(experts, name, None), getattr(experts, name + _SCALES, None)
        if scales is not None and isinstance(weight, torch.Tensor) and weight.dtype == torch.float8_e4m3fn:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"its {name} lies as transformers has it until a call outside of torch.compile: make one first"
                )
            with torch.inference_mode(False), torch.no_grad():
                quantized = _quantized(name, weight.detach(), scales, experts.block_size)
            put_weight(experts, name, quantized)
            experts._parameters.pop(name + _SCALES)
            found = True
    return found


def _quantized(
    name: str, weight: torch.Tensor, scales: torch.Tensor, block_size: tuple[int, int] | None
) -> QuantizedWeight:
    """
    Args:
        name: what messages call the weight.
        weight: ``[E, n, k]`` e4m3.
        scales: ``[E, ceil(n / rows), ceil(k / 128)]`` by blocks of ``rows`` x 128, or ``[E, s, 1]``, where s divides n.
        block_size: of the blocks; None: there are none.
    """
    if is_wrapper(type(weight)):
        raise ValueError(f"its {name} is a {type(weight).__name__}, not a plain tensor")
    if scales.dtype not in _SCALE_DTYPES or scales.ndim != 3:
        raise ValueError(f"its {name}{_SCALES} must be a tensor [E, rows, columns] of one of {_SCALE_DTYPES}")
    rows, (_, row_blocks, column_blocks) = weight.shape[1], scales.shape
    if block_size is not None and row_blocks == -(-rows // block_size[0]):
        rows_of_block = block_size[0]
    elif rows % row_blocks == 0:
        rows_of_block = rows // row_blocks
    else:
        raise ValueError(f"its {name}{_SCALES} has {row_blocks} blocks of rows for {rows} rows")
    of_rows = scales.detach().float().repeat_interleave(rows_of_block, dim=1)[:, :rows]
    codes = weight.view(torch.uint8)
    try:
        if column_blocks == 1:
            return QuantizedWeight.of("fp8", codes, row_scales=of_rows[..., 0])
        group = FORMATS["fp8_g128"].group
        if block_size is None or block_size[1] != group:
            raise ValueError(f"blocks must have {group} columns, got {block_size}")
        return QuantizedWeight.of("fp8_g128", codes, of_rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"its {name}: {error}") from None
