"""Every combination of docs/served.md: computed and right, or refused by the name of what is not served."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from cupymoe import LowRank, MoEActivation, fused_experts, lora_experts, quantize, reference
from tests.helpers import Experts, laid_out, random_biases, random_experts, slow_on_cuda

TEXT = (Path(__file__).parents[1] / "docs" / "served.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\w+) \| ([\w ]+) \| (served|not yet)", TEXT, re.MULTILINE)
AXES = {}
for _axis, _value, _ in ROWS:
    AXES.setdefault(_axis, []).append(_value)
NOT_SERVED = {value for _, value, state in ROWS if state == "not yet"}
REFUSALS = {
    "batched": r"hidden_states must have shape \[\*, \*\], got \[",
}


def test_the_table_has_every_axis():
    assert {axis: len(values) for axis, values in AXES.items()} == {
        "weights": 3,
        "direction": 2,
        "adapters": 2,
        "bias": 2,
        "numerics": 2,
        "experts": 3,
        "layout": 2,
        "run": 2,
    }
    assert REFUSALS.keys() == NOT_SERVED


class Call(torch.nn.Module):
    """The call as a module, which is what torch.export takes, and which holds quantised weights."""

    def __init__(self, cell, settings, quantised=()):
        super().__init__()
        self.low_rank, self.settings = cell["adapters"] == "low rank", settings
        self.quantised = torch.nn.ModuleList(quantised)

    def forward(self, *tensors, **biases):
        if len(self.quantised):
            tensors = tensors[0], *self.quantised, *tensors[3:]
        if not self.low_rank:
            return fused_experts(*tensors[:5], activation="gelu_tanh", **biases, **self.settings)
        adapters = LowRank(*tensors[5:7]), LowRank(*tensors[7:9])
        return lora_experts(*tensors[:5], *adapters, activation="gelu_tanh", **biases, **self.settings)


def truth(tensors, biases):
    """float64 on merged weights."""
    states, gate_up, down, index, weights, *factors = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors
    )
    if factors:
        gate_up, down = gate_up + factors[1] @ factors[0], down + factors[3] @ factors[2]
    return reference.experts(states, gate_up, down, index, weights, MoEActivation.GELU_TANH, **biases)


@slow_on_cuda
@pytest.mark.parametrize("values", [*itertools.product(*AXES.values())], ids="-".join)
def test_a_cell(device, values):
    cell = dict(zip(AXES, values, strict=True))
    case, settings = random_experts(9, 6, 32, 24, 2, device=device), {}
    refused = [value for value in values if value in NOT_SERVED]
    if cell["experts"] == "masked pairs":
        case.top_k_index[::2, 0], case.top_k_index[1::3, 1] = -1, 6
        settings["global_num_experts"] = 12
    if cell["experts"] == "expert_map":
        case.top_k_index[::2, 0] = 6  # one that is not here
        settings["expert_map"] = torch.tensor([5, 3, 1, 0, 2, 4, -1], device=device)
    local_index = settings["expert_map"][case.top_k_index] if "expert_map" in settings else case.top_k_index
    if cell["numerics"] == "invariant":
        settings["numerics"] = "invariant"
    quantised = []
    if cell["weights"] == "quantised":
        quantised = [*quantize(*case[1:3], "int8")]
        gate_up, down = (weight.dequantize(torch.float32) for weight in quantised)
        case = case._replace(gate_up_proj=gate_up, down_proj=down)
    if cell["weights"] == "transposed":
        case = laid_out(case, (True, True))
    if cell["layout"] == "batched":
        case = Experts(case.hidden_states.expand(6, -1, -1), *case[1:])
    factors = [torch.randn(shape, device=device) / 4 for shape in ((6, 8, 32), (6, 48, 8), (6, 8, 24), (6, 32, 8))]
    tensors = [*case, *(factors if cell["adapters"] == "low rank" else [])]
    biases = random_biases(case) if cell["bias"] == "both" else {}
    call = Call(cell, settings, quantised)
    if refused:
        with pytest.raises((TypeError, ValueError), match="|".join(REFUSALS[value] for value in refused)):
            call(*tensors, **biases)
        return
    if cell["run"] == "exported":
        call = torch.export.export(call, tuple(tensors), biases).module()
    leaves = [
        tensor.requires_grad_(cell["direction"] == "backward")
        for tensor in (*tensors[:1], *(() if quantised else tensors[1:3]), *tensors[3:], *biases.values())
        if tensor.is_floating_point()
    ]
    output, expected = call(*tensors, **biases), truth([*tensors[:3], local_index, *tensors[4:]], biases)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)
    if cell["direction"] == "backward":
        grad = torch.randn_like(output)
        ours, theirs = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad.double())
        for got, wanted in zip(ours, theirs, strict=True):
            assert wanted.any()
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)
