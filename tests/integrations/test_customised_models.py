"""Hooked, patched, parametrized, sharded and quantised models of transformers: computed as eager computes them, or
refused by name."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import cupymoe
from tests.helpers import randomize, transformers_config, transformers_gemma4
from tests.test_customised_modules import Halved, RouterOfMine, one_process, patch_forward, prune

transformers = pytest.importorskip("transformers", minversion="5.0")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")


def gemma4(**changes):
    changes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], **changes}
    model = randomize(transformers.Gemma4ForCausalLM(transformers_config(**changes))).eval()
    model.set_experts_implementation("cupymoe")
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 8)[None]).logits


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def experts_of(model):
    return model.model.layers[1].experts


def router_of(model):
    return model.model.layers[1].router


# --- act_fn -----------------------------------------------------------------------------------------------------------


class GELUTanh(nn.Module):
    """It bears the name of transformers' class, and computes something else."""

    def forward(self, input):
        return torch.relu(input)


def sparsify(experts):
    experts.act_fn.register_forward_hook(lambda module, arguments, output: output * (output.abs() > 0.3))


def pre_hook(experts):
    experts.act_fn.register_forward_pre_hook(lambda module, arguments: (arguments[0] / 2,))


def replace_act(experts):
    experts.act_fn.act = torch.relu


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (sparsify, r"act_fn has hooks \(_forward_hooks\), which would be ignored"),
        (pre_hook, r"act_fn has hooks \(_forward_pre_hooks\), which would be ignored"),
        (
            lambda experts: patch_forward(experts.act_fn),
            "act_fn has a forward of its own, which would be ignored",
        ),
        (replace_act, "act_fn has an act of its own, .*relu.*, which would be ignored"),
        (
            lambda experts: setattr(experts, "act_fn", GELUTanh()),
            f"no activation like the GELUTanh of {__name__} of Ge",
        ),
    ],
)
def test_an_activation_that_is_not_its_class_alone_is_refused(change, message):
    model = gemma4()
    change(experts_of(model))
    with pytest.raises(ValueError, match=rf"model.layers.1.experts \(Gemma4TextExperts\): .*{message}"):
        logits(model)


def test_a_class_whose_forward_was_replaced_is_refused(monkeypatch):
    model = gemma4()
    monkeypatch.setattr(transformers.activations.GELUTanh, "forward", lambda self, input: torch.relu(input))
    with pytest.raises(ValueError, match="act_fn has a forward of its own, which would be ignored"):
        logits(model)


@pytest.mark.parametrize("change", [sparsify, lambda experts: patch_forward(experts.act_fn)])
def test_what_is_refused_runs_again_without_it(change):
    model = gemma4()
    expected, kept = logits(model), experts_of(model).act_fn
    experts_of(model).act_fn = copy.deepcopy(kept)
    change(experts_of(model))
    with pytest.raises(ValueError, match='set experts_implementation="grouped_mm"'):
        logits(model)
    experts_of(model).act_fn = kept
    assert torch.equal(logits(model), expected)


# --- experts ----------------------------------------------------------------------------------------------------------


def test_a_patched_forward_and_hooks_of_the_experts_are_obeyed():
    model = gemma4()
    kept = experts_of(model).forward
    experts_of(model).forward = lambda *arguments: 2 * kept(*arguments)
    experts_of(model).register_forward_hook(lambda module, arguments, output: output / 3)
    ours = logits(model)
    model.set_experts_implementation("eager")
    assert_same(ours, logits(model))


def test_parametrized_experts_are_computed():
    model = gemma4()
    parametrize.register_parametrization(experts_of(model), "down_proj", Halved())
    ours = logits(model)
    model.set_experts_implementation("eager")
    assert_same(ours, logits(model))


