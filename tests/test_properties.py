"""Properties of the public functions over drawn calls: on the CPU always, on a GPU where there is one.

A run is one seed, CUPYMOE_TEST_SEED; each property prints how many cases it held in, and a failure its drawn case.
"""

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from cupymoe import MoEActivation, fused_experts, moe_activation, reference, route
from cupymoe.backends import registry, serving
from cupymoe.kernels.sort_by_expert import sort_by_expert
from cupymoe.ops import experts_call
from tests.conftest import SEED
from tests.drawn import FLOATING, LAYOUTS, NEITHER, SEEDS, Arguments, build, calls, masked_at, relaid
from tests.helpers import assert_ulps, laid_out, max_error, oracle, rounded_experts

CASES = {"cpu": 40, "cuda": 170}  # of each property; 13 of them are 2,210 on a GPU

PROPERTIES = []


def holds_for(strategy):
    """A property: a function of a drawn case that asserts something."""

    def register(function):
        PROPERTIES.append(pytest.param(function, strategy, id=function.__name__))
        return function

    return register


@pytest.mark.parametrize(("check", "strategy"), PROPERTIES)
def test_property(device, check, strategy, capsys):
    held = 0

    @seed(SEED)
    @settings(
        max_examples=CASES[device.type],
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(strategy(device.type))
    def run(drawn):
        nonlocal held
        torch.manual_seed(drawn.seed)
        check(drawn, device)
        held += 1

    run()
    assert held >= CASES[device.type]
    with capsys.disabled():
        print(f"\n{check.__name__}: {held} cases on {device.type}, seed {SEED}")


def test_a_gpu_run_is_two_thousand_cases():
    assert len(PROPERTIES) * CASES["cuda"] >= 2000


def chosen(call, case):
    """The drawn backend, or the first that serves the call where that one does not."""
    asked = experts_call(*case[:4], call.model.activation, has_bias=any(call.biased))
    named = call.backend != "auto" and registry()[call.backend].unsupported_reason(asked) is None
    return call.backend if named else serving(asked).name


def run(call, case, backend=None):
    backend = backend or chosen(call, case)
    return fused_experts(*case.experts, activation=call.model.activation, backend=backend, **case.biases)


def assert_same(call, output, expected, backend):
    """Bit for bit from a kernel.

    In the reference BLAS sums in another order where rows have moved, and index_add_ on CUDA in any order where a token
    names an expert twice; one rounding comes after.
    """
    if backend != "reference":
        assert torch.equal(output, expected)
        return
    work, dtype = reference.work_dtype(output.dtype), output.dtype
    largest = 64 if call.weights == "large" else 1
    torch.testing.assert_close(
        output.double(),
        expected.double(),
        rtol=0 if dtype == work else torch.finfo(dtype).eps,
        atol=100 * torch.finfo(work).eps * largest,
    )


# --- the experts ------------------------------------------------------------------------------------------------------


@holds_for(calls)
def no_element_is_twice_as_far_from_float64_as_torch_s_own(call, device):
    case = build(call, device)
    output, truth = run(call, case), oracle(case.experts, call.model.activation, **case.biases)
    assert (output.shape, output.dtype) == (case.hidden_states.shape, call.model.dtype)
    if call.num_tokens:
        steps = case.experts._replace(top_k_index=case.top_k_index.long())
        steps = rounded_experts(steps, call.model.activation, **case.biases)
        # In float32 both are sums of rounded products, each in an order of its own.
        assert max_error(output, truth) <= 2 * max_error(steps, truth) + 1e-6 * max(1, truth.abs().max().item())


@holds_for(calls)
def permuted_tokens_give_permuted_outputs(call, device):
    case = build(call, device)
    order = torch.randperm(call.num_tokens, device=device)
    permuted = case._replace(
        **{name: getattr(case, name)[order] for name in ("hidden_states", "top_k_index", "top_k_weights")}
    )
    backend = chosen(call, case)
    assert_same(call, run(call, permuted, backend), run(call, case, backend)[order], backend)


@holds_for(calls)
def relabelled_experts_change_nothing(call, device):
    case, num_experts = build(call, device), call.model.num_experts
    order = torch.randperm(num_experts, device=device)
    exists = (case.top_k_index >= 0) & (case.top_k_index < num_experts)
    new_label = torch.argsort(order).to(case.top_k_index.dtype)[case.top_k_index.where(exists, 0).long()]
    relabelled = case._replace(
        gate_up_proj=case.gate_up_proj[order],
        down_proj=case.down_proj[order],
        top_k_index=new_label.where(exists, case.top_k_index),
        **{name: None if bias is None else bias[order] for name, bias in case.biases.items()},
    )
    relabelled = laid_out(relabelled, call.transposed)
    backend = chosen(call, case)
    assert_same(call, run(call, relabelled, backend), run(call, case, backend), backend)


@holds_for(calls)
def a_pair_of_weight_zero_is_as_a_masked_one(call, device):
    case = build(call, device)
    where = torch.rand(case.top_k_index.shape, device=device) < 0.4
    zero = case._replace(top_k_weights=case.top_k_weights.where(~where, 0.0))
    masked = case._replace(top_k_index=masked_at(case.top_k_index, where, call.model.num_experts))
    backend = chosen(call, case)
    assert_same(call, run(call, zero, backend), run(call, masked, backend), backend)


@holds_for(calls)
def the_output_is_linear_in_the_weights(call, device):
    """The sum over k of weight times what that pair gives alone, but for the roundings of those and of the sum."""
    case, backend = build(call, device), chosen(call, build(call, device))
    output, eps = run(call, case, backend), torch.finfo(call.model.dtype).eps
    expected, allowed = torch.zeros_like(output).double(), output.double().abs() * eps / 2
    for k in range(call.model.top_k):
        alone = torch.zeros_like(case.top_k_weights)
        alone[:, k] = 1
        part = run(call, case._replace(top_k_weights=alone), backend).double() * case.top_k_weights[:, k, None]
        expected += part
        allowed += part.abs() * (eps / 2 + (call.model.top_k + 100 * (backend == "reference")) * 2.0**-23) * 1.01
    allowed += 1000 * torch.finfo(call.model.dtype).smallest_normal * eps  # of what is subnormal, times large weights
    assert ((output.double() - expected).abs() <= allowed).all()


@holds_for(calls)
def a_power_of_two_comes_out_of_the_weights_exactly(call, device):
    case, backend = build(call, device), chosen(call, build(call, device))
    output = run(call, case._replace(top_k_weights=case.top_k_weights * 4), backend)
    expected = run(call, case, backend) * 4
    # Below that a rounding is of the subnormals' grid, which does not scale.
    normal = expected.abs() >= 8 * torch.finfo(call.model.dtype).tiny
    assert_same(call, output[normal], expected[normal], backend)


@holds_for(calls)
def what_is_not_a_number_stays_in_its_token(call, device):
    """NaN, the infinities and the largest numbers in one column of some tokens: every other token has the same bits."""
    case, info = build(call, device), torch.finfo(call.model.dtype)
    bad = torch.rand(call.num_tokens, device=device) < 0.3
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, info.max, info.min], device=device, dtype=torch.float64)
    drawn = torch.randint(len(values), (call.num_tokens,), device=device)
    column = torch.randint(call.model.hidden, (1,)).item()
    hidden_states = case.hidden_states.clone()
    hidden_states[bad, column] = values[drawn][bad].to(call.model.dtype)
    backend = chosen(call, case)
    clean, output = run(call, case, backend), run(call, case._replace(hidden_states=hidden_states), backend)
    assert_same(call, output[~bad], clean[~bad], backend)
    exists = ((case.top_k_index >= 0) & (case.top_k_index < call.model.num_experts)).any(-1)
    assert output[bad & (drawn == 0) & exists].isnan().all()
    assert not output[bad & ~exists].any()


