"""warmup: what it compiles, and that a later call compiles nothing."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch

import cupymoe.integrations.transformers  # noqa: F401  registers "cupymoe"
from cupymoe import Gemma4MoE, Gemma4MoEConfig, fused_experts, warmup
from cupymoe.backends import DIFFERENTIABLE, registry
from cupymoe.kernels import jit
from cupymoe.token_counts import NUM_TOKENS, one_of_each_way
from tests.helpers import randomize, relative_error, slow_on_cuda, transformers_config, transformers_gemma4

CONFIG = Gemma4MoEConfig(
    hidden_size=64, moe_intermediate_size=32, num_experts=6, top_k_experts=2, hidden_activation="gelu_pytorch_tanh"
)
SIZES = (6, 2, 64, 32)


def test_calls_every_kind_once_at_every_number_of_tokens():
    called = []
    layers = torch.nn.ModuleList([Gemma4MoE(CONFIG) for _ in range(3)])
    for layer in layers:
        for part in (layer.router.proj, layer.experts):
            part.register_forward_hook(
                lambda module, inputs, output: called.append((type(module).__name__, len(inputs[0])))
            )
    warmup(layers, (5, 1, 5))
    assert sorted(called) == [("Gemma4Experts", 1), ("Gemma4Experts", 5), ("Linear", 1), ("Linear", 5)]


def calls_of(model, monkeypatch, *arguments):
    """(name of the class, activation or top k, tokens) of every call that warmup makes."""
    calls = []
    for module, name, what in (("experts", "fused_experts", "activation"), ("modules", "route", None)):
        caller = sys.modules[f"cupymoe.{module}"]
        kept = getattr(caller, name)

        def spy(states, *others, kept=kept, what=what, **settings):
            calls.append((settings[what].name if what else others[0], len(states)))
            return kept(states, *others, **settings)

        monkeypatch.setattr(caller, name, spy)
    warmup(model, *arguments)
    return calls


def test_equal_shapes_that_need_other_kernels(monkeypatch):
    """Experts' activation, top k and backend, and routers' top k and epsilon are compiled for, too."""
    changes = ({}, {}, {"hidden_activation": "silu"}, {"top_k_experts": 3}, {"rms_norm_eps": 1e-5})
    layers = [Gemma4MoE(dataclasses.replace(CONFIG, **change)) for change in changes]
    layers.append(Gemma4MoE(CONFIG, backend="reference"))
    calls = calls_of(torch.nn.ModuleList(layers), monkeypatch, (2,))
    experts = [("GELU_TANH", 2), ("SILU", 2), ("GELU_TANH", 2), ("GELU_TANH", 2)]
    routers = [(2, 2), (3, 2), (2, 2)]
    assert sorted(calls, key=str) == sorted(experts + routers, key=str)


@slow_on_cuda
@pytest.mark.parametrize("changed", [torch.bfloat16, pytest.param("cuda", marks=pytest.mark.gpu)], ids=str)
def test_equal_shapes_of_another_dtype_or_device(changed):
    called = []
    layers = torch.nn.ModuleList([Gemma4MoE(CONFIG), Gemma4MoE(CONFIG).to(changed)])
    for layer in layers:
        layer.experts.register_forward_hook(lambda module, inputs, output: called.append((output.dtype, output.device)))
    warmup(layers, (2,))
    assert called == [(layer.experts.down_proj.dtype, layer.experts.down_proj.device) for layer in layers]


def test_transformers_experts_of_equal_shapes_and_other_activations():
    called = []
    layers = []
    for activation in ("gelu_pytorch_tanh", "silu", "silu"):
        config = transformers_config("cupymoe", hidden_activation=activation)
        layers.append(randomize(transformers_gemma4().Gemma4TextExperts(config)))
        layers[-1].register_forward_hook(
            lambda module, inputs, output: called.append((type(module.act_fn).__name__, len(inputs[0])))
        )
    warmup(torch.nn.ModuleList(layers), (3,))
    assert called == [("GELUTanh", 3), ("SiLUActivation", 3)]


def test_every_kind_of_experts():
    """Transposed, with biases and a limit of their own, of which the kernels know; and ungated."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    nemotron = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    layers = [gpt_oss.GptOssExperts(gpt_oss.GptOssConfig(num_local_experts=4, **sizes)) for _ in range(3)]
    layers.append(nemotron.NemotronHExperts(nemotron.NemotronHConfig(n_routed_experts=4, **sizes)))
    layers[1].limit = 2.0
    called = []
    for layer in layers:
        layer.config._experts_implementation = "cupymoe"
        randomize(layer).register_forward_hook(lambda module, inputs, output: called.append(module))
    warmup(torch.nn.ModuleList(layers), (3,))
    assert called == [layers[0], layers[1], layers[3]]


