"""Biases and transposed weights on every backend, against float64: forward, gradients, adapters, compiled, exported."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from cupymoe import LowRank, MoEActivation, fused_experts, lora_experts, ops, reference
from cupymoe.backends import DIFFERENTIABLE, ExpertsTensors, expert_rows, registry, select
from cupymoe.backends.expert_rows import GroupedRows, LoopRows
from cupymoe.ops import experts_call
from tests.helpers import (
    Experts,
    laid_out,
    max_error,
    no_host_sync,
    oracle,
    poison_free_memory,
    random_biases,
    random_experts,
    relative_error,
    rounded_experts,
    skip_without_inductor,
    slow_on_cuda,
)

pytestmark = slow_on_cuda

ACTIVATIONS = [
    MoEActivation.GELU_TANH,
    MoEActivation.SWIGLUOAI,  # interleaved
    MoEActivation.SWIGLUOAI.with_parameters(limit=0.5, alpha=1.25),
    MoEActivation.RELU2_NO_MUL,  # ungated
]
OFF_THE_KINKS = [activation for activation in ACTIVATIONS if activation.parameters.get("limit") != 0.5]
"""Those that unit-variance products do not clamp: on a kink a rounded input may have another slope altogether."""
EITHER = [*itertools.product([False, True], repeat=2)]
"""Of both projections."""
either = {"ids": lambda pair: "".join("ny"[value] for value in pair)}
NAMES = ("hidden_states", "gate_up_proj", "down_proj", "top_k_weights", "gate_up_bias", "down_bias")


def random_case(layout, masked, num_tokens=33, sizes=(7, 64, 40, 3), **kwargs):
    """Expert 4 has no token; where pairs are masked, token 0 has no expert."""
    case = laid_out(random_experts(num_tokens, *sizes, **kwargs), layout)
    case = case._replace(top_k_weights=case.top_k_weights.to(reference.work_dtype(case.hidden_states.dtype)))
    case.top_k_index[case.top_k_index == 4] = 3
    if masked:
        case.top_k_index[::5, 0], case.top_k_index[1::5, 1], case.top_k_index[0] = -1, 7, -1
    return case


def gradients_of(function, case, biases, grad, dtype=None, activation=MoEActivation.GELU_TANH):
    """The output of a function and its gradients with respect to NAMES; None of a bias that is not there."""
    tensors = {**case._asdict(), **biases}
    leaves = {  # detach() and to() keep the layout
        name: None if tensors[name] is None else tensors[name].detach().to(dtype).clone().requires_grad_()
        for name in NAMES
    }
    output = function(
        *Experts(**{name: leaves.get(name, case.top_k_index) for name in Experts._fields}),
        activation=activation,
        **{name: leaves[name] for name in biases},
    )
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(output, [*wanted.values()], grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, grads, strict=True))}


def on(backend):
    return lambda *tensors, **kwargs: fused_experts(*tensors, backend=backend, **kwargs)


def in_plain_torch(*tensors, activation, **biases):
    return reference.experts(*tensors, activation, **biases)


def plain(*tensors, activation, **biases):
    return rounded_experts(Experts(*tensors), activation, **biases)


# --- the reference, in float64 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_reference_is_torch_s_linear(activation, biased):
    """Each pair by itself."""
    case = random_case((False, False), True, dtype=torch.float64, activation=activation)
    biases = random_biases(case, biased)
    up, down = (bias if bias is not None else torch.zeros(7, 1, dtype=torch.float64) for bias in biases.values())
    expected = torch.zeros_like(case.hidden_states)
    for token, k in itertools.product(*map(range, case.top_k_index.shape)):
        expert = int(case.top_k_index[token, k])
        if 0 <= expert < 7:
            gate_up = case.gate_up_proj[expert] @ case.hidden_states[token] + up[expert]
            rows = case.down_proj[expert] @ reference.activate(gate_up, activation) + down[expert]
            expected[token] += rows * case.top_k_weights[token, k]
    torch.testing.assert_close(oracle(case, activation, **biases), expected)


@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_are_autograd_s_through_the_reference(device, activation, biased, layout):
    case = random_case(layout, True, dtype=torch.float64, device=device, activation=activation)
    biases, grad = random_biases(case, biased), torch.randn_like(case.hidden_states)
    ours = gradients_of(on("auto"), case, biases, grad, activation=activation)
    truth = gradients_of(
        in_plain_torch,
        case,
        biases,
        grad,
        activation=activation,
    )
    assert ours.keys() == truth.keys()
    assert all(ours[name].stride() == getattr(case, name).stride() for name in ("gate_up_proj", "down_proj"))
    for name, expected in truth.items():
        assert expected.any(), name
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name in ours.keys() & {"gate_up_bias", "down_bias"}:
        assert not ours[name][4].any()  # of an expert without tokens


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradients_by_finite_differences(activation):
    case = random_case((True, True), True, 5, (7, 6, 5, 2), dtype=torch.float64, activation=activation)
    leaves = [*case[:3], case.top_k_weights.double(), *random_biases(case).values()]

    def function(states, gate_up, down, weights, gate_up_bias, down_bias):
        tensors = states, gate_up, down, case.top_k_index, weights
        return fused_experts(*tensors, activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias)

    assert torch.autograd.gradcheck(function, [leaf.detach().requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("adapted", [False, True])
def test_each_gradient_alone_is_the_same(wanted, adapted):
    """On both ways of the reference: with adapters it computes rows in expert order."""
    case = random_case((True, False), True, dtype=torch.float64)
    biases = random_biases(case)
    adapters = [LowRank(torch.randn(7, 8, 64).double(), torch.randn(7, 80, 8).double()), None] if adapted else None

    def function(*tensors, **kwargs):
        return lora_experts(*tensors, *adapters, **kwargs) if adapted else fused_experts(*tensors, **kwargs)

    grad = torch.randn_like(case.hidden_states)
    among_all = gradients_of(function, case, biases, grad)[wanted]
    tensors = {**case._asdict(), **biases}
    leaf = tensors[wanted].detach().clone().requires_grad_()
    tensors[wanted] = leaf
    function(
        *(tensors[name] for name in case._fields), activation="gelu_tanh", **{n: tensors[n] for n in biases}
    ).backward(grad)
    assert torch.equal(leaf.grad, among_all)


def test_the_gradient_of_the_down_bias_alone_costs_no_product_with_a_weight(monkeypatch):
    case = random_case((False, False), True, dtype=torch.float64)
    biases = random_biases(case)
    rows = LoopRows(case.top_k_index, case.down_proj.shape[0])
    tensors = ExpertsTensors(*case, **biases)
    grad = torch.randn_like(case.hidden_states)
    needed = [[name == "down_bias" for name in DIFFERENTIABLE], [True] * len(DIFFERENTIABLE)]
    *_, expected = expert_rows.backward(rows, tensors, MoEActivation.GELU_TANH, grad, needed[1])
    monkeypatch.setattr(LoopRows, "linear", None)
    *others, found = expert_rows.backward(rows, tensors, MoEActivation.GELU_TANH, grad, needed[0])
    assert torch.equal(found, expected)
    assert others == [None] * len(others)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_second_derivatives(device):
    case = random_case((True, True), True, 9, (7, 16, 8, 2), dtype=torch.float64, device=device)
    biases = random_biases(case)

    def twice(function):
        leaves = [
            tensor.detach().clone().requires_grad_()
            for tensor in (*case[:3], case.top_k_weights.double(), *biases.values())
        ]
        output = function(*leaves[:3], case.top_k_index, leaves[3], leaves[4], leaves[5])
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in grads), leaves)

    ours = twice(
        lambda *tensors: fused_experts(*tensors[:5], activation="silu", gate_up_bias=tensors[5], down_bias=tensors[6])
    )
    truth = twice(lambda *tensors: reference.experts(*tensors[:5], MoEActivation.SILU, *tensors[5:]))
    for name, got, expected in zip(NAMES, ours, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_the_gradient_of_a_transposed_parameter_is_not_copied():
    """GPT-OSS's parameters are [E, H, 2I] and [E, I, H]: autograd keeps what the op returns."""
    case = random_experts(9)
    parameters = [torch.nn.Parameter(weight.mT.contiguous()) for weight in case[1:3]]
    seen = []
    for parameter in parameters:
        parameter.register_hook(lambda grad: seen.append(grad.data_ptr()))
    output = fused_experts(
        case.hidden_states, *(parameter.transpose(1, 2) for parameter in parameters), *case[3:], activation="silu"
    )
    output.sum().backward()
    assert all(parameter.grad.is_contiguous() for parameter in parameters)
    assert sorted(seen) == sorted(parameter.grad.data_ptr() for parameter in parameters)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_experts_that_no_token_chose(device, num_tokens):
    case = random_case((True, False), False, num_tokens, device=device)
    case = case._replace(top_k_index=torch.full_like(case.top_k_index, -1))
    found = gradients_of(on("auto"), case, random_biases(case), torch.ones_like(case.hidden_states))
    assert [*found] == ["output", *NAMES]
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_a_single_expert_s_stride_does_not_matter(device, dtype, limit):
    case = laid_out(random_experts(5, 1, 64, 40, 1, dtype=dtype, device=device), (True, True))
    case = case._replace(gate_up_proj=case.gate_up_proj[0].unsqueeze(0))
    assert case.gate_up_proj.stride() == (80, 1, 80)
    biases, grad = random_biases(case), torch.randn_like(case.hidden_states)
    ours = gradients_of(on("auto"), case, biases, grad)
    for name, expected in gradients_of(in_plain_torch, case, biases, grad, torch.float64).items():
        assert relative_error(ours[name], expected) <= limit, name


