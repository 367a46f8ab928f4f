"""router_logits.cu against the product in float64 of the input that torch rounds as transformers does."""

import pytest
import torch

from cupymoe import reference
from cupymoe.kernels.router_logits import MAX_HIDDEN_SIZE, MAX_TOKENS, router_logits, serves
from tests.helpers import DTYPES

pytestmark = pytest.mark.gpu

EPS = 1e-6


def router(num_tokens, hidden_size, num_experts, dtype):
    states = torch.randn(num_tokens, hidden_size, device="cuda").to(dtype)
    scale = torch.empty(hidden_size, device="cuda").uniform_(0.5, 2).to(dtype)
    projection = torch.randn(num_experts, hidden_size, device="cuda").to(dtype)
    return states, scale, projection


def check(states, scale, projection):
    assert serves(states, scale, projection)
    logits = router_logits(states, scale, projection, EPS)
    assert logits.dtype == states.dtype
    terms = reference.router_input(states, scale, EPS).double()[:, None] * projection.double()
    truth = terms.sum(-1)
    ulp = torch.finfo(states.dtype).eps
    # The logit's own rounding, float32 sums, and eight inputs that round the other way because a norm differs in its
    # last bit.
    allowed = ulp / 2 * truth.abs() + 1e-6 * terms.abs().sum(-1) + 8 * ulp * terms.abs().amax(-1)
    assert ((logits.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden_size", "num_experts"), [(8, 1), (256, 6), (264, 33), (2816, 128), (MAX_HIDDEN_SIZE, 8)]
)
def test_against_float64(hidden_size, num_experts, dtype):
    for num_tokens in (1, 2, 7, 8, 9, MAX_TOKENS):
        check(*router(num_tokens, hidden_size, num_experts, dtype))


def test_a_token_does_not_depend_on_the_others():
    states, scale, projection = router(MAX_TOKENS, 2816, 128, torch.bfloat16)
    together = router_logits(states, scale, projection, EPS)
    for token in (0, 7, 8, MAX_TOKENS - 1):
        assert torch.equal(router_logits(states[token : token + 1], scale, projection, EPS)[0], together[token])


def test_nan_and_zeros_stay_in_their_token():
    states, scale, projection = router(4, 2816, 128, torch.bfloat16)
    expected = router_logits(states, scale, projection, EPS)
    states[1], states[2, 5] = 0, torch.nan
    logits = router_logits(states, scale, projection, EPS)
    assert not logits[1].any()
    assert logits[2].isnan().all()
    assert torch.equal(logits[[0, 3]], expected[[0, 3]])


def test_what_is_not_served():
    states, scale, projection = router(4, 2816, 128, torch.bfloat16)
    assert not serves(states.repeat(MAX_TOKENS, 1), scale, projection)
    assert not serves(states[:0], scale, projection)
    assert not serves(states, scale.float(), projection)
    assert not serves(states[:, 1:], scale[1:], projection[:, 1:])
    assert not serves(*router(1, MAX_HIDDEN_SIZE + 8, 2, torch.bfloat16))
    assert not serves(*router(1, 260, 2, torch.bfloat16))
