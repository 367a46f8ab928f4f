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
from cupymoe.kernels.coded_tiles import SLOTS
from cupymoe.kernels.dtypes import INDEX_TYPES, SCALARS
from cupymoe.kernels.expert_map import MapKind
from cupymoe.kernels.expert_stream import Shape, shape_of
from cupymoe.kernels.expert_tiles import CUTS, TileShape, tile_shape_of
from cupymoe.kernels.jit import Variant
from cupymoe.kernels.load import Load
from cupymoe.kernels.stored_weight import PLAIN_WEIGHT, stored_weight
from cupymoe.kernels.stream_regimes import regime
from cupymoe.kernels.unsorted_pairs import PairsKind
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
                for has_weights, its_map in product((False, True), (None, _map_over(num_experts))):
                    yield sort_by_expert.variant(
                        index_dtype, num_experts, sizes.top_k_experts, block, has_weights, its_map
                    )
    yield raw_read.variant()
    yield plan_batch.variant(sizes.num_experts)
    for shape in _fused_shapes(arch):
        yield plan_chunks.variant(shape.num_experts, shape.regime.tokens)
        if shape.dtype == torch.bfloat16 and shape.intermediate_size == sizes.moe_intermediate_size:
            for pairs_per_lane in (1, 2, 4, 8):
                for its_map in (None, _map_over(shape.num_experts)):
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
            its_map = _map_over(shape.num_experts)
            yield experts_up.variant(replace(shape, expert_map=its_map))
            yield experts_down.variant(replace(shape, expert_map=its_map))
            for gathered in (False, True):
                yield lora_shrink_chunks.variant(replace(adapted, expert_map=its_map), gathered=gathered)
    for shape in _quantised_shapes(arch):
        yield experts_up.variant(shape)
        yield experts_down.variant(shape)
    for tile_shape in _tile_shapes():
        yield experts_up_wgmma.variant(tile_shape)
        yield experts_up_wgmma.variant(replace(tile_shape, keeps_gate_up=True))
        yield experts_down_wgmma.variant(tile_shape)
        yield experts_down_wgmma.variant(tile_shape.up_back)
        if not tile_shape.down_rank and not tile_shape.has_down_bias:
            yield experts_down_wgmma.variant(replace(tile_shape, scatters=True))
        for stores_weighted in (False, True):
            yield experts_down_back_wgmma.variant(tile_shape, stores_weighted)
    for tile_shape in _unsorted_tile_shapes():
        yield experts_up_wgmma.variant(tile_shape)
        yield experts_down_wgmma.variant(tile_shape)
    for dtype, narrowed in ((torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)):
        yield operand_rows.variant(dtype, sizes.hidden_size, narrowed)
    for tile_shape in _coded_tile_shapes():
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


def _map_over(num_experts: int) -> MapKind:
    """As each of four devices has it that share the experts."""
    return MapKind(torch.int32, 4 * num_experts)


def _fused_shapes(arch: Arch) -> Iterator[Shape]:
    """Every regime of the fused backend at Gemma 4's sizes, and at a tensor-parallel slice that fits no whole row; of
    GPT-OSS's kind of experts too. Every kind of experts in one regime. Each is compiled with adapters, too."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()

    def shape(
        num_tokens: int,
        dtype: torch.dtype,
        intermediate_size: int = sizes.moe_intermediate_size,
        activation: MoEActivation = sizes.activation,
        transposed: bool = False,
        has_bias: bool = False,
    ) -> Shape:
        return shape_of(
            regime(Load.of(num_tokens, sizes.top_k_experts, sizes.num_experts), intermediate_size, arch),
            dtype,
            torch.int64,
            activation,
            sizes.num_experts,
            sizes.hidden_size,
            intermediate_size,
            sizes.top_k_experts,
            transposed,
            transposed,
            has_bias,
            has_bias,
            arch=arch,
            sorted_pairs=num_tokens > 1024,
        )

    for num_tokens in (16, 64, 256, 512, 1024) if arch.wgmma else (16, 64, 256, 512, 1024, 4096):
        for dtype in (torch.bfloat16, torch.float16):
            yield shape(num_tokens, dtype)
            yield shape(num_tokens, dtype, sizes.moe_intermediate_size // 4)
        yield shape(num_tokens, torch.bfloat16, activation=MoEActivation.SWIGLUOAI, transposed=True, has_bias=True)
    for activation in (sizes.activation, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL):
        for transposed, has_bias in product((False, True), repeat=2):
            yield shape(64, torch.float16, activation=activation, transposed=transposed, has_bias=has_bias)


QUANTISED: tuple[tuple[str, torch.dtype | None], ...] = (
    ("int4_g32", torch.bfloat16),
    ("int4_g128", torch.float16),
    ("int4_g64_zero", torch.bfloat16),
    ("int8", None),
    ("fp8", None),
    ("fp8_g128", torch.float32),
    ("nvfp4", torch.float8_e4m3fn),
    ("mxfp4", torch.float8_e8m0fnu),
)
"""Formats with the dtype of their scales, one of each kind of code that the weight stream has."""


def _quantised_shapes(arch: Arch) -> Iterator[Shape]:
    """The first kind of codes in every regime, with both dtypes, and with adapters in one; the others in one regime."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()
    few = 16
    for index, (weight_format, scale_dtype) in enumerate(QUANTISED):
        stored = stored_weight(weight_format, scale_dtype)
        for num_tokens in (few, 1, 64, 128, 256, 512, 1024) if arch.wgmma else (few, 64, 256, 512, 4096):
            if index > 0 and num_tokens != few:
                continue
            load = Load.of(num_tokens, sizes.top_k_experts, sizes.num_experts)
            for dtype in (torch.float16, torch.bfloat16):
                shape = shape_of(
                    regime(load, sizes.moe_intermediate_size, arch, has_codes=True),
                    dtype,
                    torch.int64,
                    sizes.activation,
                    sizes.num_experts,
                    sizes.hidden_size,
                    sizes.moe_intermediate_size,
                    sizes.top_k_experts,
                    arch=arch,
                    sorted_pairs=num_tokens > 1024,
                    gate_up_stored=stored,
                    down_stored=stored,
                )
                yield shape
            yield replace(shape, gate_up_rank=lora_shrink.RANK_MULTIPLE, down_rank=lora_shrink.MAX_RANK)


