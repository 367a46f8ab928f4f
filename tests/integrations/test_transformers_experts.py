"""Every class of experts that the installed transformers has: computed as eager computes it, or refused by name; and
docs/models.md says which."""

import importlib
import re
from pathlib import Path

import pytest
import torch

import cupymoe
from tests.helpers import ROOT, transformers_gemma4

transformers = pytest.importorskip("transformers", minversion="5.0")
transformers_gemma4()
integration = pytest.importorskip("cupymoe.integrations.transformers")

DECORATED = re.compile(r"^@use_experts_implementation\b.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)
REFUSED = {"MuseSparkExperts": "its experts' outputs are normalised"}
# Of the versions that these tests have been run with: how many classes of experts there are.
CLASSES = {"5.17": 55, "5.24": 68}
VERSION = ".".join(transformers.__version__.split(".")[:2])


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
    num_experts_per_tok = 3
    hidden_size = moe_hidden_size = 32
    intermediate_size = moe_intermediate_size = 24
    moe_latent_size = None
    hidden_act, hidden_activation, mlp_hidden_act = "silu", "gelu_pytorch_tanh", "relu2"
    mlp_gate_softcap = mlp_up_softcap = swiglu_limit = swiglu_alpha = 0.7
    post_norm_eps = 1e-6
    _experts_implementation = "eager"


def random_experts(module, name):
    """Experts of a class, with pre-activations on both sides of every limit."""
    torch.manual_seed(0)
    experts_class = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    try:
        experts = experts_class(Config())
    except AttributeError as error:
        if VERSION in CLASSES:
            raise
        pytest.skip(f"a newer model's: {error}")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return experts


def arguments(num_tokens=20, masked=False):
    index = torch.stack([torch.randperm(6)[:3] for _ in range(num_tokens)])
    if masked:
        index[::2, 1] = 6
    return torch.randn(num_tokens, 32), index, torch.rand(num_tokens, 3)


def outputs_of(experts, implementation, states, index, weights, grad=None):
    """The output, and the gradients of both inputs and all parameters."""
    experts.config._experts_implementation = implementation
    leaves = [states.clone().requires_grad_(), weights.clone().requires_grad_(), *experts.parameters()]
    output = experts(leaves[0], index, leaves[1])
    return output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output) if grad is None else grad)


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for each, expected in zip(ours, theirs, strict=True):
        assert expected.any()
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(("module", "name"), decorated_classes())
def test_experts_are_eager_s_or_refused(module, name):
    experts, case = random_experts(module, name), arguments()
    grad = torch.randn(20, 32)
    expected = outputs_of(experts, "eager", *case, grad)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"does not serve {name}: {REFUSED[name]}"):
            outputs_of(experts, "cupymoe", *case)
        return
    assert_close(outputs_of(experts, "cupymoe", *case, grad), expected)


@pytest.mark.parametrize("name", ["GptOssExperts", "NemotronHExperts"])
def test_masked_pairs(name):
    """An index of num_experts is a pair of another rank; eager does not know it for GPT-OSS, grouped_mm does."""
    module = {parameter.id: parameter.values[0] for parameter in decorated_classes()}[name]
    experts, case = random_experts(module, name), arguments(masked=True)
    experts._is_expert_parallel = True  # transformers 5.24 looks for such pairs only then
    theirs = outputs_of(experts, "grouped_mm", *case)
    assert_close(outputs_of(experts, "cupymoe", *case), theirs)


def test_every_class_is_counted():
    """So none is passed over, and a class that appears in a version that is known is noticed."""
    names = [parameter.id for parameter in decorated_classes()]
    assert {"Gemma4TextExperts", "MixtralExperts", "Qwen3MoeExperts", "GptOssExperts"} <= {*names}
    assert len(names) == len({*names}) == CLASSES.get(VERSION, len(names))
    assert len(REFUSED.keys() & {*names}) == (VERSION != "5.17") or VERSION not in CLASSES


# --- docs/models.md ---------------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| `(\w+)` \| ([\w, ]+) \| (`fused`|refused) \| (`fused`|refused) \| (.*) \|$", re.MULTILINE)
ROWS = ROW.findall((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))
ROW_OF = {model.strip("` "): row for row in ROWS for model in row[4].split(",")}
PROPERTIES = {
    "bias": ("has_bias", True),
    "transposed": ("is_transposed", True),
    "normalised": ("has_post_expert_norm", True),
}


def test_the_page_lists_every_model():
    models = {parameter.values[0].partition(".")[0] for parameter in decorated_classes()}
    assert models <= ROW_OF.keys() or VERSION not in CLASSES
    assert sum(len(row[4].split(",")) for row in ROWS) == len(ROW_OF)


@pytest.mark.parametrize(("module", "name"), decorated_classes())
def test_the_page_agrees(module, name):
    model = module.partition(".")[0]
    if model not in ROW_OF:
        pytest.skip("a newer model's")
    activation, kind, inference, training, _ = ROW_OF[model]
    experts = random_experts(module, name)
    found = integration.activation_of(experts)
    assert found.member.name == activation
    said = {*kind.split(", ")} - {"plain"}
    is_true = {word for word, (attribute, value) in PROPERTIES.items() if getattr(experts, attribute, None) is value}
    assert said == is_true | ({"clamped"} if found.member.name == "SILU" and found is not found.member else set())
    if name in REFUSED:
        assert (inference, training) == ("refused", "refused")
        return
    assert (inference, training) == ("`fused`", "`fused`")
    integration.served(experts)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "name"), decorated_classes())
def test_who_computes_it_on_hopper(module, name):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the page speaks of Hopper")
    experts = random_experts(module, name).to("cuda", torch.bfloat16)
    experts.config._experts_implementation = "cupymoe"
    forward, backward = cupymoe.explain(experts, 64)
    expected = (None, None) if name in REFUSED else ("fused", "fused")
    assert (forward.backend, backward.backend) == expected, (forward, backward)