def test_a_masked_expert_s_biases_are_not_read(device):
    case = random_case((False, False), False, device=device, dtype=torch.bfloat16)
    biases = random_biases(case)
    grad = torch.randn_like(case.hidden_states)
    expected = gradients_of(on("auto"), case, biases, grad)
    for bias in biases.values():
        bias[4] = torch.nan
    for name, got in gradients_of(on("auto"), case, biases, grad).items():
        assert torch.equal(got, expected[name]), name


# --- the grouped GEMM's algebra, on the CPU ---------------------------------------------------------------------------


class OnTheHost(GroupedRows):
    """Grouped's products and biases; what our kernels do is done by torch. The rows of masked pairs are NaN."""

    def __init__(self, top_k_index, num_experts):
        self.loop = LoopRows(top_k_index, num_experts)
        self.slot_of_pair = self.loop.slot_of_pair
        self.offsets = torch.tensor(self.loop.offsets, dtype=torch.int32)

    def poisoned(self, rows):
        rows[self.loop.offsets[-1] :] = torch.nan
        return rows

    def gather(self, states):
        return self.poisoned(self.loop.gather(states).to(states.dtype))

    def combine(self, rows, weights, out=None):
        return self.loop.combine(self.poisoned(rows).float(), weights, out)

    def linear(self, rows, weight, bias=None):
        return self.poisoned(super().linear(rows, weight, bias))

    def activate(self, gate_up, activation):
        return reference.activate(gate_up, activation).to(gate_up.dtype)


