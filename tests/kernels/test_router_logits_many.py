"""router_logits_many.cu against router_logits.cu, whose bits it makes for any number of tokens."""

import pytest
import torch

from cupymoe import reference
from cupymoe.kernels.router_logits import MAX_HIDDEN_SIZE, MAX_TOKENS, router_logits
from cupymoe.kernels.router_logits_many import router_logits_many, unsupported_reason
from tests.helpers import DTYPES, poison_free_memory
from tests.kernels.test_router_logits import EPS, router


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("hidden_size", "num_experts"), [(8, 1), (256, 6), (264, 33), (2816, 128), (MAX_HIDDEN_SIZE, 8)]
)
def test_the_bits_of_few_tokens(hidden_size, num_experts, dtype):
    for num_tokens in (1, 3, 31, 32, 33, 500):
        states, scale, projection = router(num_tokens, hidden_size, num_experts, dtype)
        few = [router_logits(part, scale, projection, EPS) for part in states.split(MAX_TOKENS)]
        poison_free_memory()
        assert torch.equal(router_logits_many(states, scale, projection, EPS), torch.cat(few))


@pytest.mark.gpu
def test_rows_that_few_tokens_are_not_served_with():
    states, scale, projection = router(70, MAX_HIDDEN_SIZE + 8, 5, torch.bfloat16)
    logits = router_logits_many(states, scale, projection, EPS)
    truth = reference.router_input(states, scale, EPS).double() @ projection.double().T
    torch.testing.assert_close(logits.double(), truth, rtol=0.01, atol=0.5)
    assert torch.equal(router_logits_many(states[68:], scale, projection, EPS), logits[68:])


@pytest.mark.gpu
def test_no_tokens():
    states, scale, projection = router(0, 256, 6, torch.bfloat16)
    assert router_logits_many(states, scale, projection, EPS).shape == (0, 6)


def test_what_is_not_served():
    assert unsupported_reason(torch.empty(3, 2816, dtype=torch.bfloat16)) is None
    assert unsupported_reason(torch.empty(3, 2812)) is None
    assert "multiple of 8, not 2812" in unsupported_reason(torch.empty(3, 2812, dtype=torch.float16))
    assert unsupported_reason(torch.empty(2097120, 8, dtype=torch.bfloat16, device="meta")) is None
    more = torch.empty(2097121, 8, dtype=torch.bfloat16, device="meta")
    assert unsupported_reason(more) == "its kernels take at most 2097120 tokens, not 2097121"
    assert "not torch.float64" in unsupported_reason(torch.empty(3, 2816, dtype=torch.float64))
