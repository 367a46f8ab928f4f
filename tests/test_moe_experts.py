"""MoEExperts: the experts of any model, against transformers' classes and against float64."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize

from cupymoe import Gemma4Experts, Gemma4MoEConfig, MoEActivation, MoEExperts, explain, warmup
from tests.helpers import (
    oracle,
    random_biases,
    random_experts,
    randomize,
    relative_error,
    rounded_experts,
    transformers_gemma4,
)

E, H, I, K = 6, 32, 24, 2  # noqa: E741
ACTIVATIONS = (MoEActivation.SILU, MoEActivation.SWIGLUOAI.with_parameters(limit=3.0), MoEActivation.RELU2_NO_MUL)
EVERY_KIND = [
    pytest.param((activation, bias, transposed), id=f"{activation.value}, bias={bias}, transposed={transposed}")
    for activation in ACTIVATIONS
    for bias in (False, True)
    for transposed in (False, True)
]
GPT_OSS = ("swigluoai", True, True)


def make(kind, dtype=torch.float32, device="cpu", **settings):
    activation, bias, transposed = kind
    return MoEExperts(E, H, I, activation, bias=bias, transposed=transposed, dtype=dtype, device=device, **settings)


def filled(kind, num_tokens=16, **settings):
    """Experts of that kind, and the arguments of fused_experts whose values they have."""
    activation, bias, transposed = kind
    experts = make(kind, **settings)
    place = {"dtype": experts.down_proj.dtype, "device": experts.down_proj.device}
    case = random_experts(num_tokens, E, H, I, K, activation=activation, **place)
    biases = random_biases(case, (bias, bias))
    values = [weight.transpose(1, 2) if transposed else weight for weight in case[1:3]]
    values += [value for value in biases.values() if value is not None]
    first = "gate_up_proj" if activation.is_gated else "up_proj"
    names = (first, "down_proj", f"{first}_bias", "down_proj_bias")[: len(values)]
    with torch.no_grad():
        for name, value in zip(names, values, strict=True):
            experts.get_parameter(name).copy_(value)
    return experts, case, biases


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_is_float64_s(kind):
    experts, case, biases = filled(kind, dtype=torch.float64)
    output = experts(case.hidden_states, case.top_k_index, case.top_k_weights)
    torch.testing.assert_close(output, oracle(case, kind[0], **biases), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_every_kind_in_bfloat16(kind, device):
    experts, case, biases = filled(kind, num_tokens=9, dtype=torch.bfloat16, device=device)
    output = experts(case.hidden_states, case.top_k_index, case.top_k_weights)
    assert output.dtype == torch.bfloat16
    truth = oracle(case, kind[0], **{name: bias if bias is None else bias.double() for name, bias in biases.items()})
    assert relative_error(output, truth) <= relative_error(rounded_experts(case, kind[0], **biases), truth)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_gradients_of_every_parameter(kind):
    experts, case, biases = filled(kind, dtype=torch.float64)
    leaves = [case.hidden_states, case.gate_up_proj, case.down_proj, *(b for b in biases.values() if b is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(16, H, dtype=torch.float64)
    wanted = torch.autograd.grad(oracle(case, kind[0], **biases), leaves, grad)
    experts(case.hidden_states, case.top_k_index, case.top_k_weights).backward(grad)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter.grad)
    found = [case.hidden_states.grad, *(each for each in experts.projections() if each is not None)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (("silu", False, False), {"gate_up_proj": (E, 2 * I, H), "down_proj": (E, H, I)}),
        (("relu2_no_mul", False, False), {"up_proj": (E, I, H), "down_proj": (E, H, I)}),
        (
            GPT_OSS,
            {
                "gate_up_proj": (E, H, 2 * I),
                "gate_up_proj_bias": (E, 2 * I),
                "down_proj": (E, I, H),
                "down_proj_bias": (E, H),
            },
        ),
        (
            ("relu2_no_mul", True, False),
            {"up_proj": (E, I, H), "up_proj_bias": (E, I), "down_proj": (E, H, I), "down_proj_bias": (E, H)},
        ),
    ],
)
def test_parameters(kind, shapes):
    assert {name: tuple(parameter.shape) for name, parameter in make(kind).named_parameters()} == shapes


def transformers_experts(model):
    """Experts of transformers with random parameters, and ours of the same kind."""
    transformers_gemma4()
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": H, "intermediate_size": I, "moe_intermediate_size": I}
    if model == "mixtral":
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts as Experts

        config, kind = transformers.MixtralConfig(num_local_experts=E, **sizes), ("silu", False, False)
    elif model == "qwen3_moe":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config, kind = transformers.Qwen3MoeConfig(num_experts=E, **sizes), ("silu", False, False)
    elif model == "gpt_oss":
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config, kind = transformers.GptOssConfig(num_local_experts=E, **sizes), GPT_OSS
    else:
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts

        config, kind = transformers.NemotronHConfig(n_routed_experts=E, **sizes), ("relu2_no_mul", False, False)
    config._experts_implementation = "eager"
    return randomize(Experts(config)), make(kind)


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h"])
def test_the_state_dict_and_calls_of_transformers(model):
    theirs, ours = transformers_experts(model)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    case = random_experts(9, E, H, I, K)
    arguments = case.hidden_states, case.top_k_index, case.top_k_weights
    torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_projections_are_the_parameters_memory():
    experts = make(GPT_OSS)
    gate_up_proj, down_proj, gate_up_bias, down_bias = experts.projections()
    assert (gate_up_proj.shape, down_proj.shape) == ((E, 2 * I, H), (E, H, I))
    assert gate_up_proj.data_ptr() == experts.gate_up_proj.data_ptr()
    assert down_proj.data_ptr() == experts.down_proj.data_ptr()
    assert gate_up_bias is experts.gate_up_proj_bias
    assert down_bias is experts.down_proj_bias


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be a positive integer, got 0"),
        ({"hidden_size": 32.0}, ValueError, r"hidden_size must be a positive integer, got 32\.0"),
        ({"intermediate_size": True}, ValueError, "intermediate_size must be a positive integer, got True"),
        ({"top_k": 0}, ValueError, "top_k must be a positive integer, got 0"),
        ({"top_k": 7}, ValueError, "top_k must be at most num_experts=6, got 7"),
        ({"activation": "quick_gelu"}, ValueError, "Unknown MoE activation: 'quick_gelu'"),
        ({"activation": None}, TypeError, "activation must be a MoEActivation or its name, got None"),
        ({"bias": torch.zeros(2)}, TypeError, r"bias must be True or False, got tensor\("),
        ({"transposed": 1}, TypeError, "transposed must be True or False, got 1"),
        ({"dtype": torch.int8}, ValueError, r"dtype must be one of \[torch.bfloat16, .*\] or None, got torch.int8"),
        ({"backend": "zzz"}, ValueError, r"backend must be one of \['auto', .*\], got 'zzz'"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, error, message):
    sizes = {"num_experts": E, "hidden_size": H, "intermediate_size": I, "activation": "silu"}
    with pytest.raises(error, match=message):
        MoEExperts(**{**sizes, **changes})


def test_settings_are_given_by_name():
    with pytest.raises(TypeError, match="positional"):
        MoEExperts(E, H, I, "silu", True)


def test_hidden_states_of_another_size_are_refused():
    experts, case, _ = filled((MoEActivation.SILU, False, False))
    with pytest.raises(ValueError, match=r"down_proj must have shape \[\*, 31, \*\]"):
        experts(case.hidden_states[:, 1:].contiguous(), case.top_k_index, case.top_k_weights)


def test_dtype_device_and_backend():
    experts = make(GPT_OSS, torch.float16, "meta", backend="grouped")
    assert {(parameter.dtype, parameter.device.type) for parameter in experts.parameters()} == {(torch.float16, "meta")}
    with pytest.raises(ValueError, match="backend 'grouped' does not serve this call"):
        randomize(make(GPT_OSS, backend="grouped"))(torch.ones(2, H), torch.zeros(2, 1).long(), torch.ones(2, 1))


def test_gemma_4_s_experts_are_a_subclass():
    experts = Gemma4Experts(Gemma4MoEConfig(H, I, E, K, "gelu_tanh_no_mul"))
    assert isinstance(experts, MoEExperts)
    assert experts.top_k == K
    assert {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()} == {
        "gate_up_proj": (E, I, H),
        "down_proj": (E, H, I),
    }


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_deepcopy_and_pickle(copied):
    kind = (ACTIVATIONS[1], True, True)
    experts, case, biases = filled(kind, dtype=torch.float64)
    twin = copied(experts)
    assert twin.activation is ACTIVATIONS[1]
    assert twin.gate_up_proj.data_ptr() != experts.gate_up_proj.data_ptr()
    output = twin(case.hidden_states, case.top_k_index, case.top_k_weights)
    torch.testing.assert_close(output, oracle(case, kind[0], **biases))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_what_users_put_around_it_is_honoured():
    """Parametrizations, hooks and parameters that are assigned anew."""
    experts, case, biases = filled((ACTIVATIONS[1], True, True), dtype=torch.float64)
    arguments = case.hidden_states, case.top_k_index, case.top_k_weights
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        parametrize.register_parametrization(experts, name, Halved())
    experts.down_proj_bias = nn.Parameter(biases["down_bias"] + 1)
    experts.register_forward_hook(lambda module, inputs, output: 3 * output)
    halved = case._replace(gate_up_proj=case.gate_up_proj / 2)
    biases = {"gate_up_bias": biases["gate_up_bias"] / 2, "down_bias": biases["down_bias"] + 1}
    torch.testing.assert_close(experts(*arguments), 3 * oracle(halved, ACTIVATIONS[1], **biases))


def test_fsdp_shards(mesh):
    experts, case, biases = filled((ACTIVATIONS[1], True, True))
    sharded = fully_shard(experts, mesh=mesh)
    output = sharded(case.hidden_states, case.top_k_index, case.top_k_weights)
    biases = {name: bias.double() for name, bias in biases.items()}
    assert relative_error(output, oracle(case, ACTIVATIONS[1], **biases)) < 1e-5
    output.sum().backward()
    assert all(parameter.grad.full_tensor().any() for parameter in sharded.parameters())


@pytest.mark.parametrize("kind", [(ACTIVATIONS[1], True, True), (MoEActivation.RELU2_NO_MUL, False, False)], ids=str)
def test_compiled_and_exported(kind):
    experts, case, _ = filled(kind)
    arguments = case.hidden_states, case.top_k_index, case.top_k_weights
    torch._dynamo.reset()
    with torch.no_grad():
        expected = experts(*arguments)
        assert torch.equal(torch.compile(experts, fullgraph=True, backend="aot_eager")(*arguments), expected)
        assert torch.equal(torch.export.export(experts, arguments).module()(*arguments), expected)


def test_warmup_calls_every_kind_once():
    layers = nn.ModuleList([make(kind.values[0], top_k=K) for kind in EVERY_KIND for _ in range(2)])
    called = []
    for layer in randomize(layers):
        layer.register_forward_hook(lambda module, inputs, output: called.append((module, inputs[1].shape)))
    warmup(layers, (3,))
    assert called == [(layer, (3, K)) for layer in layers[::2]]


def test_warmup_tells_layouts_of_equal_shapes_apart():
    layers = [MoEExperts(E, H, H, "relu2_no_mul", transposed=transposed, top_k=K) for transposed in (False, True)]
    called = []
    for layer in layers:
        randomize(layer).register_forward_hook(lambda module, inputs, output: called.append(module))
    warmup(nn.ModuleList(layers), (3,))
    assert called == layers


def test_explain_knows_the_kind():
    forward, backward = explain(nn.ModuleDict({"experts": make(GPT_OSS, top_k=K)}), 3)
    assert (forward.path, forward.tokens, forward.backend) == ("experts", 3, "reference")
    assert backward.backend == "reference"
    call = sys.modules["cupymoe.explain"]._call_of(make(GPT_OSS), None, 3, 5)[1]
    assert (call.num_experts, call.hidden_size, call.intermediate_size, call.top_k) == (E, H, I, 5)
    assert (call.gate_up_transposed, call.down_transposed, call.has_bias) == (True, True, True)


@pytest.mark.parametrize("asked", [explain, lambda model: warmup(model, (1,))], ids=["explain", "warmup"])
def test_who_makes_calls_needs_the_number_of_a_token_s_experts(asked):
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": make(GPT_OSS)})})
    with pytest.raises(ValueError, match=r"^mlp.experts \(MoEExperts\) must have a top_k, .*: give MoEExperts top_k="):
        asked(model)
