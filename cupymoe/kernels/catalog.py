"""Every CUDA source with the variants that stand for it: what CI compiles for every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, product

import torch

from cupymoe.activation import MoEActivation
from cupymoe.config import Gemma4MoEConfig
from cupymoe.kernels import (
    combine,
    dequantize,
    experts_down,
    experts_down_back_wgmma,
    experts_down_codes_wgmma,
    experts_down_wgmma,
    experts_outer_wgmma,
    experts_up,
    experts_up_codes_wgmma,
    experts_up_wgmma,
    gated_activation,
    gather,
    grouped_linear,
    grouped_outer,
    lora_back,
    lora_outer,
    lora_shrink,
    lora_shrink_chunks,
    operand_rows,
    pack_adapter,
    plan_batch,
    plan_chunks,
    plan_experts,
    raw_read,
    route,
    router_logits,
    router_logits_many,
    sort_by_expert,
    sum_parts,
)
from cupymoe.kernels.arch import ARCHITECTURES, HOPPER, Arch
from cupymoe.kernels.catalog_shapes import (
    coded_tile_shapes,
    map_over,
    quantised_stream_shapes,
    stream_shapes,
    tile_shapes,
    unsorted_tile_shapes,
)
from cupymoe.kernels.dtypes import INDEX_TYPES, SCALARS
from cupymoe.kernels.jit import Variant
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT
from cupymoe.weights.format import FORMATS

HOPPER_ONLY = (
    "experts_up_wgmma",
    "experts_down_wgmma",
    "experts_down_back_wgmma",
    "sum_parts",
    "experts_outer_wgmma",
    "lora_shrink",
    "lora_outer",
    "lora_back",
    "operand_rows",
    "experts_up_codes_wgmma",
    "experts_down_codes_wgmma",
)
"""The sources of the fused backend that need wgmma, or come before or after one that does
(cupymoe/backends/fused.py)."""


def is_served(source: str, arch: Arch) -> bool:
    """Whether calls on an architecture may reach a source."""
    return arch == HOPPER or source not in HOPPER_ONLY


def architectures(source: str) -> tuple[str, ...]:
    """NVRTC's names of the listed architectures that a source is served on, and so compiled for."""
    return tuple(arch.name for arch in ARCHITECTURES if is_served(source, arch))


def compilations(source: str) -> Iterator[tuple[Variant, str]]:
    """What is compiled of a source without a GPU, with NVRTC's name of an architecture: all variants for the oldest one
    and for Hopper, and one for each other."""
    for arch in ARCHITECTURES:
        if is_served(source, arch):
            each = (variant for variant in variants(arch) if variant.source == source)
            all_of_them = arch in (ARCHITECTURES[0], HOPPER)
            yield from ((variant, arch.name) for variant in (each if all_of_them else islice(each, 1)))


def variants(arch: Arch = HOPPER) -> Iterator[Variant]:
    """Every dtype, index type, vector width, regime and cut at Gemma 4's sizes, each compilation once, of those that an
    architecture may reach.

    Every activation of ``gated_activation``; the fused backend's kernels with Gemma 4's own and with one of every other
    layout of gate and up, and with int64 indices.
    """
    yield from dict.fromkeys(each for each in _variants(arch) if is_served(each.source, arch))


