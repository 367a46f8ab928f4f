"""Routers and experts whose weights are elsewhere: warmup calls them where accelerate's hooks load the weights, and
refuses them by name where nothing does."""

import sys

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import cupymoe.integrations.transformers  # registers "cupymoe"
from cupymoe import Gemma4MoE, warmup
from cupymoe.kernels import jit
from tests.helpers import randomize, transformers_config, transformers_gemma4
from tests.test_warmup import CONFIG


def gemma_4_model(implementation="cupymoe", **sizes):
    """Two layers, whose routers are ours too."""
    transformers_gemma4()
    import transformers

    config = transformers_config(
        implementation, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], **sizes
    )
    model = randomize(transformers.Gemma4ForCausalLM(config)).eval()
    cupymoe.integrations.transformers.replace_routers(model)
    return model


def offload(model, way, folder, device="cpu"):
    """By accelerate, so that the weights of the layers are on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    device = torch.device(device)
    if way == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=device)
    elif way == "disk_offload":
        accelerate.disk_offload(model, folder, execution_device=device)
    elif way == "dispatch_model":
        places = {"model.embed_tokens": device, "model.layers.0": "disk", "model.layers.1": "cpu"}
        places |= {"model.norm": device, "model.rotary_emb": device, "lm_head": device}
        accelerate.dispatch_model(model, places, main_device=device, offload_dir=folder, force_hooks=True)
    elif way == "whole layers":
        accelerate.cpu_offload(model, execution_device=device, preload_module_classes=["Gemma4TextDecoderLayer"])
    else:
        accelerate.cpu_offload(model, execution_device=device)
        for layer in model.model.layers:
            for part in (layer.router, layer.experts):
                for _ in range(2):  # a SequentialHook in a SequentialHook
                    accelerate.hooks.add_hook_to_module(part, accelerate.hooks.ModelHook(), append=True)
    assert any(parameter.is_meta for parameter in model.parameters())
    return model


WAYS = ("cpu_offload", "disk_offload", "dispatch_model", "whole layers", "several hooks")


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights_are_loaded_for_the_calls(tmp_path, monkeypatch, way):
    model, ids = gemma_4_model(), torch.randint(1, 64, (1, 5))
    with torch.no_grad():
        expected = model(ids).logits
    offload(model, way, tmp_path)
    state = [(name, p.is_meta, p.requires_grad) for name, p in model.named_parameters()]
    called = []
    for name in ("fused_experts", "route"):
        for user in ("cupymoe.modules", "cupymoe.integrations.transformers"):
            kept = getattr(sys.modules[user], name, None)

            def spy(*arguments, kept=kept, name=name, **settings):
                tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
                called.append((name, len(arguments[0]), {str(each.device) for each in tensors}))
                return kept(*arguments, **settings)

            monkeypatch.setattr(sys.modules[user], name, spy, raising=kept is not None)
    warmup(model, (1, 3))
    assert sorted(called, key=str) == [
        (name, count, {"cpu"}) for name in ("fused_experts", "route") for count in (1, 3)
    ]
    assert [(name, p.is_meta, p.requires_grad) for name, p in model.named_parameters()] == state
    assert not any(parameter.is_inference() for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_of_a_kind_the_one_that_is_there_is_called():
    accelerate = pytest.importorskip("accelerate")
    layers = torch.nn.ModuleList([randomize(Gemma4MoE(CONFIG)) for _ in range(2)])
    accelerate.cpu_offload(layers[0], execution_device=torch.device("cpu"))
    accelerate.hooks.attach_execution_device_hook(layers[1], torch.device("cpu"))
    called = []
    for layer in layers:
        layer.experts.register_forward_hook(lambda module, inputs, output: called.append(module))
    warmup(layers, (1,))
    assert called == [layers[1].experts]


@pytest.mark.parametrize("implementation", ["cupymoe", "ours"])
def test_weights_that_nothing_loads(implementation):
    with torch.device("meta"):
        target = Gemma4MoE(CONFIG) if implementation == "ours" else gemma_4_model(implementation)
    path = "router.scale" if implementation == "ours" else "model.layers.0.router.scale"
    with pytest.raises(ValueError, match=rf"^{path} must not be on the meta device unless a hook of accelerate loads"):
        warmup(target, (1,))


def test_weights_that_are_lost_under_a_hook_that_loads_others():
    accelerate = pytest.importorskip("accelerate")
    moe = torch.nn.Sequential(randomize(Gemma4MoE(CONFIG)))
    accelerate.hooks.add_hook_to_module(moe, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    accelerate.cpu_offload(moe[0].router, execution_device=torch.device("cpu"))
    moe[0].experts.to("meta")
    with pytest.raises(ValueError, match=r"^0.experts.gate_up_proj must not be on the meta device"):
        warmup(moe, (1,))


def test_a_projection_that_nothing_loads():
    moe = Gemma4MoE(CONFIG)
    moe.router.proj.to("meta")
    with pytest.raises(ValueError, match=r"^router.proj.weight must not be on the meta device"):
        warmup(moe, (1,))


def test_shards(mesh):
    layers = torch.nn.Sequential(*(fully_shard(randomize(Gemma4MoE(CONFIG)), mesh=mesh) for _ in range(2)))
    with pytest.raises(
        ValueError, match=r"^0.router.scale must not be a DTensor, .*: call warmup before the module is"
    ):
        warmup(fully_shard(layers, mesh=mesh), (1,))
    with torch.no_grad():
        assert layers(torch.randn(3, 64)).shape == (3, 64)  # it can still be the first that is called
    called = []
    for layer in layers:
        layer.experts.register_forward_hook(lambda module, inputs, output: called.append(type(inputs[0])))
        layer.unshard()
    warmup(layers, (1,))
    assert called == [torch.Tensor]


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_compiled_after_it_for_offloaded_weights(tmp_path, way):
    model = gemma_4_model(moe_intermediate_size=200 + 8 * WAYS.index(way)).bfloat16()  # which no other test compiles
    offload(model, way, tmp_path, "cuda:0")
    ids, compiled = torch.randint(1, 64, (1, 5)), jit.compiled_variants()
    warmup(model, (5,))
    assert jit.compiled_variants() > compiled
    compiled = jit.compiled_variants()
    with torch.no_grad():
        model(ids.cuda())
    assert jit.compiled_variants() == compiled


def test_parameters_that_are_empty_between_calls():
    """As ZeRO-3 leaves them."""
    moe = randomize(Gemma4MoE(CONFIG))
    moe.experts.down_proj.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"^experts.down_proj must not be empty, .*: call warmup before the module is"):
        warmup(moe, (1,))
