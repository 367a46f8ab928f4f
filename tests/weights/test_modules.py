"""Modules of the experts whose weights are quantised: calls, states, and everything that looks at their parameters."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from cupymoe import (
    Gemma4Experts,
    Gemma4MoE,
    Gemma4MoEConfig,
    MoEActivation,
    MoEExperts,
    QuantizedWeight,
    explain,
    quantize,
    warmup,
)
from tests.helpers import oracle, random_biases, random_experts, randomize, relative_error
from tests.weights.helpers import random_weight

CONFIG = Gemma4MoEConfig(64, 32, 6, 2, "gelu_pytorch_tanh")


def moe():
    return randomize(Gemma4MoE(CONFIG))


def exact(case, experts):
    """The case with the float64 of experts' weights."""
    weights = [
        weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.detach().double()
        for weight in experts.projections()[:2]
    ]
    return case._replace(gate_up_proj=weights[0], down_proj=weights[1])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", [MoEActivation.SILU, MoEActivation.RELU2_NO_MUL], ids=str)
def test_quantised_in_place(activation, transposed, bias):
    case = random_experts(5, 6, 64, 32, 2, activation=activation)
    experts = MoEExperts(6, 64, 32, activation, bias=bias, transposed=transposed)
    for parameter, value in zip(experts.projections(), (*case[1:3], *random_biases(case).values()), strict=False):
        if parameter is not None:
            parameter.data.copy_(value)
    plain = copy.deepcopy(experts)
    experts.quantize_("int4", group_size=32, scale_rule="q4_0")
    name = "gate_up_proj" if activation.is_gated else "up_proj"
    assert {*experts.state_dict()} == {
        *(f"{weight}.{buffer}" for weight in (name, "down_proj") for buffer in ("codes", "scales", "_extra_state")),
        *([f"{name}_bias", "down_proj_bias"] if bias else []),
    }
    assert [*experts.parameters()] == ([getattr(experts, f"{name}_bias"), experts.down_proj_bias] if bias else [])
    expected = quantize(*(each.detach() for each in plain.projections()[:2]), "int4", scale_rule="q4_0")
    for ours, theirs in zip(experts.projections()[:2], expected, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
    biases = {}
    if bias:
        gate_up_bias, down_bias = experts.projections()[2:]
        biases = {"gate_up_bias": gate_up_bias.detach().double(), "down_bias": down_bias.detach().double()}
    output = experts(case[0], *case[3:])
    assert relative_error(output, oracle(exact(case, experts), activation, **biases)) < 1e-5
    with pytest.raises(ValueError, match=f"must have plain weights, got {name} in int4_g32"):
        experts.quantize_("int4")


def test_a_group_size_for_each_weight():
    experts = randomize(MoEExperts(6, 128, 32, "silu"))
    experts.quantize_("int4", group_size=(128, 32))
    assert [weight.format.name for weight in experts.projections()[:2]] == ["int4_g128", "int4_g32"]


def test_assigned():
    case = random_experts(5, 6, 64, 32, 2)
    experts = MoEExperts(6, 64, 32, "gelu_tanh")
    experts.gate_up_proj = random_weight("nvfp4", 6, 64, 64)
    experts.down_proj = torch.nn.Parameter(case.down_proj)
    output = experts(case[0], *case[3:])
    assert relative_error(output, oracle(exact(case, experts))) < 1e-5
    assert [name for name, _ in experts.named_parameters()] == ["down_proj"]


@pytest.mark.parametrize("format", ["int4", "nvfp4", "fp8"])
def test_states(format, tmp_path):
    ours = moe()
    ours.experts.quantize_(format)
    states = torch.randn(5, 64)
    expected = ours(states)
    save_file(ours.state_dict(), tmp_path / "moe.safetensors")
    for state in (ours.state_dict(), load_file(tmp_path / "moe.safetensors")):
        loaded = moe()
        loaded.load_state_dict(state)  # its weights become quantised
        assert torch.equal(loaded(states), expected)
        with torch.device("meta"):
            loaded = Gemma4MoE(CONFIG)
        loaded.load_state_dict(state, assign=True)
        assert torch.equal(loaded(states), expected)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(states), expected)
        assert twin.experts.down_proj.codes.data_ptr() != ours.experts.down_proj.codes.data_ptr()
    cast = copy.deepcopy(ours).half()
    assert cast.router.scale.dtype == torch.float16
    assert cast(states.half()).dtype == torch.float16
    assert torch.equal(cast.experts.down_proj.dequantize(), ours.experts.down_proj.dequantize())


def test_states_that_do_not_fit():
    quantised, plain = moe(), moe()
    quantised.experts.quantize_("int4")
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.gate_up_proj\.codes"):
        quantised.load_state_dict(plain.state_dict())
    larger = Gemma4MoE(Gemma4MoEConfig(64, 64, 6, 2, "gelu_pytorch_tanh"))
    with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj"):
        larger.load_state_dict(quantised.state_dict())
    assert isinstance(larger.experts.gate_up_proj, torch.nn.Parameter)
    state = {**quantised.state_dict(), "experts.down_proj._extra_state": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=r"experts\.down_proj\._extra_state must name a format and a shape"):
        plain.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key experts\.gate_up_proj"):
        quantised.load_decoder_layer(plain.state_dict())


def test_what_looks_at_parameters():
    ours = moe()
    ours.experts.quantize_("int4")
    (forward, *_) = explain(ours, 4)
    assert (forward.backend, forward.weight_format) == ("reference", "int4_g32,int4_g32")
    assert "int4_g32,int4_g32 weights" in str(forward)
    warmup(ours, (1, 3), training=True)
    ours.experts.down_proj = torch.nn.Parameter(torch.randn(6, 64, 32))
    assert explain(ours, 4)[0].weight_format == "int4_g32,plain"
    warmup(ours)


def test_both_kinds_of_layers_are_warmed_up(monkeypatch):
    calls = []
    forward = Gemma4Experts.forward
    monkeypatch.setattr(Gemma4Experts, "forward", lambda self, *args: calls.append(self) or forward(self, *args))
    layers = torch.nn.ModuleList([Gemma4Experts(CONFIG) for _ in range(3)])
    for layer, format in zip(layers, ("int4", "int8", "int8"), strict=True):
        randomize(layer).quantize_(format)
    warmup(layers, (1,))
    assert calls == [*layers[:2]]


def test_gradients_reach_the_router():
    ours = moe()
    ours.experts.quantize_("fp8")
    states = torch.randn(5, 64, requires_grad=True)
    ours(states).square().sum().backward()
    assert states.grad.any()
    assert ours.router.proj.weight.grad.any()


def test_compiled():
    ours = moe()
    ours.experts.quantize_("int4")
    states = torch.randn(5, 64)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(states), ours(states))