@holds_for(calls)
def a_bad_expert_stays_with_its_tokens(call, device):
    """NaN in both weights and biases of one expert: who is not routed there has the same bits, and who is has NaN."""
    case, expert = build(call, device), torch.randint(call.model.num_experts, (1,)).item()
    names = [name for name in ("gate_up_proj", "down_proj", *case.biases) if getattr(case, name) is not None]
    bad = {name: getattr(case, name).clone() for name in names}
    for tensor in bad.values():
        tensor[expert] = torch.nan
    backend = chosen(call, case)
    clean = run(call, case, backend)
    output = run(call, case._replace(**bad), backend)
    hit = (case.top_k_index == expert).any(-1)
    assert_same(call, output[~hit], clean[~hit], backend)
    assert output[hit].isnan().all()


@holds_for(calls)
def layout_does_not_matter(call, device):
    """Strides and offsets of what is copied where it must be; offsets of the weights, which never are."""
    case = build(call, device)
    movable = ["hidden_states", "top_k_index", "top_k_weights"]
    other = case._replace(**{name: relaid(getattr(case, name), call.layout) for name in movable})
    if call.layout not in LAYOUTS[:2]:
        moved = {name: relaid(bias, call.layout) for name, bias in case.biases.items() if bias is not None}
        for name, is_transposed in zip(("gate_up_proj", "down_proj"), call.transposed, strict=True):
            weight = getattr(case, name)
            moved[name] = relaid(weight.mT, call.layout).mT if is_transposed else relaid(weight, call.layout)
        other = other._replace(**moved)
    given = [(tensor, same) for tensor, same in zip(other, case, strict=True) if same is not None]
    assert all(torch.equal(tensor, same) for tensor, same in given)
    backend = chosen(call, other)
    before = [tensor.clone() for tensor, _ in given]
    assert_same(call, run(call, other, backend), run(call, case, backend), backend)
    assert all(torch.equal(tensor, kept) for (tensor, _), kept in zip(given, before, strict=True))


