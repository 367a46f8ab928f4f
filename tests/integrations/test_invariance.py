"""experts_implementation="cupymoe_invariant": a trainer's batch and a sampler's single tokens have the same bits.

A sampler is a callable of the layer: ``sampler(experts)`` takes one of the trained model's experts modules and gives a
callable of ``hidden_states``, ``top_k_index`` and ``top_k_weights``. Another stack's layer joins with its own.
"""

import pytest
import torch

import cupymoe
from cupymoe import Gemma4MoE, MoEExperts, fused_experts
from cupymoe.backends import select
from cupymoe.ops import experts as experts_ops
from tests.helpers import randomize, slow_on_cuda, transformers_config, transformers_gemma4
from tests.invariance import assert_same_bits, computed_alone

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")

IMPLEMENTATION = "cupymoe_invariant"
SIZES = {
    "cpu": {},
    "cuda": {"hidden_size": 256, "moe_intermediate_size": 176, "num_experts": 16, "top_k_experts": 4},
}
BATCH = {"cpu": (4, 12), "cuda": (8, 512)}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


def new_model(device, implementation=IMPLEMENTATION):
    """Two layers, in the dtype that the device is fast in."""
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers_config(implementation, **layers, **SIZES[device.type])
    return randomize(transformers.Gemma4ForCausalLM(config)).to(device, DTYPES[device.type])


def experts_of(model):
    return [layer.experts for layer in model.model.layers]


def trained(model, device):
    """Of each layer's experts in a step of training: what they were given, and what they gave."""
    found = []

    def keep(module, inputs, output):
        found.append(([each.detach() for each in inputs], output.detach()))

    hooks = [experts.register_forward_hook(keep) for experts in experts_of(model)]
    ids = torch.randint(2, 64, BATCH[device.type], device=device)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for hook in hooks:
        hook.remove()
    return found


def as_it_is(experts):
    return experts


def our_module(experts):
    """A module of ours with the same parameters."""
    num_experts, hidden_size, intermediate_size = experts.down_proj.shape
    ours = MoEExperts(num_experts, hidden_size, intermediate_size, "gelu_tanh", numerics="invariant", device="meta")
    ours.gate_up_proj, ours.down_proj = experts.gate_up_proj, experts.down_proj
    return ours


def into_given_memory(experts):
    """The function as an engine calls it: int32 indices, the output's memory its own."""

    def layer(hidden_states, index, weights):
        out = torch.empty_like(hidden_states)
        settings = {"activation": "gelu_tanh", "numerics": "invariant", "out": out}
        return fused_experts(hidden_states, experts.gate_up_proj, experts.down_proj, index.int(), weights, **settings)

    return layer


SAMPLERS = {"transformers": as_it_is, "MoEExperts": our_module, "into given memory": into_given_memory}


@slow_on_cuda
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_sampler_gives_the_trainer_s_bits(device, sampler):
    """One token at a time, and a few."""
    model = new_model(device)
    for experts, (given, expected) in zip(experts_of(model), trained(model, device), strict=True):
        layer = sampler(experts)
        with torch.no_grad():
            assert_same_bits(computed_alone(layer, given), expected, "one by one")
            assert_same_bits(computed_alone(layer, given, few=7), expected, "seven at a time")


@slow_on_cuda
def test_a_whole_mixture_from_given_residuals_on(device):
    """The router too: transformers' own in training, taken over, and our module's, a token at a time."""
    model = new_model(device)
    integration.replace_routers(model)
    layer, found = model.model.layers[0], []
    layer.router.register_forward_hook(lambda module, inputs, output: found.append((inputs[0], *output[1:])))
    trained(model, device)
    residual, *routed = (each.detach() for each in found[0])
    layer.router._forward_hooks.clear()
    moe = Gemma4MoE.from_transformers(layer, numerics="invariant")
    with torch.no_grad():
        for part, *choices in zip(residual.split(1), *(each.split(1) for each in routed), strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(moe.router.route(part), choices, strict=True))


def test_training_goes_by_it(device, monkeypatch):
    """Forwards are asked for with invariant numerics, and under another implementation not."""
    asked = []

    def spy(name, call, direction="forward"):
        asked.append(call.numerics)
        return select(name, call, direction)

    monkeypatch.setattr(experts_ops, "select", spy)
    model = new_model(device)
    trained(model, device)
    assert {*asked} == {"invariant"}
    asked.clear()
    model.set_experts_implementation("cupymoe")
    trained(model, device)
    assert {*asked} == {"fast"}


def test_routers_follow_the_implementation():
    model = new_model(torch.device("cpu"))
    integration.replace_routers(model)
    assert {layer.router.numerics for layer in model.model.layers} == {"invariant"}
    for implementation in ("cupymoe", "eager"):
        model.set_experts_implementation(implementation)
        assert {layer.router.numerics for layer in model.model.layers} == {"fast"}


def test_what_else_looks_for_our_experts_finds_these():
    model = new_model(torch.device("cpu"))
    assert cupymoe.set_keep(model, "input") == 2
    assert {each.backend for each in cupymoe.explain(model, 3)} == {"reference"}
    cupymoe.warmup(model, (3,))


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
def test_adapters_that_are_not_merged(device):
    peft = pytest.importorskip("peft", minversion="0.21")
    from cupymoe.integrations.peft import use_low_rank

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(new_model(device), peft.LoraConfig(r=4, target_modules=[], target_parameters=targets))
    randomize(torch.nn.ModuleList(module for name, module in model.named_modules() if name.endswith("lora_B.default")))
    assert use_low_rank(model) == 4
    inner = model.get_base_model()
    for experts, (given, expected) in zip(experts_of(inner), trained(inner, device), strict=True):
        with torch.no_grad():
            assert_same_bits(computed_alone(experts, given), expected, "one by one")
