"""A model's own gating function: recognised by what it computes, with the parameters that the module has now."""

import types

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cupymoe import MoEActivation
from tests.helpers import transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.17")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")
gates = pytest.importorskip("cupymoe.integrations.gates")
deepseek = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
minimax = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")


class Config:
    num_local_experts, hidden_size, intermediate_size = 4, 16, 8
    hidden_act, swiglu_limit, swiglu_alpha = "silu", 0.7, 1.1
    _experts_implementation = "eager"


def experts_of(experts_class):
    torch.manual_seed(0)
    experts = experts_class(Config())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def output(experts, implementation):
    experts.config._experts_implementation = implementation
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(12, 16, generator=generator)
    with torch.no_grad():
        return experts(states, torch.arange(24).view(12, 2) % 4, torch.rand(12, 2, generator=generator))


def assert_eager_s(experts):
    torch.testing.assert_close(output(experts, "cupymoe"), output(experts, "eager"), rtol=1e-4, atol=1e-5)


def written_in_transformers(source, name="_apply_gate"):
    """A function as a module of transformers would have it."""
    namespace = {"__name__": "transformers.models.another", "torch": torch}
    exec(source, namespace)
    return namespace[name]


def with_gate(source):
    function = written_in_transformers(f"def _apply_gate(self, gate_up):\n{source}")
    return experts_of(type("AnotherExperts", (deepseek.DeepseekV4Experts,), {"_apply_gate": function}))


HALVES = "    gate, up = gate_up.chunk(2, dim=-1)\n"


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts_class", "name", "values"),
    [
        (gpt_oss.GptOssExperts, "limit", (0.4, 3, float("inf"))),
        (gpt_oss.GptOssExperts, "alpha", (0.5, 2.0)),
        (deepseek.DeepseekV4Experts, "limit", (0.3, 1.5, float("inf"))),
        (minimax.MiniMaxM3VLExperts, "swiglu_limit", (0.4, 2.0)),
        (minimax.MiniMaxM3VLExperts, "swiglu_alpha", (0.6, 1.0)),
    ],
)
def test_a_changed_parameter_is_obeyed(experts_class, name, values):
    experts = experts_of(experts_class)
    setattr(experts, name, 0.9)
    assert_eager_s(experts)
    before = output(experts, "cupymoe")
    for value in values:
        setattr(experts, name, value)
        assert_eager_s(experts)
        assert not torch.equal(output(experts, "cupymoe"), before)


def test_an_attribute_that_the_gate_does_not_read_is_passed_over():
    """MiniMax M3 has its limit twice."""
    experts = experts_of(minimax.MiniMaxM3VLExperts)
    before = output(experts, "cupymoe")
    experts.limit = 1e-3
    assert torch.equal(output(experts, "cupymoe"), before)


def test_a_parameter_that_is_a_property():
    class Tighter(gpt_oss.GptOssExperts):
        limit = property(lambda self: self.half * 2, lambda self, value: None)

    experts = experts_of(Tighter)
    for experts.half in (0.2, 0.8):
        assert_eager_s(experts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"limit of silu must be from 1e-06 to inf, got 0.0"),
        (None, "limit of silu must be a number, got None"),
        (torch.tensor(2.0), "limit of silu must be a number, got tensor"),
        ([2.0], r"limit of silu must be a number, got \[2.0\]"),
    ],
)
def test_a_parameter_that_the_activation_can_t_have_is_named(value, message):
    experts = experts_of(deepseek.DeepseekV4Experts)
    experts.limit = value
    with pytest.raises(ValueError, match=f"does not serve DeepseekV4Experts: .*{message}"):
        output(experts, "cupymoe")


def test_a_parameter_that_is_no_number_is_named_where_it_is_compiled():
    experts = experts_of(deepseek.DeepseekV4Experts)
    experts.limit = None
    experts.config._experts_implementation = "cupymoe"
    arguments = torch.randn(3, 16), torch.tensor([[0, 1]] * 3), torch.rand(3, 2)
    with pytest.raises(Exception, match="limit of silu must be a number, got None"):
        torch.compile(experts, backend="eager")(*arguments)


