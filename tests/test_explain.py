"""explain: who computes each layer, in which way, and why nobody faster does."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

import cupymoe
from cupymoe import Gemma4Experts, Gemma4MoE, Gemma4MoEConfig, MoEActivation, explain, fused_experts
from cupymoe.backends import ExpertsCall, registry, select
from tests.helpers import random_experts, transformers_config, transformers_gemma4, transposed

CONFIG = Gemma4MoEConfig.gemma4_26b_a4b()
SMALL = Gemma4MoEConfig(32, 24, 6, 2, "gelu_pytorch_tanh")


@pytest.fixture
def hopper(monkeypatch):
    """Backends answer for calls on a Hopper GPU; the modules are on the meta device."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    kept = ExpertsCall._replace

    for backend in registry().values():
        reason = type(backend).unsupported_reason

        def on_cuda(self, call, direction="forward", reason=reason):
            return reason(self, kept(call, device=torch.device("cuda", 0)), direction)

        monkeypatch.setattr(type(backend), "unsupported_reason", on_cuda)


def meta(config=CONFIG, dtype=torch.bfloat16, **settings):
    with torch.device("meta"):
        return Gemma4MoE(config, **settings).to(dtype)


def test_both_directions_of_every_number_of_tokens(hopper):
    found = explain(meta(), (1, 4096))
    assert [(each.path, each.tokens, each.direction) for each in found] == [
        ("experts", tokens, direction) for tokens in (1, 4096) for direction in ("forward", "backward")
    ]
    assert [each.backend for each in found] == ["fused"] * 4
    assert found[0].way == "weight stream, chunks of up to 8 tokens"
    assert found[2].way == "tiles of up to 384 rows, clusters of 1 in the gate_up projection"
    assert not found[0].reasons
    assert not found[1].reasons
    assert found[1].way == "tiles of up to 256 rows, clusters of 1 in the gate_up projection"


def test_why_not_a_faster_one(hopper):
    forward = explain(meta(dtype=torch.float32), 4)[0]
    assert (forward.backend, forward.way) == ("simt", "products on the CUDA cores")
    assert [*forward.reasons] == ["fused", "grouped"]
    text = str(forward)
    assert text.startswith(
        "experts, 4 tokens, forward: simt (products on the CUDA cores), plain weights; not fused: its"
    )
    assert "not grouped: torch's grouped GEMM runs without a host sync in bfloat16 only" in text


def test_a_named_backend(hopper):
    forward, backward = explain(meta(backend="grouped"), 4)
    assert (forward.backend, backward.backend) == ("grouped", "grouped")
    assert forward.reasons == {"fused": "backend='grouped' was asked for"}
    forward, backward = explain(meta(dtype=torch.float32, backend="fused"), 4)
    assert forward.backend is None
    assert "not computed; not fused: its tensor-core products" in str(forward)
    assert backward.backend == "simt"


def test_weights_off_16_bytes(hopper):
    moe = Gemma4MoE(SMALL).to(torch.bfloat16)
    flat = torch.zeros(moe.experts.down_proj.numel() + 1, dtype=torch.bfloat16)
    moe.experts.down_proj.data = flat[1:].view_as(moe.experts.down_proj)
    assert explain(moe, 4)[0].reasons["grouped"] == "both weights must start on 16 bytes"


def test_transposed_weights(hopper):
    moe = meta()
    moe.experts.down_proj.data = transposed(moe.experts.down_proj.data)
    forward, backward = explain(moe, 4)
    assert (forward.backend, backward.backend) == ("fused", "fused")
    assert forward.reasons == {}


