"""transformers' FP8Experts through experts_implementation="cupymoe": weights of 8 bits, hidden states as they come."""

import pytest
import torch
from torch import nn

from cupymoe import MoEActivation, QuantizedWeight, explain, reference, warmup
from tests.helpers import relative_error
from tests.integrations.test_transformers import gemma4, mixtral

finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
transformers = pytest.importorskip("transformers", minversion="5.0")
integration = pytest.importorskip("cupymoe.integrations.transformers")

SIZES = {"hidden_size": 160, "moe_intermediate_size": 192, "num_experts": 4}


def fp8_experts(block=True, build=lambda: gemma4(**SIZES), scale_dtype=torch.float32):
    """The experts of a model's first layer, as the quantiser of transformers makes them, with random weights."""
    torch.manual_seed(0)
    quantization = transformers.FineGrainedFP8Config()
    quantization.weight_block_size = (128, 128) if block else None
    model = finegrained_fp8.replace_with_fp8_linear(
        build(), quantization_config=quantization, modules_to_not_convert=["lm_head"]
    )
    model.set_experts_implementation("cupymoe")
    experts = next(module for module in model.modules() if isinstance(module, finegrained_fp8.FP8Experts))
    for name in ("gate_up_proj", "down_proj"):
        shape, scales = getattr(experts, name).shape, getattr(experts, f"{name}_scale_inv").shape
        weight = torch.randn(shape).clamp(-3, 3).to(torch.float8_e4m3fn)
        setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
        scale = torch.exp2(torch.randint(-5, -2, scales).float())
        if scale_dtype == torch.float32:
            scale *= 1 + torch.rand(scales)
        setattr(experts, f"{name}_scale_inv", torch.nn.Parameter(scale.to(scale_dtype), requires_grad=False))
    return experts


def weights_of(experts):
    """In float64, block by block."""
    weights = []
    for name in ("gate_up_proj", "down_proj"):
        weight, scales = getattr(experts, name).double(), getattr(experts, f"{name}_scale_inv").double()
        num_experts, rows, columns = weight.shape
        _, row_blocks, column_blocks = scales.shape
        height = 128 if row_blocks == -(-rows // 128) else rows // row_blocks
        width = 128 if column_blocks > 1 else columns
        for expert in range(num_experts):
            for i in range(row_blocks):
                for j in range(column_blocks):
                    block = weight[expert, i * height : (i + 1) * height, j * width : (j + 1) * width]
                    block *= scales[expert, i, j]
        weights.append(weight)
    return weights


def arguments(hidden_size=160, num_experts=4):
    return (
        torch.randn(5, hidden_size),
        torch.tensor([[0, 1], [2, 3], [1, num_experts], [3, 0], [2, 1]]),
        torch.rand(5, 2),
    )


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [False, True])
def test_experts_are_computed_from_their_codes(block, scale_dtype):
    experts = fp8_experts(block, scale_dtype=scale_dtype)
    expected = weights_of(experts)
    states, index, weights = arguments()
    output = experts(states, index, weights)
    truth = reference.experts(states.double(), *expected, index, weights.double(), MoEActivation.GELU_TANH)
    assert relative_error(output, truth) < 1e-5
    assert {name for name, _ in experts.named_parameters()} == set()
    for name, weight in zip(("gate_up_proj", "down_proj"), expected, strict=True):
        ours = getattr(experts, name)
        assert isinstance(ours, QuantizedWeight)
        assert ours.format.name == ("fp8_g128" if block else "fp8")
        assert torch.equal(ours.dequantize(), weight)
    assert torch.equal(experts(states, index, weights), output)
    assert experts(states.bfloat16(), index, weights).dtype == torch.bfloat16


def test_one_scale_for_an_expert_where_two_were_made():
    experts = fp8_experts(block=False)
    experts.gate_up_proj_scale_inv = torch.nn.Parameter(torch.rand(4, 1, 1), requires_grad=False)
    expected = weights_of(experts)
    experts(*arguments())
    assert torch.equal(experts.gate_up_proj.dequantize(), expected[0])


def test_a_weight_that_the_quantiser_left_as_it_was():
    experts = fp8_experts()
    down = torch.randn(4, 160, 192).bfloat16()
    experts.down_proj = torch.nn.Parameter(down, requires_grad=False)
    expected = weights_of(experts)[0]
    states, index, weights = arguments()
    output = experts(states.bfloat16(), index, weights)
    truth = reference.experts(
        states.bfloat16().double(), expected, down.double(), index, weights.double(), MoEActivation.GELU_TANH
    )
    assert relative_error(output, truth) < 0.005
    assert experts.down_proj.dtype == torch.bfloat16


def test_in_inference_mode_and_then_with_gradients():
    experts = fp8_experts()
    with torch.inference_mode():
        experts(*arguments())
    states, index, weights = arguments()
    experts(states.requires_grad_(), index, weights).sum().backward()
    assert states.grad.any()


def test_mixtral_gates_by_the_same_function():
    experts = fp8_experts(build=mixtral, block=False)
    expected = weights_of(experts)
    states, index, weights = arguments(32)
    output = experts(states, index, weights)
    truth = reference.experts(states.double(), *expected, index, weights.double(), MoEActivation.SILU)
    assert relative_error(output, truth) < 1e-5


def test_a_limit_is_read():
    experts = fp8_experts(build=mixtral, block=False)
    experts.limit = 0.5
    assert integration.served(experts).activation is MoEActivation.SILU.with_parameters(limit=0.5)
    experts.swiglu_alpha = 1.5
    with pytest.raises(ValueError, match="it gates in its own way"):
        integration.served(experts)


def test_explained():
    found = explain(fp8_experts(), 4)
    assert {each.weight_format for each in found} == {"fp8_g128,fp8_g128"}


def test_what_is_refused():
    experts = fp8_experts()
    experts.block_size = (128, 64)
    with pytest.raises(ValueError, match=r"its gate_up_proj: blocks must have 128 columns, got \(128, 64\)"):
        experts(*arguments())
    experts = fp8_experts()
    experts.gate_up_proj.data.view(torch.uint8)[1, 2, 3] = 0xFF
    with pytest.raises(ValueError, match="its gate_up_proj: codes must not be NaN in fp8_g128, got 1 of 0xff"):
        experts(*arguments())
    experts = fp8_experts()
    experts.down_proj_scale_inv.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="its down_proj: scales must be finite"):
        experts(*arguments())
    experts = fp8_experts()
    del experts.down_proj_scale_inv
    with pytest.raises(ValueError, match=r"its down_proj is torch\.float8_e4m3fn, not one of"):
        experts(*arguments())


def test_compiled_after_a_first_call():
    experts = fp8_experts()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    given = arguments()
    with pytest.raises(Exception, match=r"until a call outside of torch\.compile"):
        compiled(*given)
    expected = experts(*given)
    torch._dynamo.reset()
    assert torch.equal(compiled(*given), expected)


def test_warmup_takes_every_layer_over():
    """Those of one kind are called once, and the others must be ready for torch.compile too."""
    layers = nn.ModuleList(fp8_experts() for _ in range(2))
    warmup(layers, [1])
    assert all(isinstance(layer.gate_up_proj, QuantizedWeight) for layer in layers)
