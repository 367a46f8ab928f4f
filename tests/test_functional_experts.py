"""fused_experts: what it refuses and with which words, what it honours; tests/test_properties.py draws calls of it."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from cupymoe import MoEActivation, fused_experts, lora_experts, ops
from cupymoe import route as route_function
from cupymoe.backends import select
from cupymoe.ops import experts_call
from tests.helpers import Experts, oracle, random_biases, random_experts, transposed

SHAPE = {"num_tokens": 5, "num_experts": 4, "hidden": 16, "intermediate": 8, "top_k": 2}


def experts(case, activation="gelu_tanh", **kwargs):
    return fused_experts(*case, activation=activation, **kwargs)


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
        (replaced(gate_up_proj=lambda t: t.numpy()), TypeError, r"gate_up_proj must be a torch.Tensor, got ndarray"),
        (replaced(down_proj=lambda t: t.numpy()), TypeError, r"down_proj must be a torch.Tensor, got ndarray"),
        (replaced(gate_up_proj=lambda t: t.double()), TypeError, r"gate_up_proj must have hidden_states's dtype"),
        (replaced(down_proj=lambda t: t.bfloat16()), TypeError, r"down_proj must have hidden_states's dtype"),
        (
            replaced(hidden_states=lambda t: TwoTensor(t, t)),
            TypeError,
            "hidden_states must be a plain tensor, got Two",
        ),
        (replaced(gate_up_proj=lambda t: TwoTensor(t, t)), TypeError, "gate_up_proj must be a plain tensor, got Two"),
        (
            replaced(gate_up_proj=lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
            ValueError,
            r"gate_up_proj must be contiguous, or the transpose\(1, 2\) of a .* got strides \(16, 64, 1\)",
        ),
        (
            replaced(gate_up_proj=transposed, down_proj=lambda t: t.repeat_interleave(2, -1)[..., ::2]),
            ValueError,
            r"down_proj must be contiguous, or the transpose\(1, 2\) of a .* got strides \(256, 16, 2\)",
        ),
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


@pytest.mark.parametrize("function", [fused_experts, lora_experts])
@pytest.mark.parametrize(
    ("biases", "error", "message"),
    [
        ({"gate_up_bias": [0.0]}, TypeError, r"gate_up_bias must be a torch.Tensor, got list"),
        ({"down_bias": False}, TypeError, r"down_bias must be a torch.Tensor, got bool"),
        ({"gate_up_bias": torch.zeros(4, 8)}, ValueError, r"gate_up_bias must have shape \[4, 16\], got \[4, 8\]"),
        ({"gate_up_bias": torch.zeros(16)}, ValueError, r"gate_up_bias must have shape \[4, 16\], got \[16\]"),
        ({"down_bias": torch.zeros(4, 8)}, ValueError, r"down_bias must have shape \[4, 16\], got \[4, 8\]"),
        (
            {"gate_up_bias": torch.zeros(4, 16), "down_bias": torch.zeros(4, 16).bfloat16()},
            TypeError,
            r"down_bias must have down_proj's dtype torch.float32, got torch.bfloat16",
        ),
        (
            {"gate_up_bias": torch.zeros(4, 16, device="meta")},
            ValueError,
            r"gate_up_bias must be on gate_up_proj's device cpu, got meta",
        ),
        ({"down_bias": torch.zeros(16, 4).T}, ValueError, r"down_bias must be contiguous, got strides \(1, 4\)"),
        (
            {"gate_up_bias": TwoTensor(torch.zeros(4, 16), torch.zeros(4, 16))},
            TypeError,
            "gate_up_bias must be a plain tensor, got TwoTensor",
        ),
    ],
)
def test_biases_are_refused(function, biases, error, message):
    adapters = () if function is fused_experts else (None, None)
    with pytest.raises(error, match=message):
        function(*CASE, *adapters, activation="gelu_tanh", **biases)


def test_experts_refuse_activation_and_backend():
    with pytest.raises(ValueError, match="Unknown MoE activation: 'gelu_thanh'"):
        experts(CASE, "gelu_thanh")
    with pytest.raises(ValueError, match=r"gate_up_proj must have shape \[4, 8, 16\], got \[4, 16, 16\]"):
        experts(CASE, "silu_no_mul")
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', .*\], got 'cutlass'"):
        experts(CASE, backend="cutlass")
    with pytest.raises(ValueError, match=r"backend 'grouped' does not serve this call: it runs on CUDA devices"):
        experts(CASE, backend="grouped")


def shifted(tensor):
    """An element past where torch's allocator starts a tensor."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


@pytest.mark.parametrize(
    ("name", "aligned"),
    [("hidden_states", (False, True)), ("gate_up_proj", (True, False)), ("down_proj", (True, False))],
)
def test_backends_are_told_what_starts_on_16_bytes(name, aligned):
    call = experts_call(*replaced(**{name: shifted})[:4], MoEActivation.GELU_TANH)
    assert (call.aligned_hidden_states, call.aligned_weights) == aligned


@pytest.mark.parametrize("names", [(), ("gate_up_proj",), ("down_proj",), ("gate_up_proj", "down_proj")])
def test_backends_are_told_which_weights_are_transposed(names):
    call = experts_call(*replaced(**dict.fromkeys(names, transposed))[:4], MoEActivation.GELU_TANH)
    assert (call.gate_up_transposed, call.down_transposed) == ("gate_up_proj" in names, "down_proj" in names)


def test_a_weight_of_one_row_or_column_is_contiguous():
    """Where both readings fit."""
    case = random_experts(3, 4, 1, 1, 2)
    call = experts_call(*case._replace(down_proj=transposed(case.down_proj))[:4], MoEActivation.GELU_TANH)
    assert not call.gate_up_transposed
    assert not call.down_transposed


@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True), (True, True)])
def test_backends_are_told_of_biases(monkeypatch, wanted):
    asked = []
    monkeypatch.setattr(ops.experts, "select", lambda name, call, *way: asked.append(call) or select(name, call, *way))
    case = random_experts(3)
    case.hidden_states.requires_grad_()
    experts(case, **random_biases(case, wanted)).sum().backward()
    assert [call.has_bias for call in asked] == [any(wanted)] * 2


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
    output = experts(narrow, backend="simt")
    torch.testing.assert_close(output.double(), oracle(narrow), rtol=2**-8, atol=1e-5)


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


def test_a_call_of_no_tokens_is_refused_where_one_of_some_is():
    with pytest.raises(ValueError, match="backend 'grouped' does not serve this call"):
        experts(random_experts(**{**SHAPE, "num_tokens": 0}), backend="grouped")


@pytest.mark.parametrize(
    ("num_experts", "hidden", "intermediate"),
    [(0, 16, 8), (4, 0, 8), (4, 16, 0)],
    ids=["no experts", "no columns", "no intermediate columns"],
)
def test_experts_of_empty_weights(device, num_experts, hidden, intermediate):
    """A rank that owns no expert, and sizes of zero: sums of nothing."""
    kwargs = {"device": device, "dtype": torch.bfloat16}
    case = Experts(
        torch.ones(3, hidden, **kwargs),
        torch.ones(num_experts, 2 * intermediate, hidden, **kwargs),
        torch.ones(num_experts, hidden, intermediate, **kwargs),
        torch.tensor([[0, 1]] * 3, device=device),
        torch.ones(3, 2, device=device),
    )
    assert torch.equal(experts(case), torch.zeros_like(case.hidden_states))


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