@holds_for(calls)
def inputs_may_share_memory(call, device):
    """One token for all, one row of choices for all, and both weights and the hidden states out of one storage."""
    call = call._replace(magnitude="one", transposed=NEITHER, biased=NEITHER)
    case = build(call, device)
    gate_up = case.gate_up_proj
    down = gate_up.flatten()[: case.down_proj.numel()].view(case.down_proj.shape)
    views = Arguments(
        gate_up[0, :1].expand(call.num_tokens, -1),
        gate_up,
        down,
        case.top_k_index[:1].expand(call.num_tokens, -1),
        case.top_k_weights[:1].expand(call.num_tokens, -1),
        *case.biases.values(),
    )
    copies = (tensor.clone(memory_format=torch.contiguous_format) for tensor in views.experts)
    copies = Arguments(*copies, *case.biases.values())
    backend = chosen(call, views)
    assert_same(call, run(call, views, backend), run(call, copies, backend), backend)


# --- the rest ---------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """A drawn call of route."""

    num_tokens: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    ties: bool
    seed: int


@st.composite
def routings(draw, device_type):
    if device_type == "cpu":
        num_experts = draw(st.integers(1, 40))
        top_k, dtype = draw(st.integers(1, num_experts)), draw(st.sampled_from(FLOATING))
    else:
        num_experts, top_k = draw(st.sampled_from([(1, 1), (7, 3), (33, 33), (60, 6), (128, 8)]))
        dtype = draw(st.sampled_from(FLOATING[:3]))
    return Routing(draw(st.integers(0, 40)), num_experts, top_k, dtype, draw(st.booleans()), draw(SEEDS))


@holds_for(routings)
def routing_is_a_choice_of_the_largest(drawn, device):
    """Weights sum to one, fall, feel neither a shift nor the order of tokens, and a scale multiplies them; the chosen
    logits are the greatest, each expert once, ties to the lower index; NaN and infinity stay in their row."""
    shape = (drawn.num_tokens, drawn.num_experts)
    logits = torch.randn(shape, device=device).to(drawn.dtype)
    if drawn.ties:
        logits = (torch.randint(-4, 5, shape, device=device) / 2).to(drawn.dtype)
    weights, index = route(logits, drawn.top_k)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]), rtol=1e-5, atol=0)
    assert (weights.diff(dim=-1) <= 0).all()
    expected = logits.sort(dim=-1, descending=True, stable=True).indices[:, : drawn.top_k]
    assert torch.equal(index, expected)

    order = torch.randperm(drawn.num_tokens, device=device)
    for permuted, original in zip(route(logits[order], drawn.top_k), (weights, index), strict=True):
        assert torch.equal(permuted, original[order])
    if drawn.ties:  # halves stay exact when shifted by 8
        shifted_weights, shifted_index = route(logits + 8, drawn.top_k)
        assert torch.equal(shifted_index, index)
        torch.testing.assert_close(shifted_weights, weights, rtol=1e-5, atol=0)
    scale = torch.randn(drawn.num_experts, device=device).to(drawn.dtype)
    scaled, same_index = route(logits, drawn.top_k, per_expert_scale=scale)
    assert torch.equal(same_index, index)
    torch.testing.assert_close(scaled, weights * scale.float()[index], rtol=1e-6, atol=0)

    bad = torch.rand(drawn.num_tokens, device=device) < 0.3
    logits[bad, torch.randint(drawn.num_experts, (1,)).item()] = torch.nan if drawn.seed % 2 else torch.inf
    bad_weights, bad_index = route(logits, drawn.top_k)
    assert torch.equal(bad_weights[~bad], weights[~bad])
    assert torch.equal(bad_index[~bad], index[~bad])
    assert bad_weights[bad].isnan().all()
    assert ((bad_index >= 0) & (bad_index < drawn.num_experts)).all()


