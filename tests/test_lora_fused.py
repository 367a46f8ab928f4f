"""Adapters on the fused backend: the output and every gradient against float64 on merged weights."""

import pytest
import torch

from cupymoe import LowRank, MoEActivation, lora_experts, reference
from tests.helpers import (
    Experts,
    laid_out,
    max_error,
    no_host_sync,
    poison_free_memory,
    random_biases,
    random_experts,
    relative_error,
    rounded_experts,
)
from tests.test_experts_backward import COUNTS, with_slots

pytestmark = pytest.mark.gpu

GELU_TANH = MoEActivation.GELU_TANH
FACTORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")
WEIGHTS = ("gate_up_proj", "down_proj")
NAMES = ("hidden_states", "top_k_weights", *FACTORS)
EVERYTHING = (*NAMES, *WEIGHTS)
SIZES = {"num_experts": 16, "hidden": 192, "intermediate": 88, "top_k": 4}


def random_factors(case, rank, adapted=(True, True)):
    """By name, only of the weights that are adapted; what they add is as large as the weight."""
    factors = {}
    for name, weight, has_one in zip(("gate_up", "down"), case[1:3], adapted, strict=True):
        if has_one:
            num_experts, out_size, in_size = weight.shape
            factors[f"{name}_a"] = weight.new_empty(num_experts, rank, in_size).normal_(std=in_size**-0.5)
            factors[f"{name}_b"] = weight.new_empty(num_experts, out_size, rank).normal_(std=rank**-0.5)
    return factors


def as_peft(factors):
    """The same in float32, b as a view of [out, r, E]."""
    wide = {name: factor.float() for name, factor in factors.items()}
    return {
        name: factor.permute(1, 2, 0).contiguous().permute(2, 0, 1) if name.endswith("_b") else factor
        for name, factor in wide.items()
    }


def tensors_of(case, factors, biases):
    return {**case._asdict(), **factors, **biases}


def split(tensors, scalings):
    """The case, both adapters and the biases."""
    adapters = [
        LowRank(tensors[f"{name}_a"], tensors[f"{name}_b"], scaling) if f"{name}_a" in tensors else None
        for name, scaling in zip(("gate_up", "down"), scalings, strict=True)
    ]
    biases = {name: tensors[name] for name in ("gate_up_bias", "down_bias") if name in tensors}
    return Experts(*(tensors[name] for name in Experts._fields)), adapters, biases


UNSCALED = (1.0, 1.0)


def ours(activation=GELU_TANH, scalings=UNSCALED, **settings):
    def compute(tensors):
        case, adapters, biases = split(tensors, scalings)
        return lora_experts(*case, *adapters, activation=activation, **biases, **settings)

    return compute


def merged(function, scalings=UNSCALED):
    """What a function makes of merged weights, in the dtype of the tensors."""

    def compute(tensors):
        case, adapters, biases = split(tensors, scalings)
        weights = [
            weight
            if adapter is None
            else weight + (adapter.scaling * adapter.b).to(weight.dtype) @ adapter.a.to(weight.dtype)
            for weight, adapter in zip(case[1:3], adapters, strict=True)
        ]
        return function(case._replace(gate_up_proj=weights[0], down_proj=weights[1]), **biases)

    return compute


def gradients(function, tensors, grad, wanted, dtype=None):
    """The output, and gradients by name."""
    leaves = {
        name: (tensor if name == "top_k_index" else tensor.detach().to(dtype)).clone()
        for name, tensor in tensors.items()
    }
    wanted = [name for name in wanted if name in leaves]
    for name in wanted:
        leaves[name].requires_grad_()
    output = function(leaves)
    found = torch.autograd.grad(output, [leaves[name] for name in wanted], grad.to(output.dtype))
    return {"output": output.detach(), **dict(zip(wanted, found, strict=True))}


def assert_close_to_float64(found, tensors, grad, activation=GELU_TANH, limit=0.0055, scalings=UNSCALED):
    """In norm, and elementwise against plain torch that merges the weights and rounds each product.

    Of an adapter's gradient up to five factors are rounded to bfloat16, each by 0.0017 in norm, and with rank 1 no sum
    over the rank evens them out. Elementwise as in tests/test_bias_and_layout_rounded.py: of a gradient four times.
    """
    wanted = [name for name in found if name != "output"]
    truth = gradients(
        merged(lambda case, **biases: reference.experts(*case, activation, **biases), scalings),
        tensors,
        grad,
        wanted,
        torch.float64,
    )
    rounded = merged(lambda case, **biases: rounded_experts(case, activation, **biases), scalings)
    plain = gradients(rounded, tensors, grad, wanted)
    for name, expected in truth.items():
        assert relative_error(found[name], expected) <= limit, name
        times = 2 if name == "output" else 4
        assert max_error(found[name], expected) <= times * max_error(plain[name], expected) + 1e-6, name


