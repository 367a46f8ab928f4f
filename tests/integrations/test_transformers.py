"""cupymoe inside transformers' models: the same logits as eager, on one line, and a reason where it can't."""

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch

import cupymoe
from cupymoe import MoEActivation, moe_activation
from tests.helpers import randomize, transformers_config, transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.0")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")
served = pytest.importorskip("cupymoe.integrations.served")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


def gemma4(**changes):
    changes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], **changes}
    return transformers.Gemma4ForCausalLM(transformers_config(**changes))


def qwen3_moe():
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
    )
    return transformers.Qwen3MoeForCausalLM(config)


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    )


def lfm2_moe():
    """Its experts' activation is a function."""
    config = transformers.Lfm2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        num_dense_layers=0,
        layer_types=["conv", "full_attention"],
    )
    return transformers.Lfm2MoeForCausalLM(config)


def gpt_oss(**changes):
    """Biases, transposed weights, gate and up interleaved and clamped."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, **sizes, **changes))


def nemotron_h():
    """Ungated, and in a space of their own; layers of experts around one of attention."""
    sizes = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "moe_latent_size": 16}
    more = {"moe_shared_expert_intermediate_size": 24, "hybrid_override_pattern": "E*E", "tie_word_embeddings": False}
    without_layers = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
    return transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**without_layers, **sizes, **more))


MODELS = {
    "gemma4": gemma4,
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "lfm2_moe": lfm2_moe,
    "gpt_oss": gpt_oss,
    "nemotron_h": nemotron_h,
}
ACTIVATIONS = {
    "gemma4_text": MoEActivation.GELU_TANH,
    "gpt_oss": MoEActivation.SWIGLUOAI,
    "nemotron_h": MoEActivation.RELU2_NO_MUL,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return randomize(MODELS[request.param]()).eval()


def logits(model, implementation, tokens):
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        return model(tokens).logits


def tokens(*shape):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(1))


def test_logits_are_eager_s(model):
    ids = tokens(2, 7)
    expected = logits(model, "eager", ids)
    assert torch.allclose(logits(model, "cupymoe", ids), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert model.config._experts_implementation == "cupymoe"


def test_the_experts_are_ours(model, monkeypatch):
    """Else the test above would compare eager with itself."""
    calls = []
    kept = integration.fused_experts
    monkeypatch.setattr(integration, "fused_experts", lambda *a, **k: calls.append(k["activation"]) or kept(*a, **k))
    logits(model, "cupymoe", tokens(1, 3))
    assert calls == [ACTIVATIONS.get(model.config.model_type, MoEActivation.SILU)] * 2


def test_from_pretrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="cupymoe").eval()
    ids = tokens(1, 5)
    assert loaded.config._experts_implementation == "cupymoe"
    assert torch.allclose(logits(loaded, "cupymoe", ids), logits(model, "cupymoe", ids), rtol=1e-5, atol=1e-5)


def test_generate(model):
    ids = tokens(1, 4)
    model.set_experts_implementation("cupymoe")
    ours = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.set_experts_implementation("eager")
    assert torch.equal(ours, model.generate(ids, max_new_tokens=6, do_sample=False))


def test_gradients_are_eager_s(model):
    ids = tokens(1, 6)
    gradients = {}
    for implementation in ("eager", "cupymoe"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients[implementation] = {name: p.grad.clone() for name, p in model.named_parameters() if "experts" in name}
    assert gradients["eager"]
    for name, expected in gradients["eager"].items():
        ours = gradients["cupymoe"][name]
        assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()), name


@pytest.mark.parametrize(
    "name",
    [
        "gelu",
        "gelu_python",
        "gelu_new",
        "gelu_fast",
        "gelu_accurate",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "silu",
        "swish",  # torch's own module
        "relu2",
    ],
)
def test_an_activation_is_the_member_that_computes_it(name):
    """Erf and tanh differ by 4.7e-4, and so hardly show in the logits."""
    activation = transformers.activations.ACT2FN[name]
    member = served.act_fn_of(SimpleNamespace(act_fn=activation))
    assert member is MoEActivation.from_str(name)
    input = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    torch.testing.assert_close(moe_activation(member.without_mul(), input), activation(input), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_hidden_activation_of_the_config_is_what_runs(name):
    experts = randomize(gemma4(hidden_activation=name).model.layers[0].experts)
    arguments = torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    expected = experts(*arguments)  # eager
    torch.testing.assert_close(integration.experts_forward(experts, *arguments), expected, rtol=1e-5, atol=1e-5)


def test_foreign_experts_contribute_nothing():
    """transformers marks the pairs of other ranks with index num_experts."""
    experts = randomize(gemma4().model.layers[0].experts)
    states, index = torch.randn(5, 32), torch.tensor([[0, 6]] * 4 + [[6, 6]])
    weights = torch.rand(5, 2)
    output = integration.experts_forward(experts, states, index, weights)
    alone = integration.experts_forward(experts, states, index[:, :1], weights[:, :1])
    assert torch.equal(output, alone)
    assert not output[4].any()


def test_a_bias_of_another_dtype_is_named():
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(num_local_experts=4, hidden_size=32, intermediate_size=16)
    config._experts_implementation = "cupymoe"
    experts = gpt_oss.GptOssExperts(config)
    experts.down_proj_bias.data = experts.down_proj_bias.data.bfloat16()
    match = "does not serve GptOssExperts: its down_proj_bias is torch.bfloat16, but its gate_up_proj torch.float32"
    with pytest.raises(ValueError, match=match):
        experts(torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2))


def test_autocast_hidden_states_meet_bfloat16_weights():
    experts = randomize(gemma4().model.layers[0].experts).to(torch.bfloat16)
    output = integration.experts_forward(experts, torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))
    assert output.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_gate": False}, "it has no up_proj"),
        ({"has_bias": True}, "it has no gate_up_proj_bias"),
        ({"has_post_expert_norm": True}, "its experts' outputs are normalised"),
        ({"is_transposed": True}, "down_proj must have shape"),
        ({"is_concatenated": False}, "its is_concatenated is False, but its _apply_gate computes gelu_tanh"),
        ({"act_fn": torch.nn.Mish()}, "cupymoe has no activation like Mish of Gemma4TextExperts"),
        (
            {"act_fn": torch.nn.functional.mish},
            "cupymoe has no activation like mish of Gemma4TextExperts; it has .*silu",
        ),
        (
            {"act_fn": functools.partial(torch.nn.functional.gelu, approximate="tanh")},
            r"cupymoe has no activation like functools.partial\(.*approximate='tanh'\) of Gemma4TextExperts",
        ),
        ({"_apply_gate": lambda gate_up: gate_up.chunk(2, -1)[0]}, "its _apply_gate was set on this module"),
    ],
)
def test_what_it_can_t_serve_is_named(change, reason):
    experts = randomize(gemma4().model.layers[0].experts)
    for name, value in change.items():
        experts._modules.pop(name, None)
        setattr(experts, name, value)
    with pytest.raises(ValueError, match=reason):
        integration.experts_forward(experts, torch.randn(2, 32), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


def test_a_property_that_a_newer_transformers_has_is_served_at_its_default():
    def decorator(experts_class=None, *, has_gate=True, has_bias=False, has_tails=False, is_flat=True):
        pass

    properties = served._properties(decorator)
    assert properties["has_tails"] == (False, "its has_tails is True, of which cupymoe knows nothing")
    assert properties["is_flat"] == (True, "its is_flat is False, of which cupymoe knows nothing")
    assert "has_gate" not in properties


def test_a_property_that_cupymoe_does_not_know_is_named(monkeypatch):
    experts = randomize(gemma4().model.layers[0].experts)
    monkeypatch.setitem(served._ALL_PROPERTIES, "has_tails", (False, "its has_tails is True"))
    assert integration.served(experts).activation is MoEActivation.GELU_TANH
    experts.has_tails = True
    with pytest.raises(ValueError, match="does not serve Gemma4TextExperts: its has_tails is True"):
        integration.served(experts)


@pytest.mark.parametrize(
    ("function", "member"),
    [(torch.nn.functional.silu, MoEActivation.SILU), (torch.nn.functional.gelu, MoEActivation.GELU)],
)
def test_an_activation_that_is_a_function(function, member):
    experts = randomize(gemma4().model.layers[0].experts)
    del experts.act_fn  # a module
    experts.act_fn = function
    assert integration.activation_of(experts) is member
    arguments = torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    expected = experts(*arguments)  # eager
    torch.testing.assert_close(integration.experts_forward(experts, *arguments), expected, rtol=1e-5, atol=1e-5)


def test_replaced_routers_share_parameters_and_choose_alike():
    model = randomize(gemma4()).eval()
    ids = tokens(2, 7)
    expected = logits(model, "cupymoe", ids)
    before = dict(model.named_parameters())
    assert integration.replace_routers(model) == 2
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.allclose(logits(model, "cupymoe", ids), expected, rtol=1e-5, atol=1e-5)


def test_a_router_s_hooks_outlive_its_replacement():
    model, seen = randomize(gemma4()).eval(), []
    model.model.layers[1].router.register_forward_hook(lambda router, *_: seen.append(router))
    assert integration.replace_routers(model) == 2
    model(tokens(1, 3))
    assert seen == [model.model.layers[1].router]


@pytest.mark.parametrize("called_before", [False, True])
def test_router_logits_are_recorded_after_the_replacement(called_before):
    model, ids = randomize(gemma4()).eval(), tokens(1, 5)
    untouched = copy.deepcopy(model)
    expected = untouched(ids, output_router_logits=True)
    if not hasattr(expected, "router_logits"):
        pytest.skip("this transformers records none")
    if called_before:
        model(ids, output_router_logits=True)
    integration.replace_routers(model)
    ours = model(ids, output_router_logits=True).router_logits
    assert len(ours) == 2
    for our, their in zip(ours, expected.router_logits, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_replaced_routers_are_replaced_once_and_can_be_copied_and_pickled():
    model, ids = randomize(gemma4()).eval(), tokens(1, 5)
    assert [integration.replace_routers(model) for _ in range(2)] == [2, 2]
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other.model.layers[0].router, cupymoe.Gemma4Router)
        assert torch.equal(other(ids).logits, expected)


def test_a_router_under_accelerate_s_hook_computes_as_ours(monkeypatch):
    """Its hook replaces the router's forward, and calls the one that it kept."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = randomize(gemma4()).eval(), tokens(1, 5)
    expected = model(ids).logits
    router = model.model.layers[0].router
    hooks.add_hook_to_module(router, hooks.ModelHook())
    integration.replace_routers(model)
    calls, route = [], router._route
    monkeypatch.setattr(router, "_route", lambda logits: calls.append(1) or route(logits))
    assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert calls == [1]


