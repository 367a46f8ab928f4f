"""route and the activations: what they refuse and with which words, what they honour; experts have their own file."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cupymoe import MoEActivation, apply_moe_activation, gelu_tanh_and_mul, moe_activation, reference
from cupymoe import route as route_function

# --- routing ----------------------------------------------------------------------------------------------------------

LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("logits", "top_k", "scale", "error", "message"),
    [
        (LOGITS.numpy(), 2, None, TypeError, r"router_logits must be a torch.Tensor, got ndarray"),
        (LOGITS[0], 2, None, ValueError, r"router_logits must have shape \[\*, \*\], got \[4\]"),
        (LOGITS[None], 2, None, ValueError, r"router_logits must have shape \[\*, \*\], got \[1, 5, 4\]"),
        (LOGITS.int(), 2, None, TypeError, r"router_logits must be a floating-point tensor.*got torch.int32"),
        (LOGITS, 5, None, ValueError, r"top_k must be between 1 and the number of experts 4, got 5"),
        (LOGITS, 0, None, ValueError, r"top_k must be between 1 and the number of experts 4, got 0"),
        (LOGITS, -1, None, ValueError, r"top_k must be between 1 and the number of experts 4, got -1"),
        (LOGITS[:, :0], 1, None, ValueError, r"top_k must be between 1 and the number of experts 0, got 1"),
        (LOGITS, 2, [1.0] * 4, TypeError, r"per_expert_scale must be a torch.Tensor, got list"),
        (LOGITS, 2, torch.ones(5), ValueError, r"per_expert_scale must have shape \[4\], got \[5\]"),
        (LOGITS, 2, torch.ones(4, 1), ValueError, r"per_expert_scale must have shape \[4\], got \[4, 1\]"),
        (LOGITS, 2, torch.ones(4).int(), TypeError, r"per_expert_scale must be a floating-point tensor"),
        (
            LOGITS,
            2,
            torch.ones(4, device="meta"),
            ValueError,
            r"per_expert_scale must be on router_logits's device",
        ),
    ],
)
def test_route_refuses(logits, top_k, scale, error, message):
    with pytest.raises(error, match=message):
        route_function(logits, top_k, per_expert_scale=scale)


@pytest.mark.parametrize("renormalize", [None, 1, "no"])
def test_route_renormalizes_or_not(renormalize):
    with pytest.raises(TypeError, match=f"renormalize must be True or False, got {renormalize!r}"):
        route_function(LOGITS, 2, renormalize=renormalize)


@pytest.mark.parametrize("top_k", [2.5, 2.0, "2", None, True])
def test_route_wants_an_integer(top_k):
    with pytest.raises(TypeError, match="top_k must be an integer"):
        route_function(LOGITS, top_k)


@pytest.mark.gpu
def test_route_refuses_on_cuda():
    logits = LOGITS.cuda()
    with pytest.raises(ValueError, match=r"per_expert_scale must be on router_logits's device cuda:0, got cpu"):
        route_function(logits, 2, per_expert_scale=torch.ones(4))
    with pytest.raises(
        TypeError, match=r"router_logits must be bfloat16, float16 or float32 on CUDA, got torch.float64"
    ):
        route_function(logits.double(), 2)
    with pytest.raises(TypeError, match=r"per_expert_scale must be bfloat16, float16 or float32 on CUDA"):
        route_function(logits, 2, per_expert_scale=torch.ones(4, device="cuda", dtype=torch.float64))
    with pytest.raises(ValueError, match=r"router_logits must have at most 1024 experts on CUDA, got 1025"):
        route_function(torch.zeros(2, 1025, device="cuda"), 2)


def test_route_of_no_tokens(device):
    weights, index = route_function(torch.empty(0, 4, device=device), 2)
    assert (weights.shape, weights.dtype) == ((0, 2), torch.float32)
    assert (index.shape, index.dtype) == ((0, 2), torch.int64)


def test_route_of_float64_logits_has_float32_weights():
    weights, _ = route_function(LOGITS.double(), 2)
    assert weights.dtype == torch.float32


def test_route_of_strided_logits(device):
    strided = torch.randn(6, 10, device=device).T[:, ::2]
    scale = torch.randn(6, device=device)[::2]
    for ours, expected in zip(
        route_function(strided, 2, per_expert_scale=scale),
        route_function(strided.contiguous(), 2, per_expert_scale=scale.contiguous()),
        strict=True,
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_route_keeps_nan_in_its_row(device, bad):
    logits = torch.randn(6, 8, device=device)
    clean_weights, clean_index = route_function(logits, 3)
    logits[2, 5] = bad
    weights, index = route_function(logits, 3)
    assert weights[2].isnan().all()
    assert ((index >= 0) & (index < 8)).all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(weights[others], clean_weights[others])
    assert torch.equal(index[others], clean_index[others])


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "input", "error", "message"),
    [
        ("quick_gelu", torch.ones(2, 4), ValueError, r"Unknown MoE activation: 'quick_gelu'"),
        ("silu", [1.0, 2.0], TypeError, r"input must be a torch.Tensor, got list"),
        ("silu", torch.ones(2, 4).long(), TypeError, r"input must be a floating-point tensor.*got torch.int64"),
        ("silu", torch.ones(2, 5), ValueError, r"input must have shape \[..., 2N\] for SILU, got \[2, 5\]"),
        ("silu", torch.ones(()), ValueError, r"input must have shape \[..., 2N\] for SILU, got \[\]"),
        ("relu2_no_mul", torch.ones(()), ValueError, r"input must have shape \[..., N\] for RELU2_NO_MUL, got \[\]"),
    ],
)
def test_activations_refuse(activation, input, error, message):
    with pytest.raises(error, match=message):
        moe_activation(activation, input)
    with pytest.raises(error, match=message):
        apply_moe_activation(activation, torch.ones(2, 2), input)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ([0.0], TypeError, r"output must be a torch.Tensor, got list"),
        (torch.ones(2, 4), ValueError, r"output must have shape \[2, 2\], got \[2, 4\]"),
        (torch.ones(4), ValueError, r"output must have shape \[2, 2\], got \[4\]"),
        (torch.ones(2, 2).double(), TypeError, r"output must have input's dtype torch.float32, got torch.float64"),
        (torch.ones(2, 2, device="meta"), ValueError, r"output must be on input's device cpu, got meta"),
    ],
)
def test_apply_refuses_output(output, error, message):
    with pytest.raises(error, match=message):
        apply_moe_activation("silu", output, torch.ones(2, 4))


@pytest.mark.gpu
def test_activations_refuse_on_cuda():
    input = torch.ones(2, 4, device="cuda")
    with pytest.raises(TypeError, match=r"input must be bfloat16, float16 or float32 on CUDA, got torch.float64"):
        gelu_tanh_and_mul(input.double())
    with pytest.raises(ValueError, match=r"output must be on input's device cuda:0, got cpu"):
        apply_moe_activation("silu", torch.ones(2, 2), input)


@pytest.mark.parametrize("activation", MoEActivation)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_writes_what_moe_activation_returns(device, activation, dtype):
    input = 5 * torch.randn(2, 3, activation.input_size(8), device=device, dtype=dtype)
    output = torch.full((2, 3, 8), torch.nan, device=device, dtype=dtype)
    assert apply_moe_activation(activation, output, input) is output
    expected = moe_activation(activation, input)
    assert expected.dtype == dtype
    assert torch.equal(output, expected)
    assert torch.equal(moe_activation(activation.value, input), expected)
    # Half an ulp of bfloat16, at most 2^-8; 4 ulp of float32; below 1e-38 both have subnormals.
    rtol = 2**-8 * 1.01 if dtype == torch.bfloat16 else 4 * 2**-23
    torch.testing.assert_close(expected.double(), reference.activate(input.double(), activation), rtol=rtol, atol=1e-38)


def test_strided_input_and_output(device):
    input = torch.randn(16, 6, device=device).T
    output = torch.full((6, 16), torch.nan, device=device)
    assert apply_moe_activation("silu", output[:, ::2], input).data_ptr() == output.data_ptr()
    assert torch.equal(output[:, ::2], moe_activation("silu", input.contiguous()))
    assert output[:, 1::2].isnan().all()


def test_in_place_for_ungated_members(device):
    input = torch.randn(4, 8, device=device)
    expected = moe_activation("gelu_no_mul", input)
    assert apply_moe_activation("gelu_no_mul", input, input) is input
    assert torch.equal(input, expected)


@pytest.mark.parametrize(
    ("activation", "make_output"),
    [
        ("silu", lambda buffer: buffer[:, :4]),
        ("relu2_no_mul", lambda buffer: buffer.flatten()[8:].view(3, 8)),
        ("relu2_no_mul", lambda buffer: buffer.flatten()[:24].view(8, 3).T),
    ],
    ids=["gated into its gate", "ungated, one row on", "ungated, transposed"],
)
def test_apply_refuses_overlap(device, activation, make_output):
    buffer = torch.randn(4, 8, device=device)
    input = buffer if activation == "silu" else buffer[:3]
    with pytest.raises(ValueError, match="output must not overlap input"):
        apply_moe_activation(activation, make_output(buffer), input)


@pytest.mark.parametrize("output_first", [False, True])
def test_apply_between_neighbours_in_one_buffer(device, output_first):
    buffer = torch.randn(12, device=device)
    input, output = (buffer[4:], buffer[:4]) if output_first else (buffer[:8], buffer[8:])
    expected = moe_activation("silu", input)
    assert torch.equal(apply_moe_activation("silu", output, input), expected)


def test_apply_under_fake_tensors():
    """They have no addresses, and so don't overlap."""
    with FakeTensorMode():
        output = torch.empty(4, 4)
        assert apply_moe_activation("silu", output, torch.empty(4, 8)) is output


