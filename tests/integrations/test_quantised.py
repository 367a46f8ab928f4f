"""Quantised experts inside transformers' models, and PEFT's adapters beside them."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from cupymoe import Gemma4MoE, QuantizedWeight, explain, quantize, warmup
from tests.helpers import relative_error
from tests.integrations.test_transformers import gemma4, gpt_oss, mixtral, nemotron_h

integration = pytest.importorskip("cupymoe.integrations.transformers")
quantize_experts = integration.quantize_experts


def sized(build):
    """A model whose sizes are multiples of a group."""
    torch.manual_seed(0)
    model = build()
    model.set_experts_implementation("cupymoe")
    return model.eval()


def gemma4_of_32s():
    return sized(lambda: gemma4(moe_intermediate_size=32))


def tokens():
    return torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(3))


def dequantized(model):
    """A copy of a quantised model whose experts' weights are what its codes stand for."""
    twin = copy.deepcopy(model)
    for experts in twin.modules():
        for name in ("gate_up_proj", "up_proj", "down_proj"):
            weight = getattr(experts, name, None)
            if isinstance(weight, QuantizedWeight):
                plain = weight.dequantize(torch.float32)
                turned = plain.mT.contiguous() if getattr(experts, "is_transposed", False) else plain
                delattr(experts, name)
                setattr(experts, name, torch.nn.Parameter(turned))
    return twin


@torch.no_grad()
@pytest.mark.parametrize(
    "build", [gemma4_of_32s, lambda: sized(mixtral), lambda: sized(gpt_oss), lambda: sized(nemotron_h)]
)
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_logits_are_those_of_the_dequantised_weights(build, format):
    model = build()
    count = quantize_experts(model, format)
    assert count == sum(isinstance(getattr(module, "down_proj", None), QuantizedWeight) for module in model.modules())
    assert count > 0
    twin = dequantized(model)
    twin.set_experts_implementation("eager")
    assert relative_error(model(tokens()).logits, twin(tokens()).logits.double()) < 1e-5


@torch.no_grad()
def test_int4_generates():
    model = gemma4_of_32s()
    plain = copy.deepcopy(model)
    assert quantize_experts(model, "int4", group_size=32) == 2
    twin = dequantized(model)
    settings = {"max_new_tokens": 6, "do_sample": False}
    ours, theirs = model.generate(tokens(), **settings), twin.generate(tokens(), **settings)
    assert torch.equal(ours, theirs)
    assert 0 < relative_error(model(tokens()).logits, plain(tokens()).logits.double()) < 0.5
    assert {each.weight_format for each in explain(model, 4)} == {"int4_g32,int4_g32"}
    warmup(model, (1,))


def test_a_group_size_for_each_weight():
    model = sized(lambda: gemma4(hidden_size=64, moe_intermediate_size=32))
    quantize_experts(model, "int4", group_size=(64, 32))
    assert {each.weight_format for each in explain(model, 4)} == {"int4_g64,int4_g32"}


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("format", ["int4", "int8", "fp8", "nvfp4"])
def test_logits_on_gpu(format):
    model = gemma4_of_32s().to("cuda", torch.bfloat16)
    quantize_experts(model, format)
    given = tokens().cuda()
    twin = dequantized(model).to(torch.bfloat16)
    assert {each.backend for each in explain(model, 4) if each.direction == "forward"} <= {"fused", "grouped"}
    assert relative_error(model(given).logits, twin(given).logits.double()) < 0.02
    assert model.generate(given, max_new_tokens=4, do_sample=False).shape == (2, 11)


@torch.no_grad()
def test_saved(tmp_path):
    """transformers writes what we load by torch: its own loader knows nothing of codes."""
    model = gemma4_of_32s()
    quantize_experts(model, "int4")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    loaded = gemma4_of_32s()
    quantize_experts(loaded, "int4")
    for experts in loaded.modules():
        if isinstance(experts, QuantizedWeight):
            experts.codes.zero_()
    loaded.load_state_dict(state, strict=False)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_gradients_of_everything_else():
    model = gemma4_of_32s()
    quantize_experts(model, "int4")
    model(tokens()).logits.square().sum().backward()
    twin = dequantized(model)
    twin(tokens()).logits.square().sum().backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, theirs[name].grad.double()) < 1e-3 or not theirs[name].grad.any()