def test_another_act_fn_has_no_limit():
    experts = experts_of(deepseek.DeepseekV4Experts)
    experts.act_fn = transformers.activations.ACT2FN["gelu_pytorch_tanh"]
    with pytest.raises(ValueError, match=r"it gates in its own way: DeepseekV4Experts\._apply_gate of"):
        output(experts, "cupymoe")


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "spelling"),
    [
        ("    return self.act_fn(gate) * up\n", "silu"),
        ("    return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)\n", "silu"),
        ("    return gate * torch.sigmoid(1.702 * gate.clamp(max=7.0)) * up\n", None),
        ("    return gate * torch.sigmoid(gate) * up\n", "silu"),
        ("    return torch.nn.functional.gelu(gate) * up\n", "gelu"),
        ("    return torch.nn.functional.gelu(gate, approximate='tanh') * up\n", "gelu_tanh"),
        ("    return torch.relu(gate) ** 2 * up\n", "relu2"),
        ("    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)\n", "swiglustep"),
        (
            "    return self.act_fn(gate.clamp_(max=self.limit)) * up.clamp_(-self.limit, self.limit)\n",
            "silu(limit=7.0)",
        ),
        # what no activation of the contract computes
        ("    return self.act_fn(up) * gate\n", None),
        ("    return self.act_fn(gate) * up.clamp(-self.limit, self.limit)\n", None),
        ("    return self.act_fn(gate.clamp(max=300.0)) * up.clamp(-300.0, 300.0)\n", None),
        ("    return self.act_fn(gate) * (up + 1e-3)\n", None),
        ("    return torch.relu(gate) * up\n", None),
        ("    return torch.nn.functional.silu(gate.clamp(max=1.75)) * up.clamp(-1.75, 1.75)\n", None),
        ("    return self.act_fn(gate.clamp(max=1.75)) * up.clamp(-self.limit, self.limit)\n", None),
        ("    return self.act_fn(gate) * up * self.down_proj.mean()\n", None),
        ("    return super()._apply_gate(gate_up)\n", None),
        ("    return (self.act_fn(gate) * up)[..., :1]\n", None),
        ("    return None\n", None),
    ],
)
def test_a_function_is_what_it_computes(body, spelling):
    """Each is as a model of transformers would write it."""
    experts = with_gate(HALVES + body)
    experts.limit = 7.0
    if spelling is None:
        with pytest.raises(ValueError, match="it gates in its own way: _apply_gate of transformers"):
            integration.activation_of(experts)
        return
    assert integration.activation_of(experts) is MoEActivation.from_str(spelling)
    states = torch.randn(5, 16)
    reference = type(experts)._apply_gate(experts, states.double())
    ours = torch.ops.cupymoe.moe_activation(states.double(), spelling)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_a_layout_that_the_class_denies_is_refused():
    experts = experts_of(gpt_oss.GptOssExperts)
    experts.is_concatenated = True
    with pytest.raises(ValueError, match=r"its is_concatenated is True, but its _apply_gate computes swigluoai"):
        output(experts, "cupymoe")


# --- what users do ----------------------------------------------------------------------------------------------------


def sparse_gate(self, gate_up):
    return torch.relu(gate_up.chunk(2, dim=-1)[0])