def test_quantised_experts_are_refused_by_the_name_of_their_tensors():
    torchao = pytest.importorskip("torchao.quantization")
    model = gemma4()
    linear = nn.Linear(32, 6 * 48, bias=False)
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    weight = linear.weight

    experts_of(model).register_parameter("gate_up_proj", nn.Parameter(weight, requires_grad=False))
    with pytest.raises(
        ValueError, match=rf"layers.1.experts .*its gate_up_proj is a {type(weight).__name__}, not a pl"
    ):
        logits(model)


# --- replace_routers --------------------------------------------------------------------------------------------------


def change_top_k(model):
    model.config.top_k_experts = 1


def change_eps(model):
    router_of(model).norm.eps = 0.5


def hook_norm(model):
    router_of(model).norm.register_forward_hook(lambda module, arguments, output: 2 * output)


def patch_norm(model):
    kept = router_of(model).norm.forward
    router_of(model).norm.forward = lambda hidden_states: 2 * kept(hidden_states)


def patch_inside_norm(model):
    kept = router_of(model).norm._norm
    router_of(model).norm._norm = lambda hidden_states: 2 * kept(hidden_states)


def change_root(model):
    router_of(model).scalar_root_size *= 3


def parametrize_scale(model):
    parametrize.register_parametrization(router_of(model), "scale", Halved())


def parametrize_projection(model):
    parametrize.register_parametrization(router_of(model).proj, "weight", Halved())


def prune_layer(model):
    prune(router_of(model), experts_of(model), [0, 2, 4])
    experts_of(model).num_experts = 3


CHANGES = (
    change_top_k,
    change_eps,
    hook_norm,
    patch_norm,
    patch_inside_norm,
    change_root,
    parametrize_scale,
    parametrize_projection,
    prune_layer,
)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("replaced_first", [True, False])
def test_a_replaced_router_obeys_what_transformers_obeys(change, replaced_first):
    model = gemma4()
    untouched = copy.deepcopy(model)
    before = logits(model)
    if replaced_first:
        integration.replace_routers(model)
    change(model)
    if not replaced_first:
        integration.replace_routers(model)
    change(untouched)
    expected = logits(untouched)
    assert not torch.allclose(before, expected, rtol=1e-3, atol=1e-3)
    assert_same(logits(model), expected)
    assert all(isinstance(layer.router, cupymoe.Gemma4Router) for layer in model.model.layers)


def test_a_parametrization_of_a_replaced_router_can_be_removed():
    model = gemma4()
    expected = logits(model)
    parametrize_scale(model)
    integration.replace_routers(model)
    parametrize.remove_parametrizations(router_of(model), "scale", leave_parametrized=False)
    assert type(router_of(model)) is type(model.model.layers[0].router)
    assert_same(logits(model), expected)


def test_a_subclass_without_a_forward_of_its_own_keeps_its_methods():
    class Named(transformers_gemma4().Gemma4TextRouter):
        def extra_repr(self):
            return "named " + super().extra_repr()

    model = gemma4()
    expected = logits(model)
    router_of(model).__class__ = Named
    integration.replace_routers(model)
    assert isinstance(router_of(model), cupymoe.Gemma4Router)
    assert router_of(model).extra_repr() == "named "
    assert_same(logits(model), expected)


def test_a_subclass_with_a_forward_of_its_own_is_refused_before_any_changes():
    model = gemma4()
    router_of(model).__class__ = RouterOfMine
    with pytest.raises(
        ValueError, match=r"layers.1.router: .*no forward of its own, .* got RouterOfMine.forward of tests"
    ):
        integration.replace_routers(model)
    assert not any(isinstance(module, cupymoe.Gemma4Router) for module in model.modules())


def test_a_patched_forward_below_accelerate_s_hook_is_refused():
    hooks = pytest.importorskip("accelerate.hooks")
    model = gemma4()
    patch_forward(router_of(model))
    hooks.add_hook_to_module(router_of(model), hooks.ModelHook())
    with pytest.raises(ValueError, match=r"layers.1.router: .*no forward of its own, .* got patch_forward"):
        integration.replace_routers(model)


NORM = transformers_gemma4().Gemma4RMSNorm


