"""What users do to modules: hooked, patched, parametrized, wrapped, pruned, offloaded and sharded ones are honoured, or
refused by name when they are replaced."""

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from cupymoe import Gemma4Experts, Gemma4MoE, Gemma4MoEConfig, Gemma4Router, MoEActivation, fused_experts
from cupymoe.customisation import path_of
from tests.helpers import random_experts, randomize, transformers_config, transformers_gemma4

CONFIG = Gemma4MoEConfig(
    hidden_size=32, moe_intermediate_size=24, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)


def decoder_layer(**changes):
    return randomize(transformers_gemma4().Gemma4TextDecoderLayer(transformers_config(**changes), 0)).eval()


def moe_and_states():
    moe = randomize(Gemma4MoE(CONFIG)).eval()
    states = torch.randn(9, 32)
    return moe, states, moe(states)


class Halved(nn.Module):
    def forward(self, parameter):
        return parameter / 2


# --- Gemma4MoE calls its parts as modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["router", "router.proj", "experts"])
def test_hooks_of_every_part_are_called(part):
    moe, states, expected = moe_and_states()
    seen = []
    moe.get_submodule(part).register_forward_pre_hook(lambda *_: seen.append("pre"))
    moe.get_submodule(part).register_forward_hook(lambda *_: seen.append("post"))
    assert torch.equal(moe(states), expected)
    assert seen == ["pre", "post"]


def test_a_hook_may_change_what_the_router_chose():
    moe, states, _ = moe_and_states()
    moe.router.register_forward_hook(lambda module, args, output: (output[0], 2 * output[1], output[2]))
    _, weights, index = copy.deepcopy(moe.router)(states)
    assert torch.equal(moe(states), moe.experts(states, index, weights))


def test_a_hook_for_every_module_sees_the_router():
    moe, states, _ = moe_and_states()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    moe(states)
    handle.remove()
    assert moe.router in seen


def test_a_router_s_own_forward_is_called():
    moe, states, expected = moe_and_states()
    kept, calls = moe.router.forward, []
    moe.router.forward = lambda hidden_states: calls.append(1) or kept(hidden_states)
    assert torch.equal(moe(states), expected)
    assert calls == [1]


def test_a_router_s_class_may_have_another_forward(monkeypatch):
    moe, states, expected = moe_and_states()
    kept, calls = Gemma4Router.forward, []
    monkeypatch.setattr(Gemma4Router, "forward", lambda self, states: calls.append(1) or kept(self, states))
    assert torch.equal(moe(states), expected)
    assert calls == [1]


def test_linear_layers_may_have_another_forward(monkeypatch):
    moe, states, _ = moe_and_states()
    kept = nn.Linear.forward
    expected = 2 * moe.router.logits(states)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: 2 * kept(self, input))
    torch.testing.assert_close(moe.router.logits(states), expected)


def test_the_router_may_be_another_module_with_transformers_call():
    moe, states, expected = moe_and_states()

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states):
            return self.inner(hidden_states)

    moe.router = Wrapper(moe.router)
    assert torch.equal(moe(states), expected)


def test_parameters_that_are_there_only_while_their_module_runs():
    """As with ZeRO-3: hooks of each module gather its own parameters and let them go again."""
    moe, states, expected = moe_and_states()
    for module in moe.modules():
        own = dict(module.named_parameters(recurse=False))
        full = {name: parameter.data for name, parameter in own.items()}

        def gather(module, *_, own=own, full=full):
            for name, parameter in own.items():
                parameter.data = full[name]

        def release(module, *_, own=own):
            for parameter in own.values():
                parameter.data = torch.empty(0)

        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    assert moe.router.scale.numel() == 0
    assert torch.equal(moe(states), expected)
    assert moe.router.scale.numel() == 0


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    moe, states, expected = moe_and_states()
    accelerate.cpu_offload(moe, execution_device=torch.device("cpu"))
    assert moe.router.scale.is_meta
    assert moe.experts.down_proj.is_meta
    with torch.no_grad():
        assert torch.equal(moe(states), expected)


@contextlib.contextmanager
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("parts", [["router"], ["router.proj", "router", "experts", ""]])
def test_sharded_by_fsdp2(parts):
    moe, states, expected = moe_and_states()
    with one_process() as mesh:
        for part in parts:
            torch.distributed.fsdp.fully_shard(moe.get_submodule(part), mesh=mesh)
        torch.testing.assert_close(moe(states), expected)
        moe(states).sum().backward()
        assert moe.router.scale.grad is not None