def test_one_layer_at_a_time(monkeypatch):
    """When a layer is quantised, the parameters of the one before are gone."""
    model = gemma4_of_32s()
    at_once = []

    def spy(*arguments, **settings):
        weights = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
        at_once.append(len(weights))
        return quantize(*arguments, **settings)

    monkeypatch.setattr(integration, "quantize", spy)
    quantize_experts(model, "int4")
    assert at_once == [4, 2]
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]


def test_a_layer_becomes_ours():
    model = gemma4_of_32s()
    quantize_experts(model, "int8")
    layer = next(module for module in model.modules() if hasattr(module, "router"))
    ours = Gemma4MoE.from_transformers(layer)
    assert ours.experts.down_proj is layer.experts.down_proj
    states = torch.randn(3, 32)
    _, weights, index = layer.router(states)
    assert torch.equal(ours.experts(states, index, weights), layer.experts(states, index, weights))


def test_what_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        quantize_experts("model", "int4")
    with pytest.raises(ValueError, match="model must hold experts that cupymoe computes; Linear holds none"):
        quantize_experts(torch.nn.Linear(2, 2), "int4")
    model = gemma4(moe_intermediate_size=32)
    with pytest.raises(ValueError, match='set experts_implementation="cupymoe"'):
        quantize_experts(model, "int4")
    model = gemma4_of_32s()
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.experts: gate_up_proj: k must be a multiple of int4_g64"):
        quantize_experts(model, "int4", group_size=64)
    quantize_experts(model, "int4")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.experts must have plain weights, got gate_up"):
        quantize_experts(model, "int4")
    with torch.device("meta"):
        model = gemma4(moe_intermediate_size=32)
    model.set_experts_implementation("cupymoe")
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.experts\.gate_up_proj must be a whole tensor in memory"):
        quantize_experts(model, "int4")


def test_other_implementations_do_not_compute_it_in_silence():
    model = gemma4_of_32s()
    quantize_experts(model, "int4")
    model.set_experts_implementation("eager")
    with pytest.raises(TypeError):
        model(tokens())


# --- PEFT -------------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft", minversion="0.21")
use_low_rank = pytest.importorskip("cupymoe.integrations.peft").use_low_rank
with_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(model, low_rank=True):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[], target_parameters=TARGETS, r=4, lora_alpha=6))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.25)
    if low_rank:
        use_low_rank(model)
    return model


@with_peft
def test_qlora_is_lora_on_the_dequantised_weights():
    model = adapted(gemma4_of_32s())
    assert quantize_experts(model, "int4") == 2
    twin = dequantized(model)
    with torch.no_grad():
        assert relative_error(model(tokens()).logits, twin(tokens()).logits.double()) < 1e-5
        with model.disable_adapter(), twin.disable_adapter():
            assert relative_error(model(tokens()).logits, twin(tokens()).logits.double()) < 1e-5
    for each in (model, twin):
        each(tokens()).logits.square().sum().backward()
    theirs = {name: parameter.grad for name, parameter in twin.named_parameters() if "lora_" in name}
    ours = {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}
    assert ours.keys() == theirs.keys()
    assert len(ours) == 8
    for name, grad in ours.items():
        assert grad.any()
        assert relative_error(grad, theirs[name].double()) < 1e-4


@with_peft
def test_a_step_of_training():
    model = adapted(gemma4_of_32s())
    quantize_experts(model, "int4")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]


@with_peft
def test_what_peft_can_not():
    model = adapted(gemma4_of_32s(), low_rank=False)
    with pytest.raises(ValueError, match=r"must be computed unmerged: call cupymoe\.integrations\.peft\.use_low_rank"):
        quantize_experts(model, "int4")
    use_low_rank(model)
    quantize_experts(model, "int4")
    with pytest.raises(ValueError, match=r"(gate_up|down)_proj must be a plain parameter, .* got one in int4_g32"):
        model.merge_adapter()
    wrapper = next(module for module in model.modules() if type(module).__name__ == "ParamWrapper")
    wrapper.get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"_proj must be a plain parameter, .* got one in int4_g32"):
        model(tokens())
    model = gemma4_of_32s()
    quantize_experts(model, "int4")
    with pytest.raises(ValueError, match="target_parameters"):
        adapted(model)


@with_peft
def test_our_modules_with_adapters():
    torch.manual_seed(0)
    states = torch.randn(5, 64)
    from tests.weights.test_modules import moe

    plain = moe()
    model = adapted(plain)
    quantize_experts(model, "nvfp4")
    assert isinstance(plain.experts.get_base_layer().down_proj, QuantizedWeight)
    twin = dequantized(model)
    assert relative_error(model(states), twin(states).double()) < 1e-5