def _tile_shapes() -> Iterator[TileShape]:
    """Each cut at Gemma 4's sizes, whole, in four tensor-parallel slices, and with adapters on weights of both layouts;
    the tiles of a single token; each other kind of experts at one cut."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()
    for (blocks, products), transposed in product(CUTS, (False, True)):
        yield tile_shape_of(
            blocks,
            products,
            torch.bfloat16,
            sizes.activation,
            sizes.num_experts,
            sizes.hidden_size,
            sizes.moe_intermediate_size,
            transposed,
            transposed,
            gate_up_rank=lora_shrink.RANK_MULTIPLE,
            down_rank=lora_shrink.RANK_MULTIPLE,
        )
    for dtype in (torch.bfloat16, torch.float16):
        yield tile_shape_of(
            *CUTS[-1],
            dtype,
            sizes.activation,
            sizes.num_experts,
            sizes.hidden_size,
            sizes.moe_intermediate_size,
            few_pairs=sizes.top_k_experts,
        )
    for intermediate_size in (sizes.moe_intermediate_size, sizes.moe_intermediate_size // 4):
        for blocks, products in CUTS:
            for dtype in (torch.bfloat16, torch.float16):
                yield tile_shape_of(
                    blocks, products, dtype, sizes.activation, sizes.num_experts, sizes.hidden_size, intermediate_size
                )
    activations = (sizes.activation, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL)
    for index, (activation, transposed, has_bias) in enumerate(product(activations, (False, True), (False, True))):
        yield tile_shape_of(
            *CUTS[index % len(CUTS)],
            torch.bfloat16,
            activation,
            sizes.num_experts,
            sizes.hidden_size,
            sizes.moe_intermediate_size,
            transposed,
            transposed,
            has_bias,
            has_bias,
        )


def _unsorted_tile_shapes() -> Iterator[TileShape]:
    """Of a single token and of sixteen at Gemma 4's sizes, with each type of indices and with a map; each other kind of
    experts of a single token."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()

    def shape(
        kind: PairsKind,
        dtype: torch.dtype,
        few_pairs: int,
        activation: MoEActivation = sizes.activation,
        transposed: bool = False,
        has_bias: bool = False,
    ) -> TileShape:
        return tile_shape_of(
            *CUTS[-1],
            dtype,
            activation,
            sizes.num_experts,
            sizes.hidden_size,
            sizes.moe_intermediate_size,
            transposed,
            transposed,
            has_bias,
            has_bias,
            few_pairs=few_pairs,
            unsorted=kind,
        )

    of_map = PairsKind(torch.int32, sizes.top_k_experts, _map_over(sizes.num_experts))
    for kind in (*(PairsKind(dtype, sizes.top_k_experts) for dtype in INDEX_TYPES), of_map):
        for dtype, few_pairs in product((torch.bfloat16, torch.float16), (sizes.top_k_experts, 0)):
            yield shape(kind, dtype, few_pairs)
    activations = (sizes.activation, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL)
    for activation, transposed, has_bias in product(activations, (False, True), (False, True)):
        kind = PairsKind(torch.int64, sizes.top_k_experts)
        yield shape(kind, torch.bfloat16, sizes.top_k_experts, activation, transposed, has_bias)


def _coded_tile_shapes() -> Iterator[TileShape]:
    """Each codec at Gemma 4's sizes in both dtypes, int4 with each dtype of its scales; int4 and NVFP4 with each other
    kind of experts, with biases. By the largest tiles, and in turn by one of the smaller ones; the first by all."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()

    *smaller, largest = SLOTS

    def shape(
        kind: tuple[str, torch.dtype | None], dtype: torch.dtype, activation: MoEActivation, slots: int = largest
    ) -> TileShape:
        has_bias = activation != sizes.activation
        return tile_shape_of(
            *CUTS[0],
            dtype,
            activation,
            sizes.num_experts,
            sizes.hidden_size,
            sizes.moe_intermediate_size,
            has_gate_up_bias=has_bias,
            has_down_bias=has_bias,
            gate_up_stored=stored_weight(*kind),
            down_stored=stored_weight(*kind),
            coded_slots=slots,
        )

    kinds = (*QUANTISED, ("int4_g32", torch.float16), ("int4_g32", torch.float32))
    for index, (kind, dtype) in enumerate(product(kinds, (torch.bfloat16, torch.float16))):
        yield shape(kind, dtype, sizes.activation)
        for slots in smaller if index == 0 else (smaller[index % len(smaller)],):
            yield shape(kind, dtype, sizes.activation, slots)
    for kind, activation in product(
        (QUANTISED[0], QUANTISED[6]), (MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL)
    ):
        yield shape(kind, torch.bfloat16, activation)
