"""warmup: what it compiles, and that a later call compiles nothing."""

import dataclasses
import sys

import pytest
import torch

import cupymoe.integrations.transformers  # noqa: F401  registers "cupymoe"
from cupymoe import Gemma4MoE, Gemma4MoEConfig, fused_experts, warmup
from cupymoe.backends.fused import stream_reason, tiles_reason
from cupymoe.kernels import jit
from cupymoe.kernels.expert_stream import regime
from cupymoe.kernels.expert_tiles import CUTS, cut, prefers_tiles
from cupymoe.kernels.plan_experts import pairs_per_lane
from cupymoe.kernels.sort_by_expert import block_of
from cupymoe.warmup import NUM_TOKENS, one_of_each_way
from tests.helpers import randomize, transformers_config, transformers_gemma4

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
    functional = sys.modules["cupymoe.modules"]
    for name, what in (("fused_experts", "activation"), ("route", None)):
        kept = getattr(functional, name)

        def spy(states, *others, kept=kept, what=what, **settings):
            calls.append((settings[what].name if what else others[0], len(states)))
            return kept(states, *others, **settings)

        monkeypatch.setattr(functional, name, spy)
    warmup(model, *arguments)
    return calls


def test_equal_shapes_that_need_other_kernels(monkeypatch):
    """The activation, top k, epsilon and the backend are compiled for, too."""
    changes = ({}, {}, {"hidden_activation": "silu"}, {"top_k_experts": 3}, {"rms_norm_eps": 1e-5})
    layers = [Gemma4MoE(dataclasses.replace(CONFIG, **change)) for change in changes]
    layers.append(Gemma4MoE(CONFIG, backend="reference"))
    calls = calls_of(torch.nn.ModuleList(layers), monkeypatch, (2,))
    experts = [("GELU_TANH", 2), ("SILU", 2), ("GELU_TANH", 2), ("GELU_TANH", 2), ("GELU_TANH", 2)]
    routers = [(2, 2), (2, 2), (3, 2), (2, 2)]
    assert sorted(calls, key=str) == sorted(experts + routers, key=str)


@pytest.mark.parametrize("changed", [torch.bfloat16, torch.device("meta")], ids=str)
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


@pytest.mark.parametrize("low_rank", [True, False])
def test_adapted_experts_are_called_through_their_adapter(monkeypatch, low_rank):
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
    warmup(model, (3,))
    assert called == (["GELU_TANH", 3] if low_rank else [3])


# --- which numbers of tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "top_k", "hidden_size", "intermediate_size"),
    [
        (128, 8, 2816, 704),
        (8, 2, 4096, 14336),
        (256, 8, 7168, 2048),
        (512, 10, 2048, 512),
        (1, 1, 64, 64),
        (2, 2, 64, 64),
        (64, 4, 72, 64),  # no tiles
    ],
)
def test_one_number_of_tokens_of_every_range(num_experts, top_k, hidden_size, intermediate_size):
    """As the backend chooses, at every number of tokens up to 20000; where it serves none, one call for the others."""
    ranges = {}
    for num_tokens in range(1, 20000):
        num_pairs = num_tokens * top_k
        stream, tiles = stream_reason(num_pairs, num_experts), tiles_reason(num_pairs, num_experts, hidden_size)
        if stream and tiles:
            compiled = ()
        elif tiles is None and (stream or prefers_tiles(num_pairs, num_experts)):
            compiled = cut(num_pairs, num_experts), block_of(num_pairs, num_experts)
        else:
            its = regime(num_tokens, top_k, intermediate_size)
            compiled = its, not its.inline_pairs and pairs_per_lane(num_pairs)
        ranges.setdefault(compiled, num_tokens)
    assert one_of_each_way(num_experts, top_k, hidden_size, intermediate_size) == tuple(ranges.values())


def test_numbers_of_tokens_up_to_32768():
    assert 29440 in one_of_each_way(80, 1, 64, 64)
    assert max(one_of_each_way(128, 1, 64, 64)) <= 32768


def test_gemma_4_s_numbers_of_tokens_reach_every_regime_and_every_cut():
    assert len({regime(count, 8, 704) for count in NUM_TOKENS if not prefers_tiles(8 * count, 128)}) == 4
    assert {cut(8 * count, 128) for count in NUM_TOKENS if prefers_tiles(8 * count, 128)} == {*CUTS}


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

    monkeypatch.setattr(sys.modules["cupymoe.modules"], "fused_experts", spy)
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
    assert [output.is_inference() for output in outputs] == [True]


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
    with pytest.raises(ValueError, match="device must be there, got cuda: torch sees no CUDA device"):
        warmup(CONFIG)


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
