"""torch.compile(fullgraph=True) and torch.export: no graph break, no compilation for each length, same results."""

import io
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from cupymoe import Gemma4Experts, Gemma4MoE, Gemma4MoEConfig, MoEActivation, set_keep
from tests.helpers import randomize, relative_error, slow_on_cuda, transformers_config, transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.0")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")
gates = pytest.importorskip("cupymoe.integrations.gates")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile's own

CONFIG = Gemma4MoEConfig(32, 24, 6, 2, "gelu_pytorch_tanh")
LENGTHS = (5, 7, 12)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model(device, implementation="cupymoe", routers=False):
    """Two layers, one with a sliding window; bfloat16 on CUDA, so that the kernels run."""
    torch.manual_seed(3)
    config = transformers_config(
        implementation, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
    )
    built = randomize(transformers.Gemma4ForCausalLM(config)).eval()
    if routers:
        integration.replace_routers(built)
    return built.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def tokens(length, device):
    return torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(length)).to(device)


def logits(function, length, device):
    with torch.no_grad():
        return function(tokens(length, device), use_cache=False).logits.clone()


def assert_same(got, expected):
    assert relative_error(got, expected.double()) < (1e-5 if expected.dtype == torch.float32 else 5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("routers", [False, True])
@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=pytest.mark.gpu)])
def test_model(device, mode, routers):
    """Three calls: with reduce-overhead, the first warms up, the second records a CUDA graph, the third replays it."""
    if mode == "reduce-overhead" and device.type != "cuda":
        pytest.skip("reduce-overhead is CUDA graphs")
    if device.type == "cpu" and not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler for the CPU: no g++")
    eager = model(device, routers=routers)
    compiled = torch.compile(eager, fullgraph=True, mode=mode)
    expected = logits(eager, 5, device)
    # Inductor keeps float32 between bfloat16 operations; a router might then choose another expert than in eager mode.
    with torch._inductor.config.patch(emulate_precision_casts=True):
        for _ in range(3):
            assert_same(logits(compiled, 5, device), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1), (False, len(LENGTHS))])
def test_no_recompilation_but_torch_s_own(device, dynamic, graphs):
    """By default torch compiles for the first length, then once for all."""
    eager = model(device)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in LENGTHS:
        assert_same(logits(compiled, length, device), logits(eager, length, device))
    assert counters["stats"]["unique_graphs"] == graphs


def test_experts_whose_activation_is_a_function(device):
    experts = model(device).model.layers[0].experts
    del experts.act_fn  # a module
    experts.act_fn = torch.nn.functional.silu
    states = torch.randn(5, 32, dtype=experts.down_proj.dtype, device=device)
    arguments = states, torch.tensor([[0, 1]] * 5, device=device), torch.rand(5, 2, device=device)
    with torch.no_grad():
        expected = experts(*arguments)
        assert_same(torch.compile(experts, fullgraph=True, backend="aot_eager")(*arguments), expected)
    assert counters["stats"]["unique_graphs"] == 1


def gpt_oss_experts(device):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = transformers.GptOssConfig(num_local_experts=4, hidden_size=32, intermediate_size=24)
    config._experts_implementation = "cupymoe"
    experts = randomize(gpt_oss.GptOssExperts(config)).to(device)
    index = torch.tensor([[0, 1], [2, 3], [1, 3]], device=device)
    return experts, (torch.randn(3, 32, device=device), index, torch.rand(3, 2, device=device))


@slow_on_cuda
def test_a_changed_parameter_of_the_gate(device):
    """Its function is first seen while it is traced; torch makes a symbol of a number that changes."""
    gates._recognised.cache_clear()
    experts, arguments = gpt_oss_experts(device)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    outputs = []
    for experts.limit in (7.0, 0.5, 0.3, float("inf"), 1):
        outputs.append(compiled(*arguments))
        assert_same(outputs[-1], experts(*arguments))
    assert not torch.equal(outputs[0], outputs[1])
    with torch.no_grad():
        compiled(*arguments)
        graphs = counters["stats"]["unique_graphs"]
        gates._recognised(
            type(experts)._apply_gate, MoEActivation.SILU
        )  # another function that was seen makes no difference
        compiled(*arguments)
    assert counters["stats"]["unique_graphs"] == graphs


@slow_on_cuda
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_experts_with_a_gate_of_their_own(device, strict):
    gates._recognised.cache_clear()
    experts, arguments = gpt_oss_experts(device)
    program = torch.export.export(experts, arguments, strict=strict)
    assert "swigluoai" in str(program.graph)
    assert torch.equal(program.module()(*arguments), experts(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["gate_up", "input"])
def test_gradients(device, gate_up_kept_on_the_cpu_too, keep):
    ids = tokens(6, device)
    gradients = []
    for compile in (False, True):
        each = model(device)
        set_keep(each, keep)
        function = torch.compile(each, fullgraph=True, backend="aot_eager") if compile else each
        function(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in each.named_parameters() if "experts" in name})
    assert len(gradients[0]) == 4  # gate_up_proj and down_proj of both layers
    for name, expected in gradients[0].items():
        assert expected.any(), name
        assert_same(gradients[1][name], expected)


# --- torch.export -----------------------------------------------------------------------------------------------------


def moe(device):
    built = randomize(Gemma4MoE(CONFIG)).eval()
    return built.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def states(length, module):
    weight = module.experts.gate_up_proj
    return torch.randn(length, 32, dtype=weight.dtype, device=weight.device)


def test_export_for_any_number_of_tokens(device):
    """The program survives saving and loading, and holds our ops, not their insides."""
    module = moe(device)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"hidden_states": {0: length}, "router_hidden_states": {0: length}}
    program = torch.export.export(module, (states(5, module), states(5, module)), dynamic_shapes=shapes)
    called = {str(node.target) for node in program.graph.nodes if "cupymoe" in str(node.target)}
    assert called >= {"cupymoe.route.default", "cupymoe.fused_experts.default"}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (2, 5, 33):
        arguments = states(tokens, module), states(tokens, module)
        assert torch.equal(loaded(*arguments), module(*arguments))


def test_export_of_one_number_of_tokens(device):
    module = moe(device)
    exported = torch.export.export(module, (states(3, module),)).module()
    arguments = states(3, module)
    assert torch.equal(exported(arguments), module(arguments))
    with pytest.raises(AssertionError, match="hidden_states"):
        exported(states(4, module))


def test_export_of_the_experts(device):
    experts = randomize(Gemma4Experts(CONFIG)).to(device)
    arguments = (
        torch.randn(5, 32, device=device),
        torch.randint(0, 6, (5, 2), device=device),
        torch.rand(5, 2, device=device),
    )
    assert torch.equal(torch.export.export(experts, arguments).module()(*arguments), experts(*arguments))
