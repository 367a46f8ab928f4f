"""Both products of the tiles, of plain weights or of codes: which kernel multiplies."""

from __future__ import annotations

import torch

from cupymoe.kernels.coded_tiles import Scales
from cupymoe.kernels.expert_tiles import AdapterStep, TileShape
from cupymoe.kernels.experts_down_codes_wgmma import experts_down_codes_wgmma
from cupymoe.kernels.experts_down_wgmma import experts_down_wgmma
from cupymoe.kernels.experts_up_codes_wgmma import experts_up_codes_wgmma
from cupymoe.kernels.experts_up_wgmma import experts_up_wgmma
from cupymoe.kernels.sort_by_expert import Slots


def up_product(
    hidden_states: torch.Tensor,
    gate_up_proj: torch.Tensor,
    scales: Scales | None,
    slots: Slots,
    shape: TileShape,
    bias: torch.Tensor | None = None,
    gate_up: torch.Tensor | None = None,
    adapter: AdapterStep | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`experts_up_wgmma`, and with ``scales`` :func:`experts_up_codes_wgmma`, which takes no adapter."""
    if scales is None:
        return experts_up_wgmma(hidden_states, gate_up_proj, slots, shape, bias, gate_up, adapter, out)
    return experts_up_codes_wgmma(hidden_states, gate_up_proj, scales, slots, shape, bias, gate_up, out)


def down_product(
    intermediate: torch.Tensor,
    down_proj: torch.Tensor,
    scales: Scales | None,
    slots: Slots,
    shape: TileShape,
    bias: torch.Tensor | None = None,
    adapter: AdapterStep | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`experts_down_wgmma`, and with ``scales`` :func:`experts_down_codes_wgmma`, which takes no adapter."""
    if scales is None:
        return experts_down_wgmma(intermediate, down_proj, slots, shape, bias, adapter, out=out)
    return experts_down_codes_wgmma(intermediate, down_proj, scales, slots, shape, bias, out)