@pytest.mark.parametrize(("cls", "method"), [(NORM, "forward"), (NORM, "_norm"), (nn.Linear, "forward")])
def test_a_replaced_router_obeys_classes_that_were_patched(cls, method, monkeypatch):
    model = gemma4()
    integration.replace_routers(model)
    router, states = router_of(model), torch.randn(9, 32)
    before, kept = router(states)[0], getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, input: 2 * kept(self, input))
    theirs = transformers_gemma4().Gemma4TextRouter.forward(router, states)[0]
    assert not torch.allclose(theirs, before, rtol=1e-2)
    torch.testing.assert_close(router(states)[0], theirs)


PATCHED_FIRST = """
import sys, torch
from torch import nn
from transformers import activations
from transformers.models.gemma4 import modeling_gemma4
name, method = sys.argv[1:]
cls = next(vars(module)[name] for module in (modeling_gemma4, activations, nn) if name in vars(module))
kept = getattr(cls, method)
setattr(cls, method, lambda self, *inputs: kept(self, *inputs))

import cupymoe.integrations.transformers as integration
from cupymoe import Gemma4MoE
from tests.helpers import randomize, transformers_config

layer = randomize(modeling_gemma4.Gemma4TextDecoderLayer(transformers_config(), 0)).eval()
try:
    Gemma4MoE.from_transformers(layer)
except ValueError as error:
    print(error)
try:
    integration.replace_routers(layer)
except ValueError as error:
    print(error)
else:
    print("plain" if layer.router._is_plain(torch.randn(9, 32)) else "called")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "refused", "replaced"),
    [
        (
            "Gemma4TextRouter",
            "forward",
            "decoder_layer.router must have no forward of its own",
            "router: a router must",
        ),
        ("Gemma4TextExperts", "forward", "decoder_layer.experts must have no forward of its own", "plain"),
        ("Gemma4RMSNorm", "forward", "decoder_layer.router.norm must have no forward of its own", "called"),
        ("Gemma4RMSNorm", "_norm", "decoder_layer.router.norm must have no _norm of its own", "called"),
        ("GELUTanh", "forward", "decoder_layer.experts: Gemma4TextExperts.act_fn has a forward of its own", "plain"),
        ("Linear", "forward", "", "called"),
    ],
)
def test_a_class_patched_before_cupymoe_is_imported(name, method, refused, replaced):
    """The original is then nowhere to be seen."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PATCHED_FIRST, name, method], capture_output=True, text=True, check=True
    )
    *first, second = result.stdout.splitlines()
    assert "".join(first).startswith(refused)
    assert bool(first) == bool(refused)
    assert second.startswith(replaced)


def test_a_sharded_router_stays_sharded():
    model = gemma4()
    expected = logits(model)
    with one_process() as mesh:
        torch.distributed.fsdp.fully_shard(router_of(model), mesh=mesh)
        integration.replace_routers(model)
        assert isinstance(router_of(model), torch.distributed.fsdp.FSDPModule)
        assert isinstance(router_of(model), cupymoe.Gemma4Router)
        assert_same(logits(model), expected)


def test_a_router_under_transformers_parallel_layer_computes_as_ours():
    """As its expert parallelism masks the pairs of other ranks, around the router's forward."""
    parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    model, calls = gemma4(), []

    class Masking(parallel.TensorParallelLayer):
        def transform_output_post_forward(self, module, output, mesh):
            calls.append((module, mesh))
            probabilities, weights, index = output
            return probabilities, weights * (index < 3), torch.where(index < 3, index, 6)

    Masking().install_forward(router_of(model), "mesh")
    expected = logits(model)
    assert calls == [(router_of(model), "mesh")]
    assert integration.replace_routers(model) == 2
    assert_same(logits(model), expected)
    assert calls == 2 * [(router_of(model), "mesh")]
    inside = router_of(model).forward.__closure__
    assert any(getattr(cell.cell_contents, "__func__", None) is cupymoe.Gemma4Router.forward for cell in inside)
