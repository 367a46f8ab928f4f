"""The weight stream without a GPU: rings, limits, and what its kernels compile to."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch

from cupymoe import MoEActivation
from cupymoe.kernels import expert_stream, experts_down, experts_up, lora_shrink_chunks
from cupymoe.kernels.arch import HOPPER
from cupymoe.kernels.expert_stream import Shape
from cupymoe.kernels.load import Load
from cupymoe.kernels.plan_experts import WARPS
from cupymoe.kernels.stream_regimes import Tiling, regime
from tests.helpers import compiled

SHARED_BYTES_OF_HOPPER = 227 * 1024
RESERVED_BYTES = 1024  # of each block, by the system, of one more KB

# (experts, hidden, intermediate, top_k): Gemma 4 and its slices, Qwen3, Mixtral, and sizes that divide badly.
SIZES = [
    (128, 2816, 704, 8),
    (128, 2816, 352, 8),
    (128, 2816, 176, 8),
    (128, 2048, 768, 8),
    (8, 4096, 14336, 2),
    (60, 256, 176, 6),
    (192, 128, 2048, 6),
    (72, 1000, 504, 5),
    (40, 136, 72, 3),
]
PAIRS_PER_EXPERT = [0, 4, 16, 32, 64]  # one of each regime
EITHER = [*itertools.product((False, True), repeat=2)]  # of both projections


def shape(num_tokens, num_experts, hidden, intermediate, top_k, activation=MoEActivation.GELU_TANH, **kind):
    chosen = regime(Load.of(num_tokens, top_k, num_experts), intermediate)
    sizes = num_experts, hidden, intermediate, top_k
    return Shape(chosen, torch.bfloat16, torch.int64, activation, *sizes, **kind)


def kinds(num_tokens, *sizes):
    """Shapes of every layout of gate and up, of contiguous and transposed weights, with biases and without, with
    adapters and without."""
    for activation in (MoEActivation.SILU, MoEActivation.SWIGLUOAI, MoEActivation.RELU2_NO_MUL):
        for transposed, biased in EITHER:
            kind = {
                "gate_up_transposed": transposed,
                "down_transposed": transposed,
                "has_gate_up_bias": biased,
                "has_down_bias": biased,
            }
            yield shape(num_tokens, *sizes, activation, **kind)
            yield shape(num_tokens, *sizes, activation, **kind, gate_up_rank=48, down_rank=16)


@pytest.mark.parametrize("transposed", EITHER)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("pairs_per_expert", PAIRS_PER_EXPERT)
def test_rings_fit_a_multiprocessor(pairs_per_expert, sizes, transposed):
    num_experts, hidden, intermediate, _ = sizes
    layout = dict(zip(("gate_up_transposed", "down_transposed"), transposed, strict=True))
    its_shape = shape(max(1, pairs_per_expert * num_experts), num_experts, hidden, intermediate, 1, **layout)
    chosen, tiles = its_shape.regime, (its_shape.up, its_shape.down)
    each = [tile.shared_bytes(chosen.tokens) for tile in tiles]
    for tile, shared_bytes in zip(tiles, each, strict=True):
        assert shared_bytes <= SHARED_BYTES_OF_HOPPER
        assert tile.blocks_per_sm * (shared_bytes + 2048) <= SHARED_BYTES_OF_HOPPER + 2048  # barriers, and the system's
    if chosen.inline_pairs and not any(transposed):  # both at once, each with its plan and two barriers a stage
        plan_bytes = chosen.inline_pairs * (4 + 4 + 16 + 4)
        barriers = sum(2 * 8 * tile.stages for tile in tiles)
        assert sum(each) + 2 * plan_bytes + barriers + RESERVED_BYTES <= SHARED_BYTES_OF_HOPPER


@pytest.mark.parametrize("pairs_per_expert", PAIRS_PER_EXPERT)
def test_each_projection_s_tile_is_that_of_its_layout(pairs_per_expert):
    """64 rows side by side at least: what is read of a transposed weight at one k is a cache line or more."""
    for of_gate_up, of_down in EITHER:
        num_tokens = max(1, pairs_per_expert * 32)
        mixed = shape(num_tokens, 32, 2880, 2880, 1, gate_up_transposed=of_gate_up, down_transposed=of_down)
        transposed = mixed.regime.transposed
        assert mixed.up is (transposed if of_gate_up else mixed.regime.up)
        assert mixed.down is (transposed if of_down else mixed.regime.down)
        assert transposed.warps // transposed.k_warps * 16 >= 64
        assert not transposed.whole_rows


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(32, 2880, 2880, 4), (40, 136, 72, 3)])  # GPT-OSS's, and some that fit no tile
@pytest.mark.parametrize("pairs_per_expert", PAIRS_PER_EXPERT)
def test_every_kind_of_experts_compiles_without_spills(pairs_per_expert, sizes):
    for each in kinds(max(1, pairs_per_expert * sizes[0] // sizes[3]), *sizes):
        for variant in (experts_up.variant(each), experts_down.variant(each)):
            report = compiled(variant, "sm_90a")
            assert report.registers > 0
            assert report.spill_bytes == 0, report.log
            assert "warning" not in report.log, report.log


@pytest.mark.parametrize("intermediate", [704, 352])
@pytest.mark.parametrize("rank", [16, 128])
def test_with_an_adapter_three_kernels_fit_a_multiprocessor(rank, intermediate):
    """Of few tokens: experts_down begins beside experts_up and the block of lora_shrink_chunks between them."""
    its_shape = shape(1, 128, 2816, intermediate, 8, gate_up_rank=rank, down_rank=rank)
    blocks = [
        (experts_up.variant(its_shape), its_shape.up.threads, its_shape.up.shared_bytes(8)),
        (experts_down.variant(its_shape), its_shape.down.threads, its_shape.down.shared_bytes(8)),
        (lora_shrink_chunks.variant(its_shape, gathered=False), 256, 0),
    ]
    registers = shared_bytes = 0
    for variant, threads, dynamic in blocks:
        report = compiled(variant, "sm_90a")
        static = int(re.search(r"(\d+) bytes smem", report.log).group(1))
        registers += -(-report.registers // 8) * 8 * threads
        shared_bytes += static + dynamic + RESERVED_BYTES
    assert registers <= 65536
    assert shared_bytes <= SHARED_BYTES_OF_HOPPER + RESERVED_BYTES


@pytest.mark.parametrize(("tile", "blocks"), [(Tiling(256, 3), 132), (Tiling(256, 3, blocks_per_sm=2), 264)])
def test_the_grid_is_what_is_resident_at_once(monkeypatch, tile, blocks):
    hopper = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    assert expert_stream.grid(tile, 0) == (blocks, 1)


def test_limits_are_the_plan_s():
    """One block, of a thread for each expert, with counters of each warp and 2 bytes a pair."""
    counters = WARPS * expert_stream.MAX_EXPERTS * 4
    assert WARPS * 32 >= expert_stream.MAX_EXPERTS
    assert counters + 2 * expert_stream.MAX_PAIRS + 2 * WARPS * 4 <= HOPPER.shared_bytes_of_block
