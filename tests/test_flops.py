"""The FLOPs of our ops are those that torch counts for the same products, one F.linear after the other."""

import itertools

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from cupymoe import MoEActivation, batched_experts, calls, flops, fused_experts, lora_experts, reference
from tests.helpers import random_biases, random_experts, run_python
from tests.test_lora import random_case


def counted(function):
    """FLOPs of a function, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def projected(rows, weight, adapter, expert):
    output = linear(rows, weight[expert])
    return output if adapter is None else output + linear(linear(rows, adapter.a[expert]), adapter.b[expert])


def dense_experts(case, gate_up, down, activation):
    """Each pair by itself."""
    output = torch.zeros_like(case.hidden_states)
    for token, k in itertools.product(*map(range, case.top_k_index.shape)):
        expert = int(case.top_k_index[token, k])
        gates = projected(case.hidden_states[token, None], case.gate_up_proj, gate_up, expert)
        rows = projected(reference.activate(gates, activation), case.down_proj, down, expert)
        output = output.index_add(0, torch.tensor([token]), rows * case.top_k_weights[token, k])
    return output


def assert_counts_agree(ours, dense, leaves):
    """Forward, and backward to the leaves."""
    for leaf in leaves:
        leaf.requires_grad_()
    (forward, output), (expected, dense_output) = counted(ours), counted(dense)
    assert forward == expected > 0
    torch.testing.assert_close(output, dense_output)
    backward, expected_backward = (
        counted(lambda each=each: torch.autograd.grad(each.sum(), leaves))[0] for each in (output, dense_output)
    )
    assert backward == expected_backward
    return forward, backward


@pytest.mark.parametrize("activation", [MoEActivation.GELU_TANH, MoEActivation.RELU2_NO_MUL])
@pytest.mark.parametrize(
    "trained", [(0,), (1,), (2,), (4,), (0, 1, 2, 4), (0, 4)], ids=lambda trained: "".join(map(str, trained))
)
def test_experts(activation, trained):
    """The numbers are positions among the arguments: where weights are frozen, only the others have a gradient."""
    case = random_experts(3, 4, 16, 8, 2, activation=activation, dtype=torch.float64)
    case = case._replace(top_k_weights=case.top_k_weights.double())
    forward, _ = assert_counts_agree(
        lambda: fused_experts(*case, activation=activation),
        lambda: dense_experts(case, None, None, activation),
        [case[position] for position in trained],
    )
    matrices = 3 if activation.is_gated else 2
    assert forward == 2 * case.top_k_index.numel() * matrices * 16 * 8


@pytest.mark.parametrize("adapted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("trained", ["adapters", "a", "b", "hidden_states", "everything"])
def test_lora_experts(adapted, trained):
    case, *adapters = random_case(3, masked=False, rank=16, dtype=torch.float64)
    case = case._replace(top_k_weights=case.top_k_weights.double())
    gate_up, down = (adapter if wanted else None for adapter, wanted in zip(adapters, adapted, strict=True))
    present = [adapter for adapter in (gate_up, down) if adapter is not None]
    a, b = [adapter.a for adapter in present], [adapter.b for adapter in present]
    leaves = {
        "adapters": a + b,
        "a": a,
        "b": b,
        "hidden_states": [case.hidden_states],
        "everything": [*case[:3], case.top_k_weights, *a, *b],
    }[trained]
    assert_counts_agree(
        lambda: lora_experts(*case, gate_up, down, activation="gelu_tanh"),
        lambda: dense_experts(case, gate_up, down, MoEActivation.GELU_TANH),
        leaves,
    )


@pytest.mark.parametrize("trained", ["gate_up_bias", "down_bias", "hidden_states"])
def test_biases_are_no_products(trained):
    """But the gradient of gate_up's bias comes through down_proj."""
    case = random_experts(3, 4, 16, 8, 2)
    tensors = {**case._asdict(), **random_biases(case)}
    tensors[trained].requires_grad_()
    forward, output = counted(lambda: fused_experts(**tensors, activation="gelu_tanh"))
    backward, _ = counted(lambda: output.sum().backward())
    one = 2 * case.top_k_index.numel() * 16 * 8
    assert forward == 3 * one
    assert backward == {"gate_up_bias": 1, "down_bias": 0, "hidden_states": 3}[trained] * one


def test_every_row_of_a_batch_counts():
    case, counts = random_experts(3, 4, 16, 8, 2), torch.tensor([0, 5, 2, 9], dtype=torch.int32)
    states = torch.randn(4, 5, 16)
    expected = 2 * 4 * 5 * 3 * 16 * 8
    for leaf, out in ((False, None), (False, torch.empty_like(states)), (True, None)):
        states.requires_grad_(leaf)
        call = counted(lambda out=out: batched_experts(states, counts, *case[1:3], activation="gelu_tanh", out=out))
        assert call[0] == expected


def test_router_logits():
    states, scale, projection = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 16), (16,), (7, 16)))
    assert_counts_agree(
        lambda: torch.ops.cupymoe.router_logits(states, scale, projection, 1e-6, "fast"),
        lambda: linear(reference.router_input(states, scale, 1e-6), projection),
        [states, scale, projection],
    )


def test_keeping_counts_as_computing_again(monkeypatch):
    case = random_experts(3)
    case.hidden_states.requires_grad_()
    counts = []
    for keeps in (False, True):
        monkeypatch.setattr(calls, "_may_keep_gate_up", lambda *_, keeps=keeps: keeps)
        monkeypatch.setattr(calls.ops, "keeps_gate_up", lambda *_: True)
        forward, output = counted(lambda: fused_experts(*case, activation="gelu_tanh"))
        counts.append((forward, counted(lambda output=output: output.sum().backward())[0]))
    assert counts[0] == counts[1]
    assert all(counts[0])


def test_masked_pairs_count_as_every_other():
    case = random_experts(3)
    kept, _ = counted(lambda: fused_experts(*case, activation="gelu_tanh"))
    case.top_k_index.fill_(-1)
    assert counted(lambda: fused_experts(*case, activation="gelu_tanh"))[0] == kept


@pytest.mark.parametrize("first", ["cupymoe", flops.COUNTER])
def test_whichever_is_imported_first(first):
    """cupymoe does not import the counter, which would import triton."""
    code = f"""
import importlib, sys
importlib.import_module({first!r})
if {first!r} == "cupymoe":
    assert {flops.COUNTER!r} not in sys.modules
import cupymoe, torch
from torch.utils.flop_counter import FlopCounterMode
states, projection = torch.randn(5, 16), torch.randn(7, 16)
with FlopCounterMode(display=False) as counter:
    torch.ops.cupymoe.router_logits(states, torch.randn(16), projection, 1e-6, "fast")
print(counter.get_total_flops())
"""
    assert int(run_python(code)) == 2 * 5 * 16 * 7