@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_grouped_products_on_the_cpu(monkeypatch, activation, biased, layout):
    """No further from float64 than plain torch that rounds where they round; a bias is added in steps of ten rows."""
    monkeypatch.setattr(expert_rows, "_BIASED_AT_ONCE", 10)
    backend = type("Host", (expert_rows.RowsBackend,), {"rows": OnTheHost})()
    monkeypatch.setattr(type(registry()["reference"]), "forward", lambda _, *arguments: backend.forward(*arguments))
    monkeypatch.setattr(type(registry()["reference"]), "backward", lambda _, *arguments: backend.backward(*arguments))
    case = random_case(layout, True, dtype=torch.bfloat16, activation=activation)
    assert_no_further_than_plain("reference", case, random_biases(case, biased), activation)


def assert_no_further_than_plain(backend, case, biases, activation):
    """In norm, and in any element of the output twice that of plain torch's worst.

    Of a gradient four times: its elements are products of three rounded factors, whose worst scatters more.
    """
    grad = torch.randn_like(case.hidden_states)
    if case.hidden_states.is_cuda:
        poison_free_memory()
    ours = gradients_of(on(backend), case, biases, grad, activation=activation)
    truth = gradients_of(
        in_plain_torch,
        case,
        biases,
        grad,
        torch.float64,
        activation,
    )
    steps = gradients_of(plain, case, biases, grad, activation=activation)
    assert all(ours[name].stride() == getattr(case, name).stride() for name in ("gate_up_proj", "down_proj"))
    for name, expected in truth.items():
        times = 2 if name == "output" else 4
        assert max_error(ours[name], expected) <= times * max_error(steps[name], expected) + 1e-6, name
        limit = relative_error(steps[name], expected) if name == "output" else 0.012
        assert relative_error(ours[name], expected) <= limit, name
    assert not any(ours[name][4].any() for name in ours.keys() & {"gate_up_bias", "down_bias"})


