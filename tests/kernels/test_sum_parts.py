"""sum_parts.cu against torch's sum."""

import pytest
import torch

from cupymoe.kernels.sum_parts import sum_parts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_parts", [1, 6, 23])
@pytest.mark.parametrize("num_tokens", [1, 1000])
def test_sums_of_each_pair(num_tokens, num_parts):
    """Whole numbers, whose sums are exact; masked pairs are zero, and rows of no pair are not read."""
    slots = torch.randperm(num_tokens * 3, device="cuda").int().view(num_tokens, 3)
    parts = torch.randint(-100, 100, (num_tokens * 3, num_parts), device="cuda").float()
    masked = torch.rand(slots.shape, device="cuda") < 0.3
    parts[slots[masked].long()] = torch.nan
    expected = torch.where(masked, 0, parts.sum(-1)[slots.long()])
    assert torch.equal(sum_parts(parts, slots.masked_fill(masked, -1)), expected)
