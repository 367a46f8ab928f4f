"""Every CUDA source with the variants that stand for it: what CI compiles for every architecture."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cupymoe.activation import MoEActivation
from cupymoe.config import Gemma4MoEConfig
from cupymoe.kernels import combine, gated_activation, gather, raw_read, route, sort_by_expert
from cupymoe.kernels.bridge import SCALARS
from cupymoe.kernels.jit import Variant


def variants() -> Iterator[Variant]:
    """Every dtype, activation, index type and vector width at Gemma 4's sizes; the widest expert count of the sort."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()
    for dtype in SCALARS:
        for width in (16 // dtype.itemsize, 1):
            for activation in MoEActivation:
                yield gated_activation.variant(dtype, activation, sizes.moe_intermediate_size, width)
            yield gather.variant(dtype, sizes.hidden_size, width, sizes.top_k_experts)
            yield combine.variant(dtype, sizes.hidden_size, width, sizes.top_k_experts)
        yield route.variant(dtype, dtype, sizes.num_experts, sizes.top_k_experts, renormalize=True)
        yield route.variant(dtype, torch.float32, sizes.num_experts, sizes.top_k_experts, renormalize=False)
    for index_dtype in (torch.int32, torch.int64):
        for num_experts in (sizes.num_experts, sort_by_expert.MAX_EXPERTS):
            yield sort_by_expert.variant(index_dtype, num_experts, sizes.top_k_experts)
    yield raw_read.variant()