def test_a_router_whose_forward_was_replaced_is_refused_before_any_changes():
    model = gemma4()
    model.model.layers[1].router.forward = lambda hidden_states: None
    with pytest.raises(ValueError, match="router must have no forward of its own, which would be called instead"):
        integration.replace_routers(model)
    assert not any(isinstance(module, cupymoe.Gemma4Router) for module in model.modules())


def test_a_router_whose_config_is_none_of_a_mixture_is_refused_before_any_changes():
    model = gemma4()
    router = model.model.layers[1].router
    router.config = copy.copy(router.config)
    router.config.top_k_experts = 7
    with pytest.raises(ValueError, match="top_k_experts must be at most num_experts=6, got 7"):
        integration.replace_routers(model)
    assert not any(isinstance(module, cupymoe.Gemma4Router) for module in model.modules())


def test_hooks_that_transformers_left_are_no_obstacle():
    """A call that asks for hidden states installs them on the routers, too."""
    model = randomize(gemma4()).eval()
    expected = model(tokens(1, 5), output_hidden_states=True).hidden_states
    assert model.model.layers[0].router._forward_hooks
    assert integration.replace_routers(model) == 2
    for ours, theirs in zip(model(tokens(1, 5), output_hidden_states=True).hidden_states, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_router_to_replace():
    with pytest.raises(ValueError, match="has no Gemma4TextRouter to replace"):
        integration.replace_routers(torch.nn.Linear(2, 2))
