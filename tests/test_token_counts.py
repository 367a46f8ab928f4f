"""The numbers of tokens that stand for all: one of every range that kernels are compiled for."""

import pytest

from cupymoe.backends.fused import stream_reason, takes_tiles, tiles_reason
from cupymoe.kernels.expert_tiles import CUTS, cut, prefers_tiles
from cupymoe.kernels.load import Load
from cupymoe.kernels.plan_experts import pairs_per_lane
from cupymoe.kernels.sort_by_expert import block_of
from cupymoe.kernels.stream_regimes import regime
from cupymoe.token_counts import NUM_TOKENS, one_of_each_way


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden_size", "intermediate_size"),
    [
        (128, 8, 2816, 704),
        (8, 2, 4096, 14336),
        (256, 8, 7168, 2048),
        (512, 10, 2048, 512),
        (1, 1, 64, 64),
        (2, 2, 64, 64),
        (64, 4, 72, 64),  # no tiles
    ],
)
def test_one_number_of_tokens_of_every_range(num_experts, top_k, hidden_size, intermediate_size, training):
    """As the backend chooses, at every number of tokens up to 20000; where it serves none, as the others sort."""
    ranges = {}
    for num_tokens in range(1, 20000):
        load = Load.of(num_tokens, top_k, num_experts)
        stream, tiles = stream_reason(load), tiles_reason(load, hidden_size)
        by_tiles = cut(load, intermediate_size), block_of(load.num_pairs, num_experts)
        if stream and tiles:
            compiled = block_of(load.num_pairs, num_experts), by_tiles if training else ()
        elif tiles is None and (stream or prefers_tiles(load)):
            compiled = by_tiles
        else:
            plain, adapted = (regime(load, intermediate_size, has_adapter=has_one) for has_one in (False, True))
            planned = [not its.inline_pairs and pairs_per_lane(load.num_pairs) for its in (plain, adapted)]
            compiled = plain, adapted, *planned, by_tiles if training else ()
        ranges.setdefault(compiled, num_tokens)
    assert one_of_each_way(num_experts, top_k, hidden_size, intermediate_size, training) == tuple(ranges.values())


def test_numbers_of_tokens_up_to_32768():
    assert 29440 in one_of_each_way(80, 1, 64, 64)
    assert max(one_of_each_way(128, 1, 64, 64)) <= 32768


def test_gemma_4_s_numbers_of_tokens_reach_every_regime_and_every_cut():
    loads = [Load.of(count, 8, 128) for count in NUM_TOKENS]
    assert len({regime(load, 704) for load in loads if not prefers_tiles(load)}) == 4
    assert {cut(load, 704) for load in loads if prefers_tiles(load)} == {*CUTS}


@pytest.mark.parametrize("name", ["int4_g32", "nvfp4", "fp8"])
def test_numbers_of_tokens_reach_every_way_of_quantised_weights(name):
    formats = f"{name},{name}"

    def way(num_tokens):
        load = Load.of(num_tokens, 8, 128)
        if takes_tiles(load, 2816, weight_format=formats):
            return cut(load, 704)
        return regime(load, 704, has_codes=True)

    assert {*map(way, one_of_each_way(128, 8, 2816, 704, weight_format=formats))} == {*map(way, range(1, 20000))}