# --- for training -----------------------------------------------------------------------------------------------------


def test_training_goes_back_through_every_call(computed):
    """And without it none; nothing of that stays with the parameters."""
    moe = randomize(Gemma4MoE(CONFIG))
    warmup(moe, (1, 4))
    assert computed == ["forward", "forward"]
    warmup(moe, (1, 4), training=True)
    assert computed[2:] == ["forward", "forward", "backward"] * 2
    assert all(parameter.grad is None and parameter.requires_grad for parameter in moe.parameters())


@pytest.mark.parametrize("frozen", [(), ("gate_up_proj", "down_proj"), ("down_proj",)], ids=str)
def test_the_gradients_are_those_that_a_step_needs(monkeypatch, frozen):
    """Of hidden states and routing weights, through which others may be asked for, and of what is not frozen."""
    moe, needed = randomize(Gemma4MoE(CONFIG)), []
    for name in frozen:
        getattr(moe.experts, name).requires_grad_(False)
    backward = type(registry()["reference"]).backward

    def spy(self, call, tensors, gate_up, grad, wanted):
        needed.append({name for name, each in zip(DIFFERENTIABLE, wanted, strict=True) if each})
        return backward(self, call, tensors, gate_up, grad, wanted)

    monkeypatch.setattr(type(registry()["reference"]), "backward", spy)
    warmup(moe, (2,), training=True)
    assert needed == [{"hidden_states", "gate_up_proj", "down_proj", "top_k_weights"} - {*frozen}]


def test_training_of_the_router():
    router, grads = randomize(Gemma4MoE(CONFIG)).router, []
    for parameter in router.parameters():
        parameter.register_hook(lambda grad: grads.append(grad.shape))
    warmup(router, (2,), training=True)
    assert {*grads} == {parameter.shape for parameter in router.parameters()}


def test_what_is_kept_and_what_is_frozen_make_other_kinds():
    layers = torch.nn.ModuleList([Gemma4MoE(CONFIG, keep=keep).experts for keep in ("gate_up", "input", "input")])
    layers.append(Gemma4MoE(CONFIG).experts)
    layers[3].down_proj.requires_grad_(False)
    called = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: called.append(module))
    warmup(layers, (3,), training=True)
    assert called == [layers[index] for index in (0, 0, 1, 1, 3, 3)]


def test_training_of_transformers_experts(computed):
    """Weights that are read would make a NaN."""
    experts, grads = transformers_gemma4().Gemma4TextExperts(transformers_config("cupymoe")), []
    for parameter in experts.parameters():
        torch.nn.init.constant_(parameter, torch.nan).register_hook(lambda grad: grads.append(grad.any().item()))
    warmup(experts, (4,), training=True)
    assert (computed, grads) == (["forward", "forward", "backward"], [False, False])


def test_experts_that_are_refused_are_named():
    experts = transformers_gemma4().Gemma4TextExperts(transformers_config("cupymoe"))
    experts.act_fn = torch.nn.Mish()
    with pytest.raises(ValueError, match=r"^0 \(Gemma4TextExperts\): .*no activation like Mish"):
        warmup(torch.nn.ModuleList([randomize(experts)]), (3,))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("low_rank", [True, False])
