"""Every class of experts that the installed transformers has: computed as eager computes it, or refused by name."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from tests.helpers import transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.0")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")

DECORATED = re.compile(r"^@use_experts_implementation\b.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)


def decorated_classes():
    """``("gemma4.modeling_gemma4", "Gemma4TextExperts")``, and all others; found in the text, so none is imported."""
    models = Path(transformers.__file__).parent / "models"
    return [
        pytest.param(f"{file.parent.name}.{file.stem}", name, id=name)
        for file in sorted(models.glob("*/modeling_*.py"))
        for name in DECORATED.findall(file.read_text(encoding="utf-8"))
    ]


class Config:
    """Each model has names of its own for the same sizes."""

    num_experts = num_local_experts = n_routed_experts = moe_num_experts = 6
    hidden_size = moe_hidden_size = 32
    intermediate_size = moe_intermediate_size = 24
    moe_latent_size = None
    hidden_act, hidden_activation, mlp_hidden_act = "silu", "gelu_pytorch_tanh", "relu2"
    mlp_gate_softcap = mlp_up_softcap = swiglu_limit = swiglu_alpha = 0.7
    post_norm_eps = 1e-6
    _experts_implementation = "eager"


def output_of(experts, implementation, arguments):
    experts.config._experts_implementation = implementation
    with torch.no_grad():
        return experts(*arguments)


def is_refused(experts):
    if integration.unsupported_reason(experts) is not None:
        return True
    try:
        integration.activation_of(experts)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize(("module", "name"), decorated_classes())
def test_experts_are_eager_s_or_refused(module, name):
    torch.manual_seed(0)
    experts_class = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    try:
        experts = experts_class(Config())
    except AttributeError as error:
        pytest.skip(f"a newer model's: {error}")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    index = torch.stack([torch.randperm(6)[:3] for _ in range(20)])
    arguments = torch.randn(20, 32), index, torch.rand(20, 3)
    expected = output_of(experts, "eager", arguments)
    assert expected.any()
    if is_refused(experts):
        with pytest.raises(ValueError, match=rf"does not serve {name}: |no activation like .* of {name}"):
            output_of(experts, "cupymoe", arguments)
        return
    output = output_of(experts, "cupymoe", arguments)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_there_are_experts_of_either_kind():
    """Else the search above found nothing."""
    names = {parameter.id for parameter in decorated_classes()}
    assert {"Gemma4TextExperts", "MixtralExperts", "Qwen3MoeExperts", "GptOssExperts"} <= names