class Activated(NamedTuple):
    """A drawn call of moe_activation."""

    num_rows: int
    columns: int
    dtype: torch.dtype
    activation: MoEActivation
    layout: str
    size: float
    seed: int


def activations(device_type):
    return st.builds(
        Activated,
        num_rows=st.integers(0, 40),
        columns=st.integers(1, 33) if device_type == "cpu" else st.sampled_from([1, 13, 64]),
        dtype=st.sampled_from(FLOATING[:3]),
        activation=st.sampled_from(list(MoEActivation)),
        layout=st.sampled_from(LAYOUTS),
        size=st.sampled_from([2.0**-20, 1.0, 2.0]),
        seed=SEEDS,
    )


@holds_for(activations)
def an_activation_is_float64_s_rounded_once(drawn, device):
    """In every layout, with infinities and NaN among ordinary numbers, and whatever the other rows are."""
    shape = (drawn.num_rows, drawn.activation.input_size(drawn.columns))
    input = drawn.size * torch.randn(shape, device=device)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0], device=device)
    values = special[torch.randint(len(special), shape, device=device)]
    input = torch.where(torch.rand(shape, device=device) < 0.05, values, input).to(drawn.dtype)
    output = moe_activation(drawn.activation, relaid(input, drawn.layout))
    if drawn.num_rows:
        truth = reference.activate(input.double(), drawn.activation)
        assert_ulps(output, truth, 4.0 if drawn.dtype == torch.float32 else 0.51)
    order = torch.randperm(drawn.num_rows, device=device)
    permuted = moe_activation(drawn.activation, input[order])
    torch.testing.assert_close(permuted, output[order], rtol=0, atol=0, equal_nan=True)


@holds_for(calls)
def the_sort_is_a_permutation(call, device):
    """Its inverse gives every kept pair back, counts are those of the experts, and masked pairs have no slot."""
    index, num_experts = build(call, device).top_k_index, call.model.num_experts
    exists = (index >= 0) & (index < num_experts)
    if device.type == "cpu":
        # What the kernel is compared with on a GPU, held to the same: stable sort, and its inverse.
        key = torch.where(exists, index, num_experts).flatten()
        order = torch.sort(key, stable=True).indices[: int(exists.sum())]
        slots = torch.full_like(key, -1)
        slots[order] = torch.arange(len(order), dtype=key.dtype)
        slots, tokens = slots.view(index.shape), order // index.shape[1]
        counts = torch.bincount(key[key < num_experts].long(), minlength=num_experts)
    elif index.numel():
        pairs = sort_by_expert(index, num_experts)
        slots, tokens, counts = pairs.slot_of_pair, pairs.token_of_slot, pairs.expert_offsets.diff()
        assert pairs.expert_offsets[0] == 0
    else:
        return
    kept = slots[exists].long()
    assert (slots[~exists] == -1).all()
    assert torch.equal(kept.sort().values, torch.arange(len(kept), device=device))
    token_of_pair = torch.arange(len(index), device=device)[:, None].expand(index.shape)
    assert torch.equal(tokens[kept].long(), token_of_pair[exists])
    assert torch.equal(counts.long(), torch.bincount(index[exists].long(), minlength=num_experts))
    in_order = torch.empty_like(kept).scatter_(0, kept, index[exists].long())
    assert (in_order.diff() >= 0).all()
