"""Which regime of the weight stream a call has."""

import pytest

from cupymoe import Gemma4MoEConfig
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime

GEMMA = Gemma4MoEConfig.gemma4_26b_a4b()


@pytest.mark.parametrize(
    ("intermediate", "whole_rows"), [(352, True), (704, True), (768, True), (176, False), (504, False), (800, False)]
)
def test_whole_rows_are_whole_32s_that_fit(intermediate, whole_rows):
    assert regime(Load.of(1, 8, 128), intermediate).down.whole_rows == whole_rows


@pytest.mark.parametrize(("few", "many"), [(1, 16), (17, 64), (65, 256), (257, 512), (513, 1024)])
def test_one_regime_from_few_to_many(few, many):
    """The bounds that docs/numerics.md names; 256 and 512 differ in their tiles, not in the order of their sums."""

    def of(num_tokens):
        return regime(Load.of(num_tokens, GEMMA.top_k_experts, GEMMA.num_experts), GEMMA.moe_intermediate_size)

    assert of(few) == of(many)
    assert of(few) != of(many + 1) or many == 1024


def test_the_regime_goes_by_the_pairs_that_are_expected_to_be_kept():
    """An eighth of the experts here: the choice is that of an eighth of the tokens over as many experts."""
    for num_tokens in (200, 512, 2048, 4096):
        some = Load.of(num_tokens, 8, 16, global_num_experts=128)
        assert (some.num_pairs, some.expected_pairs) == (8 * num_tokens, num_tokens)
        assert regime(some, 704) == regime(Load.of(num_tokens, 8, 128), 704)


def test_few_pairs_of_fewer_experts_are_planned_ahead():
    """Chunks of 8 tokens would read the weights of most experts twice."""
    assert regime(Load.of(8, 2, 8), 704).inline_pairs
    assert not regime(Load.of(32, 2, 8), 704).inline_pairs