def _variants(arch: Arch) -> Iterator[Variant]:
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()
    for dtype in SCALARS:
        for width in (16 // dtype.itemsize, 1):
            for activation in MoEActivation:
                yield gated_activation.variant(dtype, activation, sizes.moe_intermediate_size, width)
            yield gather.variant(dtype, sizes.hidden_size, width, sizes.top_k_experts)
            for kind in ({"weighted": False}, {"weighted": True}, {"few": True}):
                yield combine.rows_variant(dtype, sizes.hidden_size, width, sizes.top_k_experts, **kind)
        for row_dtype, output_dtype in ((dtype, dtype), (dtype, torch.float32), (torch.float32, torch.float32)):
            yield grouped_linear.variant(row_dtype, dtype, output_dtype)
        for format in FORMATS.values():
            yield dequantize.variant(format, sizes.hidden_size, next(iter(format.scale_dtypes), None), dtype)
        if dtype != torch.float32:  # a quantised weight, which is dequantised to float32
            yield grouped_linear.variant(dtype, torch.float32, torch.float32)
        for row_dtype in (dtype, torch.float32):
            yield grouped_outer.variant(row_dtype, row_dtype, dtype)
        for given in (dtype, torch.float32):
            for old_sources in (False, True):
                yield pack_adapter.variant(given, dtype, old_sources=old_sources)
        for of_tokens in (router_logits, router_logits_many):
            yield of_tokens.variant(dtype, sizes.hidden_size, sizes.rms_norm_eps)
        yield route.variant(dtype, dtype, sizes.num_experts, sizes.top_k_experts, renormalize=True)
        yield route.variant(dtype, torch.float32, sizes.num_experts, sizes.top_k_experts, renormalize=False)
    for index_dtype in INDEX_TYPES:
        for num_experts in (sizes.num_experts, sort_by_expert.MAX_EXPERTS):
            for num_pairs in (sort_by_expert.PAIRS_PER_BLOCK, sort_by_expert.FEW_PAIRS):
                block = sort_by_expert.block_of(num_pairs, num_experts)
                for has_weights, its_map in product((False, True), (None, map_over(num_experts))):
                    yield sort_by_expert.variant(
                        index_dtype, num_experts, sizes.top_k_experts, block, has_weights, its_map
                    )
    yield raw_read.variant()
    yield plan_batch.variant(sizes.num_experts)
    for shape in stream_shapes(arch):
        yield plan_chunks.variant(shape.num_experts, shape.regime.tokens)
        if shape.dtype == torch.bfloat16 and shape.intermediate_size == sizes.moe_intermediate_size:
            for pairs_per_lane in (1, 2, 4, 8):
                for its_map in (None, map_over(shape.num_experts)):
                    yield plan_experts.variant(
                        shape.index_dtype, shape.num_experts, shape.regime.tokens, pairs_per_lane, its_map
                    )
            yield combine.workspace_variant(shape)
        yield experts_up.variant(shape)
        yield experts_up.variant(replace(shape, keeps_gate_up=True))
        yield experts_down.variant(shape)
        adapted = replace(shape, gate_up_rank=lora_shrink.RANK_MULTIPLE, down_rank=lora_shrink.MAX_RANK)
        yield experts_up.variant(adapted)
        yield experts_down.variant(adapted)
        for gathered in (False, True):
            yield lora_shrink_chunks.variant(adapted, gathered=gathered)
        if shape.regime.inline_pairs and shape.dtype == torch.bfloat16:
            its_map = map_over(shape.num_experts)
            yield experts_up.variant(replace(shape, expert_map=its_map))
            yield experts_down.variant(replace(shape, expert_map=its_map))
            for gathered in (False, True):
                yield lora_shrink_chunks.variant(replace(adapted, expert_map=its_map), gathered=gathered)
    for shape in quantised_stream_shapes(arch):
        yield experts_up.variant(shape)
        yield experts_down.variant(shape)
    for tile_shape in tile_shapes():
        yield experts_up_wgmma.variant(tile_shape)
        yield experts_up_wgmma.variant(replace(tile_shape, keeps_gate_up=True))
        yield experts_down_wgmma.variant(tile_shape)
        yield experts_down_wgmma.variant(tile_shape.up_back)
        if not tile_shape.down_rank and not tile_shape.has_down_bias:
            yield experts_down_wgmma.variant(replace(tile_shape, scatters=True))
        for stores_weighted in (False, True):
            yield experts_down_back_wgmma.variant(tile_shape, stores_weighted)
    for tile_shape in unsorted_tile_shapes():
        yield experts_up_wgmma.variant(tile_shape)
        yield experts_down_wgmma.variant(tile_shape)
    for dtype, narrowed in ((torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
        yield operand_rows.variant(dtype, sizes.hidden_size, narrowed)
    for tile_shape in coded_tile_shapes():
        yield experts_up_codes_wgmma.variant(tile_shape)
        yield experts_up_codes_wgmma.variant(replace(tile_shape, keeps_gate_up=True))
        yield experts_down_codes_wgmma.variant(tile_shape)
        if tile_shape.gate_up_stored.format is not None and tile_shape.gate_up_stored.format.name == "int4_g32":
            yield experts_down_codes_wgmma.variant(replace(tile_shape, scatters=True))
            yield experts_up_codes_wgmma.variant(replace(tile_shape, down_stored=PLAIN_WEIGHT))
    yield sum_parts.variant(6)
    for dtype in (torch.bfloat16, torch.float16):
        for left_gathered in (False, True):
            yield experts_outer_wgmma.variant(dtype, left_gathered)
    for dtype, rank in product((torch.bfloat16, torch.float16), (lora_shrink.RANK_MULTIPLE, lora_shrink.MAX_RANK)):
        for gathered, other in product((False, True), repeat=2):
            yield lora_shrink.variant(dtype, rank, gathered=gathered, transposed=other)
            for output_dtype in (dtype, torch.float32):
                yield lora_outer.variant(dtype, output_dtype, rank, gathered=gathered, weighted=other)
    gate_up_size = sizes.activation.input_size(sizes.moe_intermediate_size)
    for columns, gathered in ((sizes.hidden_size, True), (gate_up_size, False)):
        for dtype, rank in product((torch.bfloat16, torch.float16), (lora_shrink.RANK_MULTIPLE, lora_back.MAX_RANK)):
            tiling = lora_back.tiling(columns, rank)
            assert tiling is not None
            for output_dtype, transposed in product((torch.float32, dtype), (True, False)):
                yield lora_back.variant(
                    dtype, output_dtype, rank, tiling, gathered=gathered, weighted=gathered, transposed=transposed
                )