@pytest.mark.parametrize("differentiable", ["input", "output"])
def test_apply_has_no_gradient(device, differentiable):
    input = torch.randn(4, 8, device=device, requires_grad=differentiable == "input")
    output = torch.empty(4, 4, device=device, requires_grad=differentiable == "output")
    with pytest.raises(RuntimeError, match="has no gradient: use moe_activation"):
        apply_moe_activation("silu", output, input)
    with torch.no_grad():
        assert torch.equal(apply_moe_activation("silu", output, input), moe_activation("silu", input))


def test_apply_tells_autograd_what_it_overwrites(device):
    saved = torch.randn(4, 8, device=device, requires_grad=True).exp()
    with torch.no_grad():
        apply_moe_activation("silu_no_mul", saved, torch.randn(4, 8, device=device))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with torch.inference_mode():
        output = torch.empty(4, 8, device=device)
        assert apply_moe_activation("relu2_no_mul", output, torch.ones(4, 8, device=device)).sum() == 32


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_activations_of_nothing(device, shape):
    assert moe_activation("gelu_tanh", torch.empty(shape, device=device)).shape == (*shape[:-1], shape[-1] // 2)


def test_activation_of_one_row(device):
    input = torch.randn(8, device=device)
    assert torch.equal(gelu_tanh_and_mul(input), gelu_tanh_and_mul(input[None])[0])
