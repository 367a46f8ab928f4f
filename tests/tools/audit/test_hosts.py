"""The targets of serving stacks: vLLM's own code where it is installed, and what stands for SGLang's."""

import json
import sys
import types

import pytest
import torch
from torch import nn

from cupymoe.tools.audit import hosts
from tests.helpers import transformers_gemma4
from tests.tools.audit.helpers import invoke, with_activation

pytestmark = [pytest.mark.usefixtures("_cpu"), pytest.mark.filterwarnings("ignore")]


def stand_in(default, passed):
    """A module like SGLang's model code: a decoder layer whose mixture has a default activation, or is given one."""
    module = types.ModuleType("gemma4_causal")

    class RMSNorm(nn.Module):
        def __init__(self):
            raise AssertionError("not needed to make the experts")

    class Gemma4MoE(nn.Module):
        def __init__(self, config, activation=default):
            super().__init__()
            self.experts = module.get_moe_impl_class(None)(num_experts=config.num_experts, activation=activation)

    class Gemma4DecoderLayer(nn.Module):
        def __init__(self, config, layer_id):
            super().__init__()
            self.norm = module.RMSNorm()
            settings = {} if passed is None else {"activation": passed(config)}
            self.moe = module.Gemma4MoE(config, **settings)

    vars(module).update(
        RMSNorm=RMSNorm,
        Gemma4MoE=Gemma4MoE,
        Gemma4DecoderLayer=Gemma4DecoderLayer,
        get_moe_impl_class=lambda quant_config: 1 / 0,
    )
    return module


MAKERS = {"get_moe_impl_class": lambda *_: hosts._ask}


@pytest.mark.parametrize(
    ("default", "passed", "asked"),
    [("gelu", None, "gelu"), ("gelu", lambda config: config.hidden_activation, "gelu_pytorch_tanh")],
)
def test_what_a_decoder_layer_asks_for_is_found_without_its_other_modules(default, passed, asked):
    transformers_gemma4()
    module = stand_in(default, passed)
    before = dict(vars(module))
    config = hosts._config("gelu_pytorch_tanh")
    assert hosts._asked(module, MAKERS, config=config, layer_id=0) == asked
    assert vars(module) == before


def test_a_decoder_layer_without_experts_is_not_guessed_about():
    transformers_gemma4()
    module = stand_in("gelu", None)
    module.Gemma4MoE.__init__ = lambda self, config: nn.Module.__init__(self)
    with pytest.raises(RuntimeError, match="was expected to make its experts by get_moe_impl_class"):
        hosts._asked(module, MAKERS, config=hosts._config("gelu_pytorch_tanh"), layer_id=0)


@pytest.mark.parametrize(("asked", "exit_code"), [("gelu", 1), ("gelu_tanh", 0), ("quick", 1)])
def test_to_ask_for_another_function_contradicts_whatever_is_computed(monkeypatch, asked, exit_code):
    monkeypatch.setitem(hosts.HOSTS, "sglang", lambda activation: (with_activation("gelu_tanh"), asked))
    result = invoke("sglang", "--json")
    assert result.exit_code == exit_code, result.output
    findings = {finding["name"]: finding for finding in json.loads(result.output)["findings"]}
    assert findings["activation"]["value"] == "GELU (tanh)"
    assert findings["asked for"]["detail"] == f"the model's code asks its experts for {asked!r}"
    assert findings["asked for"]["status"] == ("contradicts" if exit_code else "ok")


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_stack_that_is_not_there_exits_with_2(monkeypatch, target):
    monkeypatch.setitem(sys.modules, target, None)
    result = invoke(target)
    assert result.exit_code == 2
    assert f"{target} can't be run here: ModuleNotFoundError" in result.output


def test_vllm_s_gemma_4_through_cupymoe(monkeypatch):
    vllm_layers = pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
    transformers_gemma4()
    from cupymoe.integrations import vllm as plugin
    from cupymoe.integrations.vllm import served

    monkeypatch.setenv(served.ENVIRONMENT, "1")
    monkeypatch.setattr(served, "slow_reason", lambda *of_layer: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    vllm_layers.unregister()
    plugin.register()
    try:
        result = invoke("vllm", "--json")
    finally:
        vllm_layers.unregister()
        vllm_layers.reset_workspace_manager()
    assert result.exit_code == 0, result.output
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert findings["asked for"]["detail"] == "the model's code asks its experts for 'gelu_tanh'"
    assert findings["activation"]["value"] == "GELU (tanh)"
    assert findings["masked id -1"]["value"] == "contributes zero"
