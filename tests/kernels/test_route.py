"""route.cu against cupymoe.reference in float64 on the same logits."""

import pytest
import torch

from cupymoe import reference
from cupymoe.kernels.route import MAX_EXPERTS, route
from tests.helpers import DTYPES, transformers_config, transformers_gemma4

pytestmark = pytest.mark.gpu

SIZES = [
    (1, 1),
    (7, 1),  # fewer experts than lanes
    (7, 6),
    (32, 2),  # one expert a lane
    (33, 8),  # lanes without an expert
    (33, 33),  # all of them, in two rounds of lanes
    (60, 6),
    (128, 1),
    (128, 8),  # Gemma 4
    (200, 33),
    (512, 8),
    (MAX_EXPERTS, 2),
    (MAX_EXPERTS, 33),
]


def check(logits, top_k, scale=None, renormalize=True):
    weights, index = route(logits, top_k, scale, renormalize)
    assert (weights.dtype, index.dtype) == (torch.float32, torch.int64)
    wide = logits.double().cpu()
    truth, expected = reference.route(wide, top_k, None if scale is None else scale.double().cpu(), renormalize)
    assert torch.equal(index.cpu(), expected)
    # Two ulp of expf, sums of up to 37 terms and two divisions in float32; the rounding of l - max comes on top.
    distance = (wide.amax(-1, keepdim=True) - wide.gather(-1, expected)).clamp(0, 100).nan_to_num()
    allowed = truth.abs() * (2e-6 + distance * 2**-24) + torch.finfo(torch.float32).tiny
    nan = truth.isnan()
    assert torch.equal(weights.cpu().isnan(), nan)
    assert ((weights.double().cpu() - truth).abs() <= allowed)[~nan].all()


def tied_logits(num_tokens, num_experts, dtype):
    """Few values, so that most choices are among exact ties."""
    return (torch.randint(-4, 5, (num_tokens, num_experts), device="cuda") / 2).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_ties_and_random_logits(num_experts, top_k, dtype):
    for num_tokens in (1, 3, 4, 5, 300):
        check(tied_logits(num_tokens, num_experts, dtype), top_k)
        check(4 * torch.randn(num_tokens, num_experts, device="cuda").to(dtype), top_k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(dtype):
    """NaN and infinities keep to their rows; minus infinity is a choice like another; -0 ties with +0."""
    inf, nan = torch.inf, torch.nan
    logits = torch.randn(12, 60, device="cuda", dtype=dtype)
    logits[0] = 0.0
    logits[0, ::2] = -0.0
    logits[1, 7], logits[2, 3], logits[2, 50] = nan, nan, nan
    logits[3, 9], logits[4, :2] = inf, inf
    logits[5] = -inf
    logits[6, 1:] = -inf
    logits[7, 5:] = -inf
    logits[8] = nan
    logits[9] = torch.finfo(dtype).max
    logits[10] = torch.finfo(dtype).min
    logits[11, 4], logits[11, 8] = torch.finfo(dtype).max, torch.finfo(dtype).min
    check(logits, 6)
    clean = [0, 7, 9, 10, 11]
    assert route(logits, 6, None, True)[0][clean].isfinite().all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_per_expert_scale(dtype, scale_dtype, renormalize):
    """Of a dtype of its own, negative and zero scales among them."""
    scale = torch.randn(128, device="cuda", dtype=scale_dtype)
    scale[::9] = 0
    check(tied_logits(77, 128, dtype), 8, scale, renormalize)
    check(torch.randn(77, 128, device="cuda", dtype=dtype), 8, scale, renormalize)


@pytest.mark.parametrize("renormalize", [True, False])
def test_without_scale(renormalize):
    check(torch.randn(301, 128, device="cuda", dtype=torch.bfloat16), 8, None, renormalize)


def test_same_bits_every_time():
    logits = tied_logits(300, 128, torch.bfloat16)
    first = route(logits, 8, None, True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(route(logits, 8, None, True), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_transformers_differs_in_exact_ties_only(dtype, capsys):
    """torch.topk breaks ties as it likes; ours go to the lower index. Nothing else differs."""
    config = transformers_config(hidden_size=2816, num_experts=128, top_k_experts=8)
    router = transformers_gemma4().Gemma4TextRouter(config).to("cuda", dtype)
    router.requires_grad_(False)
    torch.nn.init.normal_(router.proj.weight)
    torch.nn.init.uniform_(router.per_expert_scale, 0.5, 2.0)
    hidden_states = torch.randn(4096, 2816, device="cuda", dtype=dtype)
    logits = router.proj(router.norm(hidden_states) * router.scale * router.scalar_root_size)
    probabilities, their_weights, their_index = router(hidden_states)
    assert torch.equal(torch.softmax(logits, -1, dtype=torch.float32), probabilities)

    weights, index = route(logits, 8, router.per_expert_scale, True)
    differs = index != their_index
    with capsys.disabled():
        print(f"\n{differs.sum().item()} of {differs.numel()} choices differ from torch.topk's in {dtype}")
    ours, theirs = probabilities.gather(-1, index), probabilities.gather(-1, their_index)
    assert torch.equal(ours, theirs)
    assert (ours[:, :-1] == ours[:, 1:]).any(), "the case holds no ties"
    torch.testing.assert_close(weights[~differs], their_weights[~differs], rtol=1e-6, atol=0)
    unscaled, _ = route(logits, 8, None, True)
    torch.testing.assert_close(unscaled, theirs / theirs.sum(-1, keepdim=True), rtol=1e-6, atol=0)
