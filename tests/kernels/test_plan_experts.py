"""plan_experts.cu's launcher without a GPU: a variant for each range of pairs."""

import pytest

from cupymoe.kernels.expert_stream import MAX_PAIRS
from cupymoe.kernels.plan_experts import WARPS, pairs_per_lane


@pytest.mark.parametrize(
    ("num_pairs", "expected"), [(1, 1), (1024, 1), (1025, 2), (2048, 2), (2049, 4), (MAX_PAIRS, 8)]
)
def test_lanes_hold_all_pairs(num_pairs, expected):
    assert pairs_per_lane(num_pairs) == expected
    assert WARPS * 32 * expected >= num_pairs