def test_weights_are_loaded_where_a_hook_makes_copies_of_the_state_dict():
    moe, states, expected = moe_and_states()
    fresh = randomize(Gemma4MoE(CONFIG))

    def copies(module, state_dict, prefix, metadata):
        state_dict.update({key: tensor.clone() for key, tensor in state_dict.items()})

    fresh.register_state_dict_post_hook(copies)
    fresh.load_decoder_layer(moe.state_dict())
    assert torch.equal(fresh(states), expected)


# --- tensors that are no plain memory ---------------------------------------------------------------------------------


def test_a_quantised_projection_of_the_router_is_called():
    torchao = pytest.importorskip("torchao.quantization")
    moe, states, _ = moe_and_states()
    torchao.quantize_(moe.router, torchao.Int8WeightOnlyConfig())
    assert type(moe.router.proj.weight) is not nn.Parameter
    full = nn.Linear(32, 6, bias=False)
    full.weight = nn.Parameter(moe.router.proj.weight.dequantize())
    ours = moe.router.logits(states)
    moe.router.proj = full
    torch.testing.assert_close(ours, moe.router.logits(states), rtol=1e-5, atol=1e-5)


def test_weights_that_are_dtensors_are_refused_by_name():
    case = random_experts()
    with one_process() as mesh:
        sharded = torch.distributed.tensor.distribute_tensor(case.gate_up_proj, mesh)
        with pytest.raises(TypeError, match="gate_up_proj must be a plain tensor, got DTensor"):
            fused_experts(*case._replace(gate_up_proj=sharded), activation="gelu_tanh")
        # A call of the same sizes has passed the checks before, and the next is looked at all the same.
        fused_experts(*case, activation="gelu_tanh")
        with pytest.raises(TypeError, match="gate_up_proj must be a plain tensor, got DTensor"):
            fused_experts(*case._replace(gate_up_proj=sharded), activation="gelu_tanh")


# --- Gemma4MoE.from_transformers --------------------------------------------------------------------------------------


class RouterOfMine(transformers_gemma4().Gemma4TextRouter):
    def forward(self, hidden_states):
        return super().forward(2 * hidden_states)


class ExpertsOfMine(transformers_gemma4().Gemma4TextExperts):
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


def patch_forward(module):
    kept = module.forward
    module.forward = lambda *arguments: kept(*arguments)


def wrap_forward(module):
    kept = module.forward

    @functools.wraps(kept)
    def twice(*arguments):
        return kept(*arguments)

    module.forward = twice


def patch_norm(norm):
    kept = norm._norm
    norm._norm = lambda hidden_states: 2 * kept(hidden_states)


def replace_norm(norm):
    """By one that another library made, which has neither ``eps`` nor ``with_scale`` where ours looks."""
    norm.__class__ = nn.RMSNorm
    del norm.eps, norm.with_scale


def release(module):
    """As ZeRO-3 does between the calls of a module."""
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.empty(0)


def hook(module):
    module.register_forward_hook(lambda *_: None)


def shard(module):
    for name, parameter in [*module.named_parameters(recurse=False)]:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        setattr(module, name, nn.Parameter(torch.distributed.tensor.distribute_tensor(parameter, mesh)))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("router", patch_forward, "router must have no forward of its own, which would be lost, got patch_forward"),
        ("experts", patch_forward, "experts must have no forward of its own, which would be lost, got patch_forward"),
        ("router", lambda module: setattr(module, "__class__", RouterOfMine), "got RouterOfMine.forward of tests"),
        ("experts", lambda module: setattr(module, "__class__", ExpertsOfMine), "got ExpertsOfMine.forward of tests"),
        (
            "router",
            lambda module: parametrize.register_parametrization(module, "scale", Halved()),
            "router must have no parametrizations, which would be lost, got scale",
        ),
        ("router.norm", hook, "router.norm must have no hooks, which would be lost, got _forward_hooks of Gemma4RMS"),
        ("router.norm", patch_forward, "router.norm must have no forward of its own, which would be lost"),
        ("router.norm", patch_norm, "router.norm must have no _norm of its own, which would be lost, got patch_norm"),
        (
            "router",
            wrap_forward,
            f"forward of its own, .*, got twice of {__name__} around Gemma4TextRouter.forward of transformers",
        ),
        (
            "router",
            lambda router: setattr(router, "forward", functools.partial(type(router).forward, router)),
            "forward of its own, which would be lost, got a partial: ",
        ),
        ("router.norm", replace_norm, "router.norm must have no forward of its own, .*, got RMSNorm.forward of torch"),
        (
            "router",
            release,
            "router must have plain tensors as parameters, got an empty one for scale, an empty one fo",
        ),
        ("experts", release, "experts must have plain tensors as parameters, got an empty one for gate_up_proj, an em"),
        ("router", lambda router: setattr(router, "scalar_root_size", 1.0), "router must have a norm without a scale"),
        (
            "experts.act_fn",
            hook,
            r"experts: Gemma4TextExperts.act_fn has hooks \(_forward_hooks\), which",
        ),
        ("experts.act_fn", patch_forward, "experts: Gemma4TextExperts.act_fn has a forward of its own"),
        (
            "experts",
            lambda experts: setattr(experts, "act_fn", nn.ReLU()),
            "experts: cupymoe has no activation like ReL",
        ),
        ("experts", lambda experts: setattr(experts, "has_bias", True), "experts: .* it has no gate_up_proj_bias"),
        (
            "router",
            shard,
            "router must have plain tensors as parameters, got DTensor for scale, DTensor for per_",
        ),
        ("experts", shard, "experts must have plain tensors as parameters, got DTensor for gate_up_proj, DTensor for"),
    ],
)
def test_from_transformers_refuses_what_it_would_lose(part, change, message):
    layer = decoder_layer()
    with one_process():
        change(layer.get_submodule(part))
        with pytest.raises(ValueError, match=f"^decoder_layer.*{message}"):
            Gemma4MoE.from_transformers(layer)


