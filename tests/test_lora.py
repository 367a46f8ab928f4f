"""lora_experts: what float64 gives on merged weights, forward and backward, without merging."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

from cupymoe import LowRank, MoEActivation, fused_experts, lora_experts, reference
from cupymoe.backends import expert_rows, fused, fused_adapters
from cupymoe.backends.row_products import GroupedRows, LoopRows
from cupymoe.kernels.lora_back import lora_back
from cupymoe.kernels.lora_shrink import lora_shrink
from cupymoe.kernels.lora_shrink_chunks import lora_shrink_chunks
from tests.helpers import GATED, no_host_sync, random_experts, relative_error, slow_on_cuda, transposed

# Adapters in other dtypes than bfloat16 are slow on CUDA, and say so.
pytestmark = slow_on_cuda

NAMES = ("hidden_states", "gate_up_proj", "down_proj", "top_k_weights", "gate_up a", "gate_up b", "down a", "down b")
EXPERTS, RANK = 6, 5


def random_adapter(weight, rank=RANK, dtypes=(None, None), scaling=1.0):
    """As large as the weight's own part, so that a missing term shows; of the dtypes of a and b, or the weight's."""
    num_experts, out_size, in_size = weight.shape
    return LowRank(
        weight.new_empty(num_experts, rank, in_size, dtype=dtypes[0]).normal_(std=in_size**-0.5),
        weight.new_empty(num_experts, out_size, rank, dtype=dtypes[1]).normal_(std=rank**-0.5 / abs(scaling)),
        scaling,
    )


def as_peft(adapter):
    """The same, b as a view of [out, r, E]."""
    return adapter._replace(b=adapter.b.permute(1, 2, 0).contiguous().permute(2, 0, 1))


def random_case(num_tokens=16, activation=MoEActivation.GELU_TANH, masked=True, rank=RANK, **kwargs):
    """Experts and both adapters; some pairs are masked, and expert 2 has no token."""
    case = random_experts(num_tokens, EXPERTS, 32, 24, 2, activation=activation, **kwargs)
    case.top_k_index[case.top_k_index == 2] = 3
    if masked:
        case.top_k_index[::3, 0], case.top_k_index[1::4, 1] = -1, EXPERTS
    return case, random_adapter(case.gate_up_proj, rank), random_adapter(case.down_proj, rank)


def merged_oracle(case, gate_up, down, activation=MoEActivation.GELU_TANH):
    """float64 on merged weights; differentiable with respect to every float64 argument."""
    weights = [
        weight.double()
        if adapter is None
        else weight.double() + adapter.scaling * adapter.b.double() @ adapter.a.double()
        for weight, adapter in ((case.gate_up_proj, gate_up), (case.down_proj, down))
    ]
    return reference.experts(
        case.hidden_states.double(), *weights, case.top_k_index, case.top_k_weights.double(), activation
    )


def differentiable(case, gate_up, down):
    """The arguments as leaves, in the order of NAMES, and the case and adapters made of them."""
    tensors = (*case[:3], case.top_k_weights, *gate_up[:2], *down[:2])
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    hidden_states, gate_up_proj, down_proj, weights, *adapters = leaves
    case = case._replace(
        hidden_states=hidden_states, gate_up_proj=gate_up_proj, down_proj=down_proj, top_k_weights=weights
    )
    return leaves, case, LowRank(*adapters[:2], gate_up.scaling), LowRank(*adapters[2:], down.scaling)


# bfloat16 and float16 are computed in float32 on the CPU and rounded once; CUDA's bfloat16 rounds low-rank rows too.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}
CUDA_BFLOAT16 = 6e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_is_the_experts_on_merged_weights(device, dtype):
    case, gate_up, down = random_case(dtype=dtype, device=device)
    output = lora_experts(*case, gate_up, down, activation="gelu_tanh")
    on_kernels = (device.type, dtype) == ("cuda", torch.bfloat16)
    assert output.dtype == dtype
    assert relative_error(output, merged_oracle(case, gate_up, down)) < (
        CUDA_BFLOAT16 if on_kernels else TOLERANCE[dtype]
    )


@pytest.mark.parametrize("activation", MoEActivation)
def test_every_activation(activation):
    case, gate_up, down = random_case(activation=activation, dtype=torch.float64)
    output = lora_experts(*case, gate_up, down, activation=activation)
    torch.testing.assert_close(output, merged_oracle(case, gate_up, down, activation))


def test_tanh_gelu_not_erf(device):
    """In float32 a swapped formula is 40 times outside of what rounding leaves."""
    case, gate_up, down = random_case(dtype=torch.float32, device=device)
    output = lora_experts(*case, gate_up, down, activation="gelu_pytorch_tanh")
    assert relative_error(output, merged_oracle(case, gate_up, down)) < 1e-6
    assert relative_error(output, merged_oracle(case, gate_up, down, MoEActivation.GELU)) > 4e-5


@pytest.mark.parametrize("adapted", ["gate_up", "down"])
def test_one_adapter_alone(adapted):
    case, gate_up, down = random_case(dtype=torch.float64)
    pair = (gate_up, None) if adapted == "gate_up" else (None, down)
    torch.testing.assert_close(lora_experts(*case, *pair, activation="gelu_tanh"), merged_oracle(case, *pair))


def test_no_adapter_and_a_zero_one_are_the_experts():
    case, gate_up, down = random_case(dtype=torch.float64)
    expected = fused_experts(*case, activation="gelu_tanh")
    fresh = [LowRank(adapter.a, torch.zeros_like(adapter.b)) for adapter in (gate_up, down)]
    torch.testing.assert_close(lora_experts(*case, None, None, activation="gelu_tanh"), expected)
    torch.testing.assert_close(lora_experts(*case, *fresh, activation="gelu_tanh"), expected)


@pytest.mark.parametrize("rank", [1, 8, 16])
def test_ranks(device, rank):
    case, gate_up, down = random_case(dtype=torch.bfloat16, rank=rank, device=device)
    output = lora_experts(*case, gate_up, down, activation="gelu_tanh")
    assert relative_error(output, merged_oracle(case, gate_up, down)) < CUDA_BFLOAT16


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("rank", "padded"), [(0, 16), (1, 16), (16, 16), (17, 32)])
def test_the_kernels_get_factors_that_lie_as_the_weight_of_a_rank_that_they_take(rank, padded, is_transposed):
    given = LowRank(torch.randn(3, 6, rank).mT, torch.randn(3, rank, 5).mT, 1.25)
    packed = given.packed(transposed(torch.empty(3, 5, 6)) if is_transposed else torch.empty(3, 5, 6))
    assert (packed.a.shape, packed.b.shape) == ((3, padded, 6), (3, 5, padded))
    for factor in (packed.a, packed.b):
        assert (factor.mT if is_transposed else factor).is_contiguous()
    torch.testing.assert_close(packed.b @ packed.a, 1.25 * given.b @ given.a)


def test_a_scaled_factor_is_rounded_once():
    given = random_adapter(torch.empty(3, 32, 6), dtypes=(torch.float32, torch.float32), scaling=0.3)
    packed = given.packed(torch.empty(3, 32, 6, dtype=torch.bfloat16))
    assert torch.equal(packed.a[:, :RANK], given.a.bfloat16())
    assert torch.equal(packed.b[..., :RANK], (given.b * 0.3).bfloat16())


def test_adapters_of_any_strides(device):
    """PEFT keeps b as [out, r * E], rank before expert."""
    case, gate_up, down = random_case(dtype=torch.bfloat16, device=device)
    rank_major = as_peft(down._replace(a=down.a.mT.contiguous().mT))
    assert not rank_major.b.is_contiguous()
    expected = lora_experts(*case, gate_up, down, activation="gelu_tanh")
    assert torch.equal(lora_experts(*case, gate_up, rank_major, activation="gelu_tanh"), expected)


@pytest.mark.parametrize("activation", GATED)
def test_gradients_are_autograd_s_through_the_oracle(activation):
    leaves, *ours = differentiable(*random_case(activation=activation, dtype=torch.float64))
    leaves[3].data = leaves[3].data.double()
    output = lora_experts(*ours[0], *ours[1:], activation=activation)
    grad = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, grad)
    expected = torch.autograd.grad(merged_oracle(*ours, activation), leaves, grad)
    for name, gradient, truth in zip(NAMES, got, expected, strict=True):
        assert truth.any(), name
        torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients(device, dtype):
    """Masked pairs and an expert without tokens get zeros, not old memory."""
    leaves, *ours = differentiable(*random_case(64, dtype=dtype, device=device))
    output = lora_experts(*ours[0], *ours[1:], activation="gelu_tanh")
    grad = torch.randn_like(output)
    got = torch.autograd.grad(output, leaves, grad)
    expected = torch.autograd.grad(merged_oracle(*ours), leaves, grad.double())
    limit = 1e-5 if dtype == torch.float32 else 2e-2 if device.type == "cuda" else 4e-3
    for name, gradient, leaf, truth in zip(NAMES, got, leaves, expected, strict=True):
        assert gradient.dtype == leaf.dtype, name
        assert relative_error(gradient, truth.double()) < limit, name
    assert not any(got[i][2].any() for i in (1, 2, 4, 5, 6, 7))
    assert not got[3][ours[0].top_k_index < 0].any()


def test_factors_and_scaling_as_peft_has_them(device):
    """Gradients in the factors' own dtypes and layouts."""
    case, *_ = random_case(64, dtype=torch.bfloat16, device=device)
    given = (
        as_peft(random_adapter(case.gate_up_proj, dtypes=(torch.float32, torch.float32), scaling=0.25)),
        as_peft(random_adapter(case.down_proj, dtypes=(torch.bfloat16, torch.float32), scaling=-3.0)),
    )
    leaves, *ours = differentiable(case, *given)
    output = lora_experts(*ours[0], *ours[1:], activation="gelu_tanh")
    truth = merged_oracle(*ours)
    assert relative_error(output, truth) < CUDA_BFLOAT16
    grad = torch.randn_like(output)
    got, expected = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(truth, leaves, grad.double())
    for name, gradient, leaf, truth in zip(NAMES, got, leaves, expected, strict=True):
        assert gradient.dtype == leaf.dtype, name
        assert gradient.stride() == leaf.stride(), name
        assert relative_error(gradient, truth.double()) < 2e-2, name