def test_models_of_transformers():
    transformers_gemma4()
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("cupymoe.integrations.transformers")
    model = transformers.Gemma4ForCausalLM(
        transformers_config(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    )
    with pytest.raises(
        ValueError, match="target must hold a Gemma4Experts, a MoEExperts or experts set to cupymoe; Gemma4For"
    ):
        explain(model)
    model.set_experts_implementation("cupymoe")
    model.model.layers[1].experts.act_fn.register_forward_hook(lambda *_: None)
    first, _, refused, _ = explain(model, 7)
    assert (first.path, first.backend) == ("model.layers.0.experts", "reference")
    assert (refused.path, refused.backend) == ("model.layers.1.experts", None)
    assert "act_fn has hooks" in refused.reasons["cupymoe"]


def test_kinds_of_experts(hopper):
    """What a backend knows of GPT-OSS's: transposed weights, their sizes, and biases."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    pytest.importorskip("cupymoe.integrations.transformers")
    config = gpt_oss.GptOssConfig(num_local_experts=4, hidden_size=64, intermediate_size=32)
    config._experts_implementation = "cupymoe"
    with torch.device("meta"):
        experts = gpt_oss.GptOssExperts(config).to(torch.bfloat16)
    call = sys.modules["cupymoe.explain"]._call_of(experts, experts, 7, 4)[1]
    assert (call.num_experts, call.hidden_size, call.intermediate_size, call.num_tokens) == (4, 64, 32, 7)
    assert (call.gate_up_transposed, call.down_transposed, call.has_bias) == (True, True, True)
    assert call.activation is MoEActivation.SWIGLUOAI
    assert explain(experts, 7)[1].backend == "fused"


def test_choices_of_a_token_by_aria_s_name(hopper):
    """Its config calls moe_topk what others call num_experts_per_tok."""
    aria = pytest.importorskip("transformers.models.aria.modeling_aria")
    if not hasattr(aria, "AriaExperts"):
        pytest.skip("this transformers' Aria has no class of experts")
    pytest.importorskip("cupymoe.integrations.transformers")
    config = aria.AriaTextConfig(moe_num_experts=4, moe_topk=3, hidden_size=64, intermediate_size=32)
    config._experts_implementation = "cupymoe"
    with torch.device("meta"):
        experts = aria.AriaExperts(config).to(torch.bfloat16)
    assert [each.backend for each in explain(experts, 7)] == ["fused", "fused"]
    experts.config = SimpleNamespace(_experts_implementation="cupymoe")
    with pytest.raises(ValueError, match="must say how many experts a token goes to: its config has none of top_k_exp"):
        explain(experts, 7)


def test_adapters(hopper):
    peft = pytest.importorskip("peft")
    integration = pytest.importorskip("cupymoe.integrations.peft")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(
        Gemma4MoE(SMALL).to(torch.bfloat16), peft.LoraConfig(target_modules=[], target_parameters=targets, r=100)
    )
    assert explain(model, 4)[0].way.startswith("weight stream")  # PEFT merges
    integration.use_low_rank(model)
    assert [(each.backend, each.way[:5]) for each in explain(model, 4)] == [("fused", "weigh"), ("fused", "tiles")]
    model.add_adapter("second", peft.LoraConfig(target_modules=[], target_parameters=targets, r=40))
    model.base_model.set_adapter(["default", "second"])
    for each in explain(model, 4):
        assert each.backend == "grouped"
        assert "its kernels take adapters of ranks up to 128, not 140" in each.reasons["fused"]
    experts = model.get_base_model().experts.get_base_layer()
    with model.disable_adapter():
        assert explain(model, 4)[0].backend == "fused"
    handle = experts.register_forward_hook(lambda *_: None)
    assert explain(model, 4)[0].backend == "fused"  # PEFT merges where there are hooks
    handle.remove()
    experts.backend = "fused"
    assert explain(model, 4)[0].backend == "fused"  # and where a backend was asked for


@pytest.mark.parametrize("tokens", [0, [], [1, -1], [True], "1", [1.0]])
def test_numbers_of_tokens_are_checked(tokens):
    with pytest.raises(ValueError, match="tokens must be positive integers, got "):
        explain(meta(), tokens)


def test_other_targets_are_refused():
    with pytest.raises(TypeError, match=r"target must be a torch.nn.Module, got Gemma4MoEConfig"):
        explain(CONFIG)
    with pytest.raises(ValueError, match="Linear holds none"):
        explain(torch.nn.Linear(2, 2))
    assert isinstance(explain(Gemma4Experts(SMALL), 1)[0], cupymoe.Explanation)


def test_the_logger_says_it_of_each_kind_of_call_once(caplog):
    select.cache_clear()
    case = random_experts(3)
    with caplog.at_level(logging.INFO, logger="cupymoe"):
        for _ in range(2):
            fused_experts(*case, activation="gelu_tanh")
    assert [record.getMessage() for record in caplog.records] == [
        "forward of 3 tokens over 6 experts [32, 24] in torch.float32 on cpu: reference (plain torch, one expert after "
        "the other)"
    ]
