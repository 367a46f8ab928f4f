"""The public functions: what they refuse and with which words, what they honour, and what must not change a result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cupymoe import MoEActivation, apply_moe_activation, fused_experts, gelu_tanh_and_mul, moe_activation, reference
from cupymoe import route as route_function
from tests.helpers import oracle, random_experts, random_routing

SHAPE = {"num_tokens": 5, "num_experts": 4, "hidden": 16, "intermediate": 8, "top_k": 2}


def experts(case, activation="gelu_tanh", **kwargs):
    return fused_experts(*case, activation=activation, **kwargs)


# --- routing ----------------------------------------------------------------------------------------------------------

LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("logits", "top_k", "scale", "error", "message"),
    [
        (LOGITS.numpy(), 2, None, TypeError, r"router_logits must be a torch.Tensor, got ndarray"),
        (LOGITS[0], 2, None, ValueError, r"router_logits must have shape \[\*, \*\], got \[4\]"),
        (LOGITS[None], 2, None, ValueError, r"router_logits must have shape \[\*, \*\], got \[1, 5, 4\]"),
        (LOGITS.int(), 2, None, TypeError, r"router_logits must be a floating-point tensor, got torch.int32"),
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


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_route_properties(num_tokens, num_experts, data):
    """Weights sum to one, fall, and do not feel a shift; the chosen logits are the greatest, each expert once."""
    top_k = data.draw(st.integers(1, num_experts))
    logits = torch.randint(-6, 7, (num_tokens, num_experts)) / 2
    weights, index = route_function(logits, top_k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(num_tokens), rtol=1e-6, atol=0)
    assert (weights.diff(dim=-1) <= 0).all()
    assert torch.equal(logits.gather(-1, index), logits.sort(-1, descending=True).values[:, :top_k])
    assert all(len(set(row)) == top_k for row in index.tolist())
    shifted_weights, shifted_index = route_function(logits + 4, top_k)
    assert torch.equal(shifted_index, index)
    torch.testing.assert_close(shifted_weights, weights, rtol=1e-6, atol=0)


# --- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "input", "error", "message"),
    [
        ("quick_gelu", torch.ones(2, 4), ValueError, r"Unknown MoE activation: 'quick_gelu'"),
        ("silu", [1.0, 2.0], TypeError, r"input must be a torch.Tensor, got list"),
        ("silu", torch.ones(2, 4).long(), TypeError, r"input must be a floating-point tensor, got torch.int64"),
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
    # Computed in float32 and rounded once, by at most 2^-8 to bfloat16; float32 tails on the CPU are right absolutely.
    rtol = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(expected.double(), reference.activate(input.double(), activation), rtol=rtol, atol=1e-6)


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
    [("silu", lambda buffer: buffer[:, :4]), ("relu2_no_mul", lambda buffer: buffer.flatten()[8:].view(3, 8))],
    ids=["gated into its gate", "ungated, one row on"],
)
def test_apply_refuses_overlap(device, activation, make_output):
    buffer = torch.randn(4, 8, device=device)
    input = buffer if activation == "silu" else buffer[:3]
    with pytest.raises(ValueError, match="output must not overlap input"):
        apply_moe_activation(activation, make_output(buffer), input)


def test_apply_has_no_gradient(device):
    input = torch.randn(4, 8, device=device, requires_grad=True)
    output = torch.empty(4, 4, device=device)
    with pytest.raises(RuntimeError, match="has no gradient: use moe_activation"):
        apply_moe_activation("silu", output, input)
    with torch.no_grad():
        assert torch.equal(apply_moe_activation("silu", output, input), moe_activation("silu", input))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_activations_of_nothing(device, shape):
    assert moe_activation("gelu_tanh", torch.empty(shape, device=device)).shape == (*shape[:-1], shape[-1] // 2)


def test_activation_of_one_row(device):
    input = torch.randn(8, device=device)
    assert torch.equal(gelu_tanh_and_mul(input), gelu_tanh_and_mul(input[None])[0])


# --- experts ----------------------------------------------------------------------------------------------------------

CASE = random_experts(**SHAPE)


def replaced(**changes):
    return CASE._replace(**{name: change(getattr(CASE, name)) for name, change in changes.items()})


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        (replaced(hidden_states=lambda t: t.tolist()), TypeError, r"hidden_states must be a torch.Tensor, got list"),
        (replaced(hidden_states=lambda t: t[0]), ValueError, r"hidden_states must have shape \[\*, \*\], got \[16\]"),
        (replaced(hidden_states=lambda t: t.long()), TypeError, r"hidden_states must be a floating-point tensor"),
        (replaced(hidden_states=lambda t: t[:, :8]), ValueError, r"down_proj must have shape \[\*, 8, \*\]"),
        (replaced(down_proj=lambda t: t[0]), ValueError, r"down_proj must have shape \[\*, 16, \*\], got \[16, 8\]"),
        (replaced(down_proj=lambda t: t[:3]), ValueError, r"gate_up_proj must have shape \[3, 16, 16\]"),
        (replaced(down_proj=lambda t: t[..., :4]), ValueError, r"gate_up_proj must have shape \[4, 8, 16\]"),
        (replaced(gate_up_proj=lambda t: t[:, :8]), ValueError, r"gate_up_proj must have shape \[4, 16, 16\], got"),
        (replaced(gate_up_proj=lambda t: t[..., :8]), ValueError, r"gate_up_proj must have shape \[4, 16, 16\]"),
        (replaced(gate_up_proj=lambda t: None), TypeError, r"gate_up_proj must be a torch.Tensor, got NoneType"),
        (replaced(gate_up_proj=lambda t: t.double()), TypeError, r"gate_up_proj must have hidden_states's dtype"),
        (replaced(down_proj=lambda t: t.bfloat16()), TypeError, r"down_proj must have hidden_states's dtype"),
        (replaced(gate_up_proj=lambda t: t.mT), ValueError, r"gate_up_proj must be contiguous"),
        (replaced(down_proj=lambda t: t.mT.contiguous().mT), ValueError, r"down_proj must be contiguous"),
        (replaced(down_proj=lambda t: t.to("meta")), ValueError, r"down_proj must be on hidden_states's device cpu"),
        (replaced(top_k_index=lambda t: t[:4]), ValueError, r"top_k_index must have shape \[5, \*\], got \[4, 2\]"),
        (replaced(top_k_index=lambda t: t.flatten()), ValueError, r"top_k_index must have shape \[5, \*\], got \[10\]"),
        (
            replaced(top_k_index=lambda t: t.float()),
            TypeError,
            r"top_k_index must be int32 or int64, got",
        ),
        (replaced(top_k_index=lambda t: t.short()), TypeError, r"top_k_index must be int32 or int64, got torch.int16"),
        (replaced(top_k_index=lambda t: t.to("meta")), ValueError, r"top_k_index must be on hidden_states's device"),
        (
            replaced(top_k_weights=lambda t: t[:, :1]),
            ValueError,
            r"top_k_weights must have shape \[5, 2\], got",
        ),
        (replaced(top_k_weights=lambda t: t.long()), TypeError, r"top_k_weights must be a floating-point tensor"),
        (replaced(top_k_weights=lambda t: t.to("meta")), ValueError, r"top_k_weights must be on hidden_states's"),
    ],
)
def test_experts_refuse(case, error, message):
    with pytest.raises(error, match=message):
        experts(case)


def test_experts_refuse_activation_and_backend():
    with pytest.raises(ValueError, match="Unknown MoE activation: 'gelu_thanh'"):
        experts(CASE, "gelu_thanh")
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \[4, 8, 16\], got \[4, 16, 16\]"):
        experts(CASE, "silu_no_mul")
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', .*\], got 'cutlass'"):
        experts(CASE, backend="cutlass")
    with pytest.raises(ValueError, match=r"backend 'grouped' does not serve this call: it runs on CUDA devices"):
        experts(CASE, backend="grouped")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASE._fields)
def test_experts_refuse_a_mix_of_cpu_and_cuda(name):
    case = CASE._replace(**{other: getattr(CASE, other).cuda() for other in CASE._fields if other != name})
    with pytest.raises(ValueError, match=r"must be on hidden_states's device"):
        experts(case)


@pytest.mark.gpu
def test_grouped_says_what_it_can_not_do():
    case = CASE._replace(**{name: getattr(CASE, name).cuda() for name in CASE._fields})
    with pytest.raises(ValueError, match=r"backend 'grouped' does not serve this call: .*bfloat16 only"):
        experts(case, backend="grouped")
    narrow = random_experts(4, 4, 12, 8, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match=r"multiples of 8, not 12 and 8"):
        experts(narrow, backend="grouped")
    torch.testing.assert_close(experts(narrow).double(), oracle(narrow), rtol=2**-8, atol=1e-5)


def test_experts_of_strided_inputs(device):
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    strided = case._replace(
        hidden_states=case.hidden_states.T.contiguous().T,
        top_k_index=case.top_k_index.T.contiguous().T,
        top_k_weights=case.top_k_weights.T.contiguous().T,
    )
    assert not strided.hidden_states.is_contiguous()
    assert torch.equal(experts(strided), experts(case))


def test_experts_of_no_tokens_or_no_choices(device):
    none = experts(random_experts(**{**SHAPE, "num_tokens": 0}, device=device, dtype=torch.bfloat16))
    assert (none.shape, none.dtype, none.device.type) == ((0, 16), torch.bfloat16, device.type)
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    unchosen = case._replace(top_k_index=case.top_k_index[:, :0], top_k_weights=case.top_k_weights[:, :0])
    assert torch.equal(experts(unchosen), torch.zeros_like(case.hidden_states))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mask", [-1, 4, 2**31 - 1, -(2**31)])
def test_masked_pairs_contribute_nothing(device, index_dtype, mask):
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    index = case.top_k_index.to(index_dtype)
    index[:3, 0], index[0, 1] = mask, mask  # token 0 has no expert at all
    masked = case._replace(top_k_index=index)
    output = experts(masked)
    assert not output[0].any()
    torch.testing.assert_close(output.double(), oracle(masked), rtol=2**-6, atol=2**-7)
    assert torch.equal(output[3:], experts(case)[3:])


def test_a_masked_expert_s_weights_are_not_read(device):
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    index = case.top_k_index.where(case.top_k_index != 1, 4)
    clean = experts(case._replace(top_k_index=index))
    case.gate_up_proj[1], case.down_proj[1] = torch.nan, torch.nan
    assert torch.equal(experts(case._replace(top_k_index=index)), clean)


def test_nan_stays_in_its_token(device):
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    clean = experts(case)
    case.hidden_states[2, 3] = torch.nan
    output = experts(case)
    assert output[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(output[others], clean[others])


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_top_k_weights_of_any_floating_dtype(device, weights_dtype):
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    case = case._replace(top_k_weights=case.top_k_weights.to(weights_dtype))
    as_float32 = case._replace(top_k_weights=case.top_k_weights.float())
    # float64 weights may differ in the last bit of the rounded output.
    torch.testing.assert_close(experts(case), experts(as_float32), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_weights_that_need_grad_where_none_is_recorded(device, context):
    case = random_experts(**SHAPE, device=device, dtype=torch.bfloat16)
    expected = experts(case)
    parameters = case._replace(
        gate_up_proj=torch.nn.Parameter(case.gate_up_proj), down_proj=torch.nn.Parameter(case.down_proj)
    )
    with context():
        output = experts(parameters)
        weights, _ = route_function(torch.nn.Parameter(torch.randn(3, 4, device=device)), 2)
    assert torch.equal(output, expected)
    assert not output.requires_grad
    assert not weights.requires_grad


# --- properties of the experts ----------------------------------------------------------------------------------------

shapes = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 12),
        "num_experts": st.integers(2, 7),
        "hidden": st.sampled_from([1, 3, 8]),
        "intermediate": st.sampled_from([1, 5, 8]),
        "top_k": st.integers(1, 2),
    }
)
property_test = settings(deadline=None, max_examples=40)


def property_case(shape):
    return random_experts(**shape, dtype=torch.float64)


@property_test
@given(shapes)
def test_permuted_tokens_give_permuted_outputs(shape):
    case = property_case(shape)
    order = torch.randperm(shape["num_tokens"])
    permuted = case._replace(**{name: getattr(case, name)[order] for name in case._fields if name not in _WEIGHTS})
    torch.testing.assert_close(experts(permuted), experts(case)[order], rtol=1e-12, atol=1e-12)


_WEIGHTS = ("gate_up_proj", "down_proj")


@property_test
@given(shapes)
def test_relabelled_experts_change_nothing(shape):
    case = property_case(shape)
    order = torch.randperm(shape["num_experts"])
    relabelled = case._replace(
        gate_up_proj=case.gate_up_proj[order],
        down_proj=case.down_proj[order],
        top_k_index=torch.argsort(order)[case.top_k_index],
    )
    torch.testing.assert_close(experts(relabelled), experts(case), rtol=1e-12, atol=1e-12)


@property_test
@given(shapes)
def test_pairs_of_weight_zero_change_nothing(shape):
    case = property_case(shape)
    _, extra = random_routing(shape["num_tokens"], shape["num_experts"], 1)
    padded = case._replace(
        top_k_index=torch.cat((case.top_k_index, extra), -1),
        top_k_weights=torch.cat((case.top_k_weights, torch.zeros(extra.shape)), -1),
    )
    torch.testing.assert_close(experts(padded), experts(case), rtol=1e-12, atol=1e-12)


@property_test
@given(shapes, st.floats(-3, 3))
def test_linear_in_top_k_weights(shape, factor):
    case = property_case(shape)
    first, second = (torch.randn(case.top_k_weights.shape, dtype=torch.float64) for _ in range(2))
    joined = experts(case._replace(top_k_weights=first + factor * second))
    apart = experts(case._replace(top_k_weights=first)) + factor * experts(case._replace(top_k_weights=second))
    torch.testing.assert_close(joined, apart, rtol=1e-11, atol=1e-11)