def test_float32_factors_of_float64_weights():
    case, *_ = random_case(dtype=torch.float64)
    narrow = (torch.float32, torch.float32)
    given = [random_adapter(weight, dtypes=narrow, scaling=1 / 3) for weight in case[1:3]]
    leaves, *ours = differentiable(case, *given)
    output, truth = lora_experts(*ours[0], *ours[1:], activation="gelu_tanh"), merged_oracle(*ours)
    torch.testing.assert_close(output, truth, rtol=1e-12, atol=1e-12)
    got, expected = (torch.autograd.grad(each.sum(), leaves) for each in (output, truth))
    for name, gradient, wanted in zip(NAMES, got, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_autograd_keeps_the_factors_themselves():
    """And no copy of them: what is saved beside the arguments is nothing, on the CPU."""
    case, *_ = random_case(dtype=torch.bfloat16)
    given = [as_peft(random_adapter(weight, dtypes=(torch.float32,) * 2, scaling=0.5)) for weight in case[1:3]]
    leaves, *ours = differentiable(case, *given)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lora_experts(*ours[0], *ours[1:], activation="gelu_tanh")
    arguments = {tensor.data_ptr() for tensor in (*leaves, case.top_k_index)}
    assert {tensor.data_ptr() for tensor in saved} == arguments


def test_low_routing_weights_are_widened_first():
    """Their gradient is a sum over the columns, which bfloat16 would round at every step."""
    case, gate_up, down = random_case(dtype=torch.bfloat16)
    low = case.top_k_weights.bfloat16().requires_grad_()
    wide = low.detach().float().requires_grad_()
    outputs = [
        lora_experts(*case._replace(top_k_weights=weights), gate_up, down, activation="gelu_tanh")
        for weights in (low, wide)
    ]
    assert torch.equal(*outputs)
    sum(output.sum() for output in outputs).backward()
    assert torch.equal(low.grad, wide.grad.bfloat16())


def test_frozen_weights_get_no_gradient():
    case, gate_up, down = random_case()
    gate_up.a.requires_grad_()
    lora_experts(*case, gate_up, down, activation="gelu_tanh").sum().backward()
    assert gate_up.a.grad.any()
    assert case.gate_up_proj.grad is None
    assert gate_up.b.grad is None


def test_gradients_do_not_form_the_weights(monkeypatch):
    """Frozen weights cost the backward no product of their size; a's gradient takes two, of rank 16."""
    case, gate_up, down = random_case(masked=False, rank=16)
    gate_up.a.requires_grad_()
    flops = []
    kept = expert_rows.Projection.gradients

    def counted(*arguments):
        with FlopCounterMode(display=False) as counter:
            found = kept(*arguments)
        flops.append(counter.get_total_flops())
        return found

    monkeypatch.setattr(expert_rows.Projection, "gradients", counted)
    lora_experts(*case, gate_up, down, activation="gelu_tanh").sum().backward()
    _, out_size, in_size = case.gate_up_proj.shape
    assert flops == [2 * case.top_k_index.numel() * 16 * (out_size + in_size)]


def test_grouped_gemms_are_the_loop_s():
    """What CUDA computes with in bfloat16, here on the CPU: same rows, same transpositions, same sums."""
    case, gate_up, _ = random_case(24, dtype=torch.bfloat16, rank=8)
    loop, grouped = LoopRows(case.top_k_index, EXPERTS), GroupedRows.__new__(GroupedRows)
    grouped.offsets = torch.tensor(loop.offsets, dtype=torch.int32)
    kept = loop.offsets[-1]
    rows, others = (torch.randn(48, size).bfloat16() for size in (32, 48))
    for weight in (case.gate_up_proj, gate_up.a, gate_up.b.transpose(1, 2)):
        input = rows if weight.shape[2] == 32 else others
        got, expected = (rows_of.linear(input, weight) for rows_of in (grouped, loop))
        torch.testing.assert_close(got[:kept], expected[:kept], rtol=2**-7, atol=1e-3)
    outer = (rows_of.outer(others, rows, torch.bfloat16) for rows_of in (grouped, loop))
    torch.testing.assert_close(*outer, rtol=2**-7, atol=1e-2)


def test_compiles_without_a_graph_break(device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves, *ours = differentiable(*random_case(dtype=dtype, device=device))

    def gradients(function):
        output = function(*ours[0], *ours[1:], activation="gelu_tanh")
        return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

    got = gradients(torch.compile(lora_experts, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(got, gradients(lora_experts), strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(device, num_tokens):
    leaves, *ours = differentiable(*random_case(num_tokens, masked=False, dtype=torch.bfloat16, device=device))
    output = lora_experts(*ours[0], *ours[1:], activation="gelu_tanh")
    output.float().sum().backward()
    assert output.shape == (num_tokens, 32)
    assert all(bool(leaf.grad.any()) == bool(num_tokens) for leaf in leaves)


def test_everything_masked(device):
    case, gate_up, down = random_case(dtype=torch.bfloat16, device=device)
    case.top_k_index.fill_(-1)
    leaves, *ours = differentiable(case, gate_up, down)
    output = lora_experts(*ours[0], *ours[1:], activation="gelu_tanh")
    output.backward(torch.ones_like(output))
    assert not output.any()
    assert not any(leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: LowRank(a.a[:-1], a.b), r"gate_up_adapter.a must have shape \[6, \*, 32\], got \[5, 5, 32\]"),
        (lambda a: LowRank(a.a, a.b[:, :-1]), r"gate_up_adapter.b must have shape \[6, 48, 5\], got \[6, 47, 5\]"),
        (lambda a: LowRank(a.a[:, 1:], a.b), r"gate_up_adapter.b must have shape \[6, 48, 4\], got \[6, 48, 5\]"),
        (lambda a: a._replace(scaling="2"), "gate_up_adapter.scaling must be a number, got str"),
        (lambda a: a._replace(scaling=torch.ones(())), "gate_up_adapter.scaling must be a number, got Tensor"),
        (lambda a: LowRank(a.a.double(), a.b), "gate_up_adapter.a must have hidden_states's dtype torch.float32"),
        (lambda a: LowRank(a.a, a.b.double()), "gate_up_adapter.b must have hidden_states's dtype torch.float32"),
        (lambda a: LowRank(TwoTensor(a.a, a.a), a.b), "gate_up_adapter.a must be a plain tensor, got TwoTensor"),
        (lambda a: LowRank(a.a, TwoTensor(a.b, a.b)), "gate_up_adapter.b must be a plain tensor, got TwoTensor"),
        (tuple, "gate_up_adapter must be a cupymoe.LowRank or None, got tuple"),
        (lambda a: LowRank(a.a, None), "gate_up_adapter.b must be a torch.Tensor, got NoneType"),
    ],
)
def test_a_wrong_adapter_is_named(change, message):
    case, gate_up, down = random_case()
    with pytest.raises((TypeError, ValueError), match=message):
        lora_experts(*case, change(gate_up), down, activation="gelu_tanh")


def test_wrong_experts_are_named():
    case, gate_up, down = random_case()
    with pytest.raises(ValueError, match=r"down_proj must have shape \[\*, 32, \*\]"):
        lora_experts(*case._replace(down_proj=case.down_proj[0]), gate_up, down, activation="gelu_tanh")


@pytest.mark.gpu
def test_the_kernels_compute_it_without_waiting(monkeypatch):
    """bfloat16 on CUDA: the forward multiplies by both a's, which is kept, and the backward by both b's."""
    calls = []
    monkeypatch.setattr(fused_adapters, "lora_shrink", lambda *a: calls.append(a) or lora_shrink(*a))
    monkeypatch.setattr(fused_adapters, "lora_back", lambda *a: calls.append(a) or lora_back(*a))
    monkeypatch.setattr(fused, "lora_shrink_chunks", lambda *a: calls.append(a) or lora_shrink_chunks(*a))
    leaves, *ours = differentiable(*random_case(64, dtype=torch.bfloat16, device="cuda"))

    def step():
        output = lora_experts(*ours[0], *ours[1:], activation="gelu_tanh")
        return output, *torch.autograd.grad(output, leaves, torch.ones_like(output))

    first = step()
    calls.clear()
    with no_host_sync():
        second = step()
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    case, gate_up, down = random_case(64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        eager = lora_experts(*case, gate_up, down, activation="gelu_tanh")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = lora_experts(*case, gate_up, down, activation="gelu_tanh")
        output.zero_()
        graph.replay()
    assert torch.equal(output, eager)


@pytest.mark.gpu
def test_error_at_gemma_s_shape():
    """No worse than 1.5 times what plain torch makes of bfloat16 with the same products."""
    case = random_experts(256, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
    gate_up, down = random_adapter(case.gate_up_proj, 16), random_adapter(case.down_proj, 16)
    truth = merged_oracle_by_expert(case, gate_up, down)
    ours = relative_error(lora_experts(*case, gate_up, down, activation="gelu_tanh"), truth)
    merged = case._replace(
        gate_up_proj=torch.baddbmm(case.gate_up_proj, gate_up.b, gate_up.a),
        down_proj=torch.baddbmm(case.down_proj, down.b, down.a),
    )
    dense = relative_error(fused_experts(*merged, activation="gelu_tanh", backend="grouped"), truth)
    assert ours < 1.5 * dense, (ours, dense)


def merged_oracle_by_expert(case, gate_up, down):
    """As merged_oracle, one expert's float64 weights at a time."""
    output = torch.zeros_like(case.hidden_states, dtype=torch.float64)
    for expert in range(case.down_proj.shape[0]):
        one = case._replace(
            gate_up_proj=case.gate_up_proj[expert : expert + 1],
            down_proj=case.down_proj[expert : expert + 1],
            top_k_index=torch.where(case.top_k_index == expert, 0, -1),
        )
        adapters = [LowRank(a[expert : expert + 1], b[expert : expert + 1], s) for a, b, s in (gate_up, down)]
        output += merged_oracle(one, *adapters)
    return output


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "hidden", "intermediate"),
    [(0, 4, 16, 8), (3, 0, 16, 8), (3, 4, 0, 8), (3, 4, 16, 0)],
    ids=["no tokens", "no experts", "no columns", "no intermediate columns"],
)
def test_sums_of_nothing(device, num_tokens, num_experts, hidden, intermediate):
    """A rank that owns no expert, and sizes of zero, forward and backward."""

    def ones(*shape):
        return torch.ones(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    states, gate_up, down = (
        ones(num_tokens, hidden),
        ones(num_experts, 2 * intermediate, hidden),
        ones(num_experts, hidden, intermediate),
    )
    adapters = (
        LowRank(ones(num_experts, 8, hidden), ones(num_experts, 2 * intermediate, 8)),
        LowRank(ones(num_experts, 8, intermediate), ones(num_experts, hidden, 8)),
    )
    index = torch.tensor([[0, 1]], device=device).expand(num_tokens, 2)
    output = lora_experts(
        states, gate_up, down, index, torch.ones(num_tokens, 2, device=device), *adapters, activation="silu"
    )
    assert torch.equal(output, torch.zeros_like(states))
    output.sum().backward()
    for leaf in (states, gate_up, down, *adapters[0][:2], *adapters[1][:2]):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivatives(device):
    """They are computed by plain torch, since the kernels of the backward have no gradient of their own."""
    case, gate_up, down = random_case(dtype=torch.float64, device=device)
    gate_up, down = gate_up._replace(scaling=0.5), as_peft(down)

    def twice(function):
        leaves, *arguments = differentiable(case, gate_up, down)
        grads = torch.autograd.grad(function(*arguments).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in grads), leaves)

    ours = twice(lambda case, *adapters: lora_experts(*case, *adapters, activation="gelu_tanh"))
    for name, got, expected in zip(NAMES, ours, twice(merged_oracle), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=name)