def test_adapted_experts_are_called_through_their_adapter(monkeypatch, low_rank, training):
    peft = pytest.importorskip("peft", minversion="0.21")
    integration = pytest.importorskip("cupymoe.integrations.peft")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(
        randomize(Gemma4MoE(CONFIG)), peft.LoraConfig(r=4, target_modules=[], target_parameters=targets)
    )
    called = []
    if low_rank:
        integration.use_low_rank(model)
        kept = integration.lora_experts
        monkeypatch.setattr(
            integration, "lora_experts", lambda *a, **k: called.append(k["activation"].name) or kept(*a, **k)
        )
    experts = model.get_base_model().experts
    experts.register_forward_hook(lambda module, inputs, output: called.append(len(inputs[0])))
    grads = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(lambda grad: grads.append(grad.shape))
    warmup(model, (3,), training=training)
    assert called == (["GELU_TANH", 3] if low_rank else [3]) * (2 if training else 1)
    assert len(grads) == (4 if training else 0)


# --- what may be given ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_quantised_experts_are_called_in_the_dtype_of_what_is_beside_them(monkeypatch, dtype):
    moe = Gemma4MoE(Gemma4MoEConfig(64, 64, 8, 2, "gelu_pytorch_tanh")).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    moe.experts.quantize_("int8")
    dtypes = []
    moe.experts.register_forward_pre_hook(lambda module, args: dtypes.append(args[0].dtype))
    warmup(moe, [1])
    assert dtypes == [dtype]


def test_the_numbers_are_the_model_s_own(monkeypatch):
    calls = calls_of(Gemma4MoE(CONFIG), monkeypatch)
    assert [count for what, count in calls if what == "GELU_TANH"] == [*one_of_each_way(*SIZES)]
    assert one_of_each_way(*SIZES) != NUM_TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_without_weights(monkeypatch, dtype):
    called = []

    def spy(*arguments, **settings):
        called.append([tensor.dtype for tensor in arguments[:3]])
        return fused_experts(*arguments, **settings)

    monkeypatch.setattr(sys.modules["cupymoe.experts"], "fused_experts", spy)
    warmup(CONFIG, (1, 3), device="cpu", dtype=dtype)
    assert called == [[dtype] * 3] * 2


def test_transformers_experts():
    """Weights that are read would make a NaN."""
    experts = transformers_gemma4().Gemma4TextExperts(transformers_config())
    for parameter in experts.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    experts.config._experts_implementation = "eager"
    with pytest.raises(ValueError, match="holds none"):
        warmup(experts)
    experts.config._experts_implementation = "cupymoe"
    called = []
    experts.register_forward_hook(lambda module, inputs, output: called.append(output.abs().sum().item()))
    warmup(experts, (1, 4))
    assert called == [0.0, 0.0]


def test_calls_record_nothing_for_autograd():
    moe, outputs = Gemma4MoE(CONFIG), []
    moe.experts.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    warmup(moe, (1,))
    assert [output.requires_grad for output in outputs] == [False]
    assert not any(parameter.is_inference() for parameter in moe.parameters())


def test_experts_whose_config_has_another_name_for_top_k():
    qwen3_moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = qwen3_moe.Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "cupymoe"
    experts, called = randomize(qwen3_moe.Qwen3MoeExperts(config)), []
    experts.register_forward_hook(lambda module, inputs, output: called.append(inputs[1].shape))
    warmup(experts, (4,))
    assert called == [(4, 3)]


def test_what_has_no_gate_up_proj_is_no_experts():
    experts = transformers_gemma4().Gemma4TextExperts(transformers_config("cupymoe"))
    del experts.gate_up_proj
    with pytest.raises(ValueError, match="Gemma4TextExperts holds none"):
        warmup(experts, (1,))


@pytest.mark.parametrize(
    ("target", "num_tokens", "error", "message"),
    [
        (torch.nn.Linear(2, 2), (1,), ValueError, "target must hold a Gemma4Router.*Linear holds none"),
        ("gemma", (1,), TypeError, "target must be a torch.nn.Module or a Gemma4MoEConfig, got str"),
        (Gemma4MoE(CONFIG), (), ValueError, r"num_tokens must be positive numbers, got \[\]"),
        (Gemma4MoE(CONFIG), (4, 0), ValueError, r"num_tokens must be positive numbers, got \[0, 4\]"),
        (CONFIG, 4, TypeError, r"num_tokens must be an iterable of integers, \(1, 64\) say, got 4"),
        (CONFIG, ("1",), TypeError, r"num_tokens must be an iterable of integers, \(1, 64\) say, got \('1',\)"),
    ],
)
def test_bad_input(target, num_tokens, error, message):
    with pytest.raises(error, match=message):
        warmup(target, num_tokens)