KINDS = {
    "Gemma 4's": (GELU_TANH, (272, 72), 16, False, False),
    "GPT-OSS's": (MoEActivation.SWIGLUOAI, (192, 88), 8, True, True),
    "ungated": (MoEActivation.RELU2_NO_MUL, (64, 256), 64, False, False),
    "transposed": (GELU_TANH, (192, 88), 16, True, False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_any_number_of_slots(kind):
    """The gradients of the weights too, and zeros where an expert has no token."""
    activation, (hidden, intermediate), rank, is_transposed, has_bias = KINDS[kind]
    case = with_slots(COUNTS, hidden=hidden, intermediate=intermediate, activation=activation)
    case = laid_out(case, (is_transposed, is_transposed))
    tensors = tensors_of(case, random_factors(case, rank), random_biases(case) if has_bias else {})
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    found = gradients(ours(activation), tensors, grad, (*EVERYTHING, "gate_up_bias", "down_bias"))
    assert_close_to_float64(found, tensors, grad, activation)
    for name in (*WEIGHTS, *FACTORS):
        for expert in (0, 8, 12):
            assert not found[name][expert].any(), name


@pytest.mark.parametrize("rank", [1, 4, 8, 12, 16, 64])
def test_ranks(rank):
    case = random_experts(300, **SIZES, dtype=torch.bfloat16, device="cuda")
    tensors = tensors_of(case, random_factors(case, rank), {})
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    found = gradients(ours(), tensors, grad, NAMES)
    assert found["gate_up_a"].shape[1] == rank
    assert_close_to_float64(found, tensors, grad)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rank", [4, 16])
def test_factors_and_scaling_as_peft_has_them(rank, is_transposed):
    """Gradients in the factors' own dtypes and layouts."""
    case = random_experts(300, **SIZES, dtype=torch.bfloat16, device="cuda")
    case = laid_out(case, (is_transposed, is_transposed))
    tensors, scalings = tensors_of(case, as_peft(random_factors(case, rank)), {}), (0.5, -2.0)
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    found = gradients(ours(scalings=scalings), tensors, grad, NAMES)
    for name in FACTORS:
        assert found[name].dtype == torch.float32, name
        assert found[name].stride() == tensors[name].stride(), name
    assert_close_to_float64(found, tensors, grad, scalings=scalings)


@pytest.mark.parametrize("keep", ["gate_up", "input"])
def test_a_training_forward_keeps_no_copy_of_the_adapters(keep):
    """But gate_up and both narrow products, where that is asked for."""
    case = random_experts(512, **SIZES, dtype=torch.bfloat16, device="cuda")
    leaves = tensors_of(case, as_peft(random_factors(case, 16)), {})
    for name in NAMES:
        leaves[name].requires_grad_()
    function = ours(scalings=(0.5, 2.0), keep=keep)
    function(leaves)
    before = torch.cuda.memory_allocated()
    output = function(leaves)
    kept = torch.cuda.memory_allocated() - before - output.nbytes
    assert kept == (512 * 4 * (2 * 88 + 16 + 16) * 2 if keep == "gate_up" else 0)


@pytest.mark.parametrize("num_tokens", [1, 16, 100, 1000, 1500])
def test_the_training_forward_has_the_bits_of_inference(num_tokens):
    """By the weight stream and in every cut of the tiles, whatever is kept; masked pairs have no gradient."""
    case = random_experts(num_tokens, **SIZES, dtype=torch.bfloat16, device="cuda")
    case.top_k_index[::3, 1] = -1
    tensors = tensors_of(case, random_factors(case, 16), {})
    grad = torch.randn_like(case.hidden_states)
    plain = ours()(tensors)
    poison_free_memory()
    kept, again = (gradients(ours(keep=keep), tensors, grad, EVERYTHING) for keep in ("gate_up", "input"))
    assert torch.equal(kept["output"], plain)
    assert torch.equal(again["output"], plain)
    for name in EVERYTHING:
        if name != "down_b":  # of the kept narrow product, or of one that is made again from what gate_up is rounded to
            assert relative_error(kept[name], again[name].double()) < 0.002, name
    assert not kept["top_k_weights"][::3, 1].any()
    # Of one slot of an expert nothing evens out: 0.0056 of down_b, whose six factors are rounded.
    for found in (kept, again):
        assert_close_to_float64(found, tensors, grad, limit=0.0055 if num_tokens > 1 else 0.008)


@pytest.mark.parametrize("adapted", [(True, False), (False, True)], ids=["gate_up", "down"])
def test_one_adapter_alone(adapted):
    case = random_experts(300, **SIZES, dtype=torch.bfloat16, device="cuda")
    tensors = tensors_of(case, random_factors(case, 16, adapted), {})
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    assert_close_to_float64(gradients(ours(), tensors, grad, EVERYTHING), tensors, grad)


@pytest.mark.parametrize("keep", ["gate_up", "input"])
def test_bits_do_not_change(keep):
    """Over runs, on another stream, and in a CUDA graph of a whole step."""
    case = random_experts(700, **SIZES, dtype=torch.bfloat16, device="cuda")
    tensors = tensors_of(case, random_factors(case, 16), {})
    grad = torch.randn_like(case.hidden_states)

    def step():
        return gradients(ours(keep=keep), tensors, grad, NAMES)

    expected = step()
    poison_free_memory()
    with no_host_sync():
        again = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for tensor in replayed.values():
        tensor.fill_(torch.nan)
    graph.replay()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name
        assert torch.equal(elsewhere[name], tensor), name
        assert torch.equal(replayed[name], tensor), name


def test_nan_stays_where_it_is():
    """In the rows and the gradients of one token and of one expert."""
    case = with_slots((40, 70, 90), hidden=192, intermediate=88)
    case.hidden_states[7] = torch.nan
    tensors = tensors_of(case, random_factors(case, 16), {})
    found = gradients(ours(), tensors, torch.randn_like(case.hidden_states), EVERYTHING)
    bad_token = torch.zeros(200, dtype=torch.bool, device="cuda")
    bad_token[7] = True
    for name in ("output", "hidden_states", "top_k_weights"):
        assert torch.equal(found[name].isnan().any(-1), bad_token), name
    bad_expert = torch.arange(3, device="cuda") == case.top_k_index[7]
    for name in (*WEIGHTS, *FACTORS):
        assert torch.equal(found[name].flatten(1).isnan().any(-1), bad_expert), name


@pytest.mark.parametrize("wanted", EVERYTHING)
def test_what_is_not_asked_for_is_not_computed(wanted, monkeypatch):
    """No other gradient is computed on the way of one alone, which is the same: but for the order of the sums of low's
    gradient, which comes of another kernel where ``b`` has a gradient too."""
    from cupymoe.backends import fused_adapters, fused_backward

    case = random_experts(100, **SIZES, dtype=torch.bfloat16, device="cuda")
    tensors = tensors_of(case, random_factors(case, 16), {})
    grad = torch.randn_like(case.hidden_states)
    expected = gradients(ours(), tensors, grad, EVERYTHING)
    beside_b = gradients(ours(), tensors, grad, dict.fromkeys((wanted, "gate_up_b", "down_b")))
    assert torch.equal(beside_b[wanted], expected[wanted])
    needed = {"hidden_states": "combine", "top_k_weights": "sum_parts"}
    for name in ("combine", "sum_parts", "experts_outer_wgmma"):
        if name != needed.get(wanted) and not (name == "experts_outer_wgmma" and wanted in WEIGHTS):
            monkeypatch.setattr(fused_backward, name, None)
    if wanted not in FACTORS:
        monkeypatch.setattr(fused_adapters, "lora_outer", None)
    if wanted != "down_b":
        monkeypatch.setattr(fused_adapters, "lora_back", None)
    alone = gradients(ours(), tensors, grad, (wanted,))[wanted]
    if wanted in ("down_b", "down_proj"):  # what low's gradient adds to is not on their way
        assert torch.equal(alone, expected[wanted])
    assert relative_error(alone, expected[wanted].double()) < 0.002


def test_fp16():
    case = random_experts(300, **SIZES, dtype=torch.float16, device="cuda")
    tensors = tensors_of(case, random_factors(case, 16), {})
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    assert_close_to_float64(gradients(ours(), tensors, grad, NAMES), tensors, grad, limit=0.0006)


def test_gemma_4_s_sizes():
    """The errors that training promises, of adapters as bench.py --regime lora has them: 8% of the weights."""
    case = random_experts(1500, 128, 2816, 704, 8, dtype=torch.bfloat16, device="cuda")
    factors = random_factors(case, 16)
    tensors = tensors_of(case, {name: factor.normal_(std=0.02) for name, factor in factors.items()}, {})
    grad = torch.randn_like(case.hidden_states)
    poison_free_memory()
    found = gradients(ours(), tensors, grad, NAMES)
    truth = gradients(merged(lambda case: reference.experts(*case, GELU_TANH)), tensors, grad, NAMES, torch.float64)
    limits = {"output": 0.0034, "hidden_states": 0.0035, "top_k_weights": 0.0035}
    for name, expected in truth.items():
        assert relative_error(found[name], expected) <= limits.get(name, 0.004), name


def test_compiled_whole():
    case = random_experts(300, **SIZES, dtype=torch.bfloat16, device="cuda")
    tensors = tensors_of(case, as_peft(random_factors(case, 12)), {})
    grad = torch.randn_like(case.hidden_states)
    function = ours(scalings=(0.5, 2.0))
    expected = gradients(function, tensors, grad, NAMES)
    found = gradients(torch.compile(function, fullgraph=True), tensors, grad, NAMES)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