# --- on CUDA ----------------------------------------------------------------------------------------------------------


def skip_unless_served(backend, case, activation, biases):
    has_bias = any(bias is not None for bias in biases.values())
    call = experts_call(*case[:4], activation, has_bias=has_bias)
    if (reason := registry()[backend].unsupported_reason(call)) is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "grouped", "simt"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_on_cuda_in_bfloat16(activation, biased, layout, masked, backend):
    case = random_case(layout, masked, 40, dtype=torch.bfloat16, device="cuda", activation=activation)
    biases = random_biases(case, biased)
    skip_unless_served(backend, case, activation, biases)
    assert_no_further_than_plain(backend, case, biases, activation)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fused", "grouped", "simt"])
@pytest.mark.parametrize("num_tokens", [1, 40, 1000])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("biased", EITHER, **either)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_output_on_cuda(activation, biased, layout, num_tokens, backend):
    """Every regime of the kernels, and gates and ups that reach the clamps."""
    case = random_case(layout, num_tokens > 1, num_tokens, (7, 128, 96, 3), dtype=torch.bfloat16, device="cuda",
                       activation=activation)  # fmt: skip
    case, biases = case._replace(hidden_states=case.hidden_states * 4), random_biases(case, biased)
    skip_unless_served(backend, case, activation, biases)
    poison_free_memory()
    output = fused_experts(*case, activation=activation, backend=backend, **biases)
    truth, steps = oracle(case, activation, **biases), rounded_experts(case, activation, **biases)
    if num_tokens > 1:  # the error of one token scatters
        assert relative_error(output, truth) <= relative_error(steps, truth)
    assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["simt", "reference"])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_on_cuda_in_float32(activation, dtype, layout, backend):
    """Computed in float32 (TF32 is off) and rounded once; sizes that fill no pack."""
    case = random_case(layout, True, 33, (7, 51, 29, 3), dtype=dtype, device="cuda", activation=activation)
    biases, grad = random_biases(case), torch.randn_like(case.hidden_states)
    ours = gradients_of(on(backend), case, biases, grad, activation=activation)
    truth = gradients_of(
        in_plain_torch,
        case,
        biases,
        grad,
        torch.float64,
        activation,
    )
    for name, expected in truth.items():
        rounding = torch.finfo(ours[name].dtype).eps / 2
        allowed = {"rtol": max(1.01 * rounding, 1e-5), "atol": 1e-5 * expected.abs().max().item()}
        torch.testing.assert_close(ours[name].double(), expected, **allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "simt"])