def test_sizes_want_a_dtype_of_weights():
    with pytest.raises(TypeError, match=r"dtype must be a floating-point dtype, got torch.int8"):
        warmup(CONFIG, (1,), dtype=torch.int8, device="cpu")


def test_sizes_want_a_device_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be one that torch sees, got cuda: it sees no CUDA device"):
        warmup(CONFIG)


def test_a_hook_makes_another_kind():
    """A projection that has one is called, where the logits are otherwise one kernel."""
    called = []
    layers = torch.nn.ModuleList([Gemma4MoE(CONFIG) for _ in range(3)])
    for layer in layers:
        layer.router.register_forward_hook(lambda module, inputs, output: called.append(module))
    layers[1].router.proj.register_forward_hook(lambda module, inputs, output: None)
    warmup(layers, (1,))
    assert called == [layers[0].router, layers[1].router]


def test_sizes_are_those_of_the_parameters():
    """Experts may have been pruned after they were made."""
    experts, called = Gemma4MoE(CONFIG).experts, []
    experts.gate_up_proj = torch.nn.Parameter(torch.full((4, 32, 48), torch.nan))
    experts.down_proj = torch.nn.Parameter(torch.full((4, 48, 16), torch.nan))
    experts.register_forward_hook(
        lambda module, inputs, output: called.append(
            (inputs[0].shape, inputs[1].unique().tolist(), output.any().item())
        )
    )
    warmup(experts, (3,))
    assert called == [((3, 48), [4], False)]


def test_a_config_need_not_be_hashable():
    """A router may have transformers' own."""
    router, called = Gemma4MoE(CONFIG).router, []
    router.config = SimpleNamespace(**dataclasses.asdict(CONFIG))
    router.register_forward_hook(lambda module, inputs, output: called.append(output[2].shape))
    warmup(router, (3,))
    assert called == [(3, 2)]


@pytest.mark.gpu
def test_nothing_is_compiled_after_it():
    moe = randomize(Gemma4MoE(CONFIG)).to("cuda", torch.bfloat16)
    counts = (1, 64, 65, 200, 400, 5000)
    warmup(moe, counts)
    compiled = jit.compiled_variants()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        states = [torch.randn(count, 64, device="cuda", dtype=torch.bfloat16) for count in counts]
        with torch.cuda.graph(graph):
            outputs = [moe(each) for each in states]
        graph.replay()
        for each, output in zip(states, outputs, strict=True):
            assert torch.equal(moe(each), output)
    assert jit.compiled_variants() == compiled


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["gate_up", "input"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_first_step_that_is_captured_compiles_nothing_after_it(frozen, keep):
    """Of sizes that no other test compiles; its gradients are those of an eager step."""
    config = dataclasses.replace(CONFIG, moe_intermediate_size=104 + 16 * frozen + 8 * (keep == "input"))
    moe = randomize(Gemma4MoE(config, keep=keep)).to("cuda", torch.bfloat16)
    moe.experts.requires_grad_(not frozen)
    counts = (1, 64, 400, 2000)
    compiled = jit.compiled_variants()
    warmup(moe, counts, training=True)
    assert jit.compiled_variants() > compiled
    compiled = jit.compiled_variants()
    inputs = [torch.randn(count, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for count in counts]
    wanted = [parameter for parameter in moe.experts.parameters() if parameter.requires_grad]

    def step():
        return [torch.autograd.grad(moe(each).float().square().sum(), [each, *wanted]) for each in inputs]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    assert jit.compiled_variants() == compiled
    graph.replay()
    for grads, expected in zip(captured, step(), strict=True):
        for grad, each in zip(grads, expected, strict=True):
            assert grad.any()
            assert relative_error(grad, each.double()) < 1e-3
    assert jit.compiled_variants() == compiled