def same_gate(self, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return self.act_fn(gate) * up


@pytest.mark.parametrize("gate", [sparse_gate, same_gate])
def test_a_gate_that_somebody_else_wrote_is_refused(gate, monkeypatch):
    """Whatever it computes: what it does besides is not known."""
    message = (
        rf"does not serve \w*: it gates in its own way: {gate.__name__} of {__name__} is no function of transformers'"
    )
    with pytest.raises(ValueError, match=message):
        output(experts_of(type("Mine", (deepseek.DeepseekV4Experts,), {"_apply_gate": gate})), "cupymoe")
    experts = experts_of(deepseek.DeepseekV4Experts)
    expected = output(experts, "cupymoe")
    monkeypatch.setattr(deepseek.DeepseekV4Experts, "_apply_gate", gate)
    with pytest.raises(ValueError, match=message):
        output(experts, "cupymoe")
    monkeypatch.undo()
    assert torch.equal(output(experts, "cupymoe"), expected)


def test_a_gate_of_one_instance_is_refused():
    experts = experts_of(deepseek.DeepseekV4Experts)
    experts._apply_gate = types.MethodType(minimax.MiniMaxM3VLExperts._apply_gate, experts)
    with pytest.raises(ValueError, match="its _apply_gate was set on this module"):
        output(experts, "cupymoe")


def test_a_gate_of_another_model_is_computed():
    class Borrowed(deepseek.DeepseekV4Experts):
        _apply_gate = gpt_oss.GptOssExperts._apply_gate
        alpha = 1.5

    experts = experts_of(Borrowed)
    experts.is_concatenated = False
    assert integration.activation_of(experts).value == "swigluoai(limit=0.7,alpha=1.5)"
    assert_eager_s(experts)


def test_the_user_s_module_is_not_called():
    """Recognising a function neither runs hooks nor changes the module."""
    experts, seen = with_gate("    self.seen = 1\n" + HALVES + "    return self.act_fn(gate) * up\n"), []
    before = dict(vars(experts))
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        assert integration.activation_of(experts) is MoEActivation.SILU
    finally:
        hook.remove()
    assert seen == []
    assert vars(experts) == before


def test_a_function_is_called_once(monkeypatch):
    experts, calls = experts_of(gpt_oss.GptOssExperts), []
    gates._recognised.cache_clear()
    kept = gates._recognise
    monkeypatch.setattr(gates, "_recognise", lambda *arguments: calls.append(arguments) or kept(*arguments))
    for experts.limit in (1.0, 2.0, 3.0):
        assert_eager_s(experts)
    assert len(calls) == 1


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta"), torch.inference_mode])
def test_modes_of_torch_are_not_in_the_way(mode):
    experts = experts_of(gpt_oss.GptOssExperts)
    gates._recognised.cache_clear()
    with mode():
        assert integration.activation_of(experts).member is MoEActivation.SWIGLUOAI
    assert_eager_s(experts)


# --- a module as the activation ---------------------------------------------------------------------------------------


class InklingConfig(Config):
    n_routed_experts, moe_intermediate_size = 4, 8
    mlp_gate_softcap, mlp_up_softcap = 0.6, 0.9


@pytest.fixture
def inkling(monkeypatch):
    module = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    monkeypatch.setattr(f"{__name__}.Config", InklingConfig)
    return experts_of(module.Inkling2Experts)


def test_softcaps_are_read_in_each_call(inkling):
    assert_eager_s(inkling)
    inkling.act_fn.gate_softcap.softcap = 2.5
    assert_eager_s(inkling)
    assert integration.activation_of(inkling).value == "situ(beta=2.5,linear_beta=0.9)"


@pytest.mark.parametrize(
    "change",
    [
        lambda act_fn: act_fn.register_forward_hook(lambda module, arguments, output: 2 * output),
        lambda act_fn: act_fn.up_softcap.register_forward_pre_hook(lambda module, arguments: None),
        lambda act_fn: setattr(act_fn.up_softcap, "forward", torch.tanh),
        lambda act_fn: setattr(act_fn, "gate_softcap", nn.Tanh()),
        lambda act_fn: setattr(act_fn, "up_softcap", None),
    ],
)
def test_a_changed_softcap_is_refused(inkling, change):
    change(inkling.act_fn)
    with pytest.raises(ValueError, match="cupymoe has no activation like Inkling2SoftcappedSwiGLU of Inkling2Experts"):
        output(inkling, "cupymoe")