def test_from_transformers_takes_the_activation_that_the_experts_compute():
    layer = decoder_layer()
    layer.experts.act_fn = nn.SiLU()
    moe = Gemma4MoE.from_transformers(layer)
    assert moe.experts.activation is moe.config.activation is MoEActivation.SILU
    states = torch.randn(9, 32)
    _, weights, index = layer.router(states)
    torch.testing.assert_close(moe(states), layer.experts(states, index, weights))


def test_from_transformers_takes_the_eps_that_the_norm_has():
    layer = decoder_layer()
    layer.router.norm.eps = 0.5
    states = torch.randn(9, 32)
    torch.testing.assert_close(Gemma4MoE.from_transformers(layer).router(states)[0], layer.router(states)[0])


def prune(router, experts, kept):
    """What expert pruning does; the config still counts every expert."""
    router.proj.weight = nn.Parameter(router.proj.weight[kept].detach())
    router.per_expert_scale = nn.Parameter(router.per_expert_scale[kept].detach())
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[kept].detach()))


def test_a_pruned_layer():
    layer, states = decoder_layer(), torch.randn(9, 32)
    prune(layer.router, layer.experts, [0, 2, 3, 5])
    layer.experts.num_experts = 4
    moe = Gemma4MoE.from_transformers(layer)
    assert moe.config.num_experts == 4
    _, weights, index = layer.router(states)
    torch.testing.assert_close(moe(states), layer.experts(states, index, weights))


def test_a_pruned_module():
    moe, states, _ = moe_and_states()
    prune(moe.router, moe.experts, [1, 2, 4])
    probabilities, weights, index = moe.router(states)
    assert probabilities.shape == (9, 3)
    assert torch.equal(moe(states), moe.experts(states, index, weights))


def test_from_transformers_refuses_experts_of_another_number_than_the_router_s():
    """An index past the last expert would mask its pair."""
    layer = decoder_layer()
    layer.experts.gate_up_proj = nn.Parameter(layer.experts.gate_up_proj[:4].detach())
    layer.experts.down_proj = nn.Parameter(layer.experts.down_proj[:4].detach())
    with pytest.raises(ValueError, match="experts must hold the 6 experts that its router chooses from, got 4"):
        Gemma4MoE.from_transformers(layer)


def test_from_transformers_takes_copies_of_gemma_4_s_classes():
    """transformers generates one model's code from another's."""
    diffusion = pytest.importorskip("transformers.models.diffusion_gemma.modeling_diffusion_gemma")
    layer, states = decoder_layer(), torch.randn(9, 32)
    layer.router.__class__ = diffusion.DiffusionGemmaTextRouter
    layer.router.norm.__class__ = diffusion.DiffusionGemmaRMSNorm
    layer.experts.__class__ = diffusion.DiffusionGemmaTextExperts
    _, weights, index = layer.router(states)
    torch.testing.assert_close(
        Gemma4MoE.from_transformers(layer)(states), layer.experts(states, index, weights), rtol=1e-5, atol=1e-5
    )


# --- helpers ----------------------------------------------------------------------------------------------------------


def test_the_path_of_a_module_is_the_one_in_the_largest_module():
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"experts": Gemma4Experts(CONFIG)})])})
    assert path_of(model["blocks"][0]["experts"]) == "blocks.0.experts (Gemma4Experts)"
    assert path_of(nn.Identity()) == "Identity"
