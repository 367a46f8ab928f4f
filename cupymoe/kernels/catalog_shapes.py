"""What the fused backend's kernels in the catalog are compiled for: shapes of the weight stream and of the tiles that
stand for all, at Gemma 4's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from cupymoe.activation import MoEActivation
from cupymoe.config import Gemma4MoEConfig
from cupymoe.kernels import lora_shrink
from cupymoe.kernels.arch import Arch
from cupymoe.kernels.coded_tiles import SLOTS
from cupymoe.kernels.dtypes import INDEX_TYPES
from cupymoe.kernels.expert_map import MapKind
from cupymoe.kernels.expert_stream import Shape, shape_of
from cupymoe.kernels.expert_tiles import CUTS, TileShape, tile_shape_of
from cupymoe.kernels.load import Load
from cupymoe.kernels.stored_weight import stored_weight
from cupymoe.kernels.stream_regimes import Regime, regime
from cupymoe.kernels.unsorted_pairs import PairsKind


def map_over(num_experts: int) -> MapKind:
    """The kind of map that each of four devices has which share the experts."""
    return MapKind(torch.int32, 4 * num_experts)


def stream_shapes(arch: Arch) -> Iterator[Shape]:
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


def quantised_stream_shapes(arch: Arch) -> Iterator[Shape]:
    """The first kind of codes in every regime, with both dtypes, and with adapters in one; the others in one regime."""
    sizes = Gemma4MoEConfig.gemma4_26b_a4b()
    regimes: dict[Regime, int] = {}  # each with the first of these numbers of tokens that it serves
    for num_tokens in (16, 1, 4, 64, 128, 256, 512, 1024 if arch.wgmma else 4096):
        load = Load.of(num_tokens, sizes.top_k_experts, sizes.num_experts)
        regimes.setdefault(regime(load, sizes.moe_intermediate_size, arch, has_codes=True), num_tokens)
    for index, (weight_format, scale_dtype) in enumerate(QUANTISED):
        stored = stored_weight(weight_format, scale_dtype)
        for chosen, num_tokens in [*regimes.items()][: 1 if index else None]:
            for dtype in (torch.float16, torch.bfloat16):
                shape = shape_of(
                    chosen,
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


def tile_shapes() -> Iterator[TileShape]:
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


def unsorted_tile_shapes() -> Iterator[TileShape]:
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

    of_map = PairsKind(torch.int32, sizes.top_k_experts, map_over(sizes.num_experts))
    for kind in (*(PairsKind(dtype, sizes.top_k_experts) for dtype in INDEX_TYPES), of_map):
        for dtype, few_pairs in product((torch.bfloat16, torch.float16), (sizes.top_k_experts, 0)):
            yield shape(kind, dtype, few_pairs)
    activations = (sizes.activation, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL)
    for activation, transposed, has_bias in product(activations, (False, True), (False, True)):
        kind = PairsKind(torch.int64, sizes.top_k_experts)
        yield shape(kind, torch.bfloat16, sizes.top_k_experts, activation, transposed, has_bias)


def coded_tile_shapes() -> Iterator[TileShape]:
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