@pytest.mark.parametrize("num_tokens", [3, 9000])
def test_the_host_does_not_wait(backend, num_tokens):
    """Forward and backward, the same bits each time; 9000 tokens of 3 choices get their biases in several steps."""
    case = random_case((True, True), True, num_tokens, dtype=torch.bfloat16, device="cuda")
    biases, grad = random_biases(case), torch.randn_like(case.hidden_states)
    expected = gradients_of(on(backend), case, biases, grad)
    with no_host_sync():
        again = gradients_of(on(backend), case, biases, grad)
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
    assert relative_error(expected["output"], oracle(case, **biases)) < 0.006


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["grouped", "simt"])
def test_replays_in_a_cuda_graph(backend):
    case = random_case((True, True), True, 40, dtype=torch.bfloat16, device="cuda")
    biases = random_biases(case)
    settings = {"activation": "swigluoai", "backend": backend, **biases}
    eager = fused_experts(*case, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = fused_experts(*case, **settings)
    output.fill_(torch.nan)
    graph.replay()
    assert torch.equal(output, eager)
    biases["down_bias"].add_(1)
    graph.replay()
    assert torch.equal(output, fused_experts(*case, **settings))
    assert not torch.equal(output, eager)


@pytest.mark.gpu
def test_a_bias_takes_little_memory():
    """At most what 8192 of the 32,768 rows take."""
    case = random_case((True, True), False, 16384, (8, 512, 512, 2), dtype=torch.bfloat16, device="cuda")

    def peak(**biases):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_experts(*case, activation="gelu_tanh", backend="grouped", **biases)
        return torch.cuda.max_memory_allocated() - before

    biases = random_biases(case)
    peak(**biases)  # whatever is allocated once
    rows, slots = 8192 * 1024 * 2, 3 * 32768 * 4
    assert peak(**biases) - peak() <= rows + slots + 2**20


@pytest.mark.gpu
def test_biased_experts_of_gpt_oss_s_sizes():
    """20b: 32 experts of 2880, transposed and interleaved, both with bias."""
    activation = MoEActivation.SWIGLUOAI
    case = random_case(
        (True, True), False, 64, (32, 2880, 2880, 4), dtype=torch.bfloat16, device="cuda", activation=activation
    )
    biases = random_biases(case)
    truth, steps = oracle(case, activation, **biases), rounded_experts(case, activation, **biases)
    for backend in ("auto", "grouped"):
        output = fused_experts(*case, activation=activation, backend=backend, **biases)
        assert relative_error(output, truth) <= relative_error(steps, truth)
        assert max_error(output, truth) <= 2 * max_error(steps, truth)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", EITHER, **either)
@pytest.mark.parametrize("activation", OFF_THE_KINKS, ids=str)
def test_lora_is_the_experts_on_merged_weights(device, activation, layout, dtype):
    """Adapters are [out, in] as ever, whichever way the weights lie."""
    case = random_case(layout, True, dtype=dtype, device=device, activation=activation)
    biases = random_biases(case)
    adapters = [
        LowRank(*(torch.randn(7, *shape, device=device).to(dtype) / 8 for shape in ((8, size[1]), (size[0], 8))))
        for size in (case.gate_up_proj.shape[1:], case.down_proj.shape[1:])
    ]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*case[:3], *biases.values(), *adapters[0])]
    states, gate_up, down, gate_up_bias, down_bias, a, b = leaves
    output = lora_experts(
        states, gate_up, down, *case[3:], LowRank(a, b), adapters[1],
        activation=activation, gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip
    wide = [leaf.double() for leaf in leaves]
    merged = wide[1] + wide[6] @ wide[5], wide[2] + adapters[1].b.double() @ adapters[1].a.double()
    truth = reference.experts(wide[0], *merged, *case[3:], activation, *wide[3:5])
    grad = torch.randn_like(output)
    ours, expected = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(truth, leaves, grad.double())
    limit = 1e-12 if dtype == torch.float64 else 2e-2 if device.type == "cuda" else 4e-3
    for got, wanted in zip((output, *ours), (truth, *expected), strict=True):
        # expected is rounded to the leaves' dtype by the cast that it went through.
        assert relative_error(got, wanted.double()) < limit + (2**-8 if dtype == torch.bfloat16 else 0)


# --- torch.compile and torch.export -----------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    """Experts as GPT-OSS keeps them: transposed parameters, and biases."""

    def __init__(self, case, biases):
        super().__init__()
        self.gate_up_proj, self.down_proj = (torch.nn.Parameter(weight.mT.contiguous()) for weight in case[1:3])
        self.gate_up_bias, self.down_bias = map(torch.nn.Parameter, biases.values())

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return fused_experts(
            hidden_states,
            self.gate_up_proj.transpose(1, 2),
            self.down_proj.transpose(1, 2),
            top_k_index,
            top_k_weights,
            activation="swigluoai",
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
        )


@pytest.fixture
def layer(device):
    torch._dynamo.reset()
    case = random_case((False, False), True, device=device)
    biases = random_biases(case)
    transposed_case = laid_out(case, (True, True))
    return (
        Layer(case, biases),
        (case.hidden_states, *case[3:]),
        oracle(transposed_case, MoEActivation.SWIGLUOAI, **biases),
    )


def with_gradients(function, module, inputs):
    module.zero_grad()
    states = inputs[0].clone().requires_grad_()
    output = function(states, *inputs[1:])
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(gradient.is_contiguous() for gradient in gradients)
    return [output.detach(), states.grad, *gradients]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler, such as its advice on TF32
def test_compiled_without_a_graph_break(monkeypatch, layer, backend):
    """The weights arrive as transposed, not as copies, in both directions."""
    module, inputs, truth = layer
    asked = []
    monkeypatch.setattr(ops.experts, "select", lambda name, call, *way: asked.append(call) or select(name, call, *way))
    if backend == "inductor":
        skip_without_inductor()
    # A graph in torch's cache may have been compiled for other schemas of our ops.
    caches = torch._inductor.config.patch(force_disable_caches=True) if backend == "inductor" else nullcontext()
    with caches:
        ours = with_gradients(torch.compile(module, fullgraph=True, backend=backend), module, inputs)
    assert [(call.gate_up_transposed, call.down_transposed, call.has_bias) for call in asked] == [(True,) * 3] * 2
    torch.testing.assert_close(ours[0].double(), truth, rtol=1e-4, atol=1e-4)
    for got, expected in zip(ours, with_gradients(module, module, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_exported(layer):
    module, inputs, truth = layer
    program = torch.export.export(module, inputs)
    (node,) = (node for node in program.graph.nodes if "cupymoe" in str(node.target))
    assert [argument.meta["val"].stride() for argument in node.args[1:3]] == [(64 * 80, 1, 80), (40 * 64, 1, 64)]
    torch.testing.assert_close(program.module()(*inputs).double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["gate_up_bias", "down_bias", "gate_up_proj", "down_proj"])
def test_batched_gradients(device, wanted):
    """torch.vmap over the backward."""
    case = random_case((True, True), True, 4, (7, 8, 8, 2), device=device)
    tensors = {**case._asdict(), **random_biases(case)}

    def function(leaf):
        return fused_experts(**{**tensors, wanted: leaf}, activation="gelu_tanh")

    leaf = tensors[wanted].requires_grad_()
    output = function(leaf)
    grads = torch.randn(3, *output.shape, device=device)
    (batched,) = torch.autograd.grad(output, leaf, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(output, leaf, grad, retain_graph=True)[0] for grad in grads]
    assert each[0].any()
    torch.testing.assert_close(batched, torch.stack(each))


def test_vmap_over_biases():
    case = random_case((True, False), True)
    biases = {name: torch.stack([bias, bias + 1, -bias]) for name, bias in random_biases(case).items()}

    def experts(gate_up_bias, down_bias):
        return fused_experts(*case, activation="gelu_tanh", gate_up_bias=gate_up_bias, down_bias=down_bias)

    each = [experts(*both) for both in zip(*biases.values(), strict=True)]
    assert torch.equal(torch.vmap(experts)(*biases.values()), torch.stack(each))
