"""transformers' sonicmoe bridge, over a kernel that computes what it is asked for."""

import json
from enum import Enum

import pytest
import torch

from cupymoe.tools.audit.measured import CANDIDATES
from tests.helpers import transformers_gemma4
from tests.tools.audit.helpers import invoke


class SonicActivation(Enum):
    """As sonic-moe's ``enums.ActivationType``; its GEGLU is the tanh form (comment there, and QuACK's ``geglu``)."""

    SWIGLU = "silu"
    GEGLU = "gelu_tanh"
    REGLU = "relu"


@pytest.fixture
def sonicmoe(monkeypatch):
    """transformers' bridge as it is, over a kernel in plain torch that computes the activation it is asked for."""
    transformers_gemma4()
    from transformers.integrations import sonicmoe

    asked = []

    def moe_general_routing_inputs(
        x, scores, token, expert, w1, b1, w2, b2, *, E, activation_type, concat_layout, **others
    ):
        asked.append(activation_type)
        assert (b1, b2, concat_layout) == (None, None, True)
        assert w1.shape == (w1.shape[0], x.shape[1], E)  # (2I, H, E)
        assert w2.shape == (x.shape[1], w1.shape[0] // 2, E)  # (H, I, E)
        output = torch.zeros(x.shape)
        for expert_id in range(E):
            pairs = torch.where(expert == expert_id)[0]
            rows = token[pairs].long()
            gate, up = (x[rows].float() @ w1[:, :, expert_id].float().T).chunk(2, -1)
            y = CANDIDATES[activation_type.value](gate, up) @ w2[:, :, expert_id].float().T
            output.index_add_(0, rows, y * scores[pairs, None].float())
        return output.to(x.dtype), None

    monkeypatch.setattr(sonicmoe, "_SONICMOE", sonicmoe.SonicMoE(SonicActivation, moe_general_routing_inputs))
    return asked


@pytest.mark.usefixtures("_cpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sonicmoe_bridge_asks_for_swiglu_where_gemma4_says_gelu_tanh(sonicmoe, dtype):
    result = invoke("transformers:sonicmoe", "--dtype", dtype, "--json")
    assert set(sonicmoe) == {SonicActivation.SWIGLU}
    assert result.exit_code == 1
    findings = {finding["name"]: finding for finding in json.loads(result.output)["findings"]}
    assert (findings["activation"]["value"], findings["activation"]["status"]) == ("SILU", "contradicts")
    assert findings["gate order"]["value"] == "gate first"
    assert findings["routing weights"]["value"] == (
        "as given, once" if dtype == "float32" else "as given, once, rounded to bfloat16"
    )
    assert findings["rounding"]["measured"]["error"] > 0.1
    assert findings["rounding"]["measured"]["error_from_found"] < 5e-3


@pytest.mark.usefixtures("_cpu", "sonicmoe")
def test_the_sonicmoe_bridge_is_right_where_the_config_says_silu():
    assert invoke("transformers:sonicmoe", "--activation", "silu").exit_code == 0


def test_the_sonicmoe_bridge_has_no_tanh_gelu_to_ask_for(sonicmoe):
    """Reading the activation's name is not enough to mend it: the bridge's map has no tanh GELU."""
    from transformers.integrations.sonicmoe import sonicmoe_experts_forward

    gemma4 = transformers_gemma4()
    config = gemma4.Gemma4TextConfig(enable_moe_block=True, num_experts=2, hidden_size=8, moe_intermediate_size=4)
    assert not hasattr(config, "hidden_act")
    config._experts_implementation = "sonicmoe"
    experts = gemma4.Gemma4TextExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.zeros_(parameter)
    arguments = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    config.hidden_act = config.hidden_activation
    with pytest.raises(ValueError, match="sonicmoe does not support the 'gelu_pytorch_tanh' activation"):
        sonicmoe_experts_forward(experts, *arguments)
    config.hidden_act = "gelu"  # erf, to transformers; sonic-moe's GEGLU is the tanh form
    sonicmoe_experts_forward(experts, *arguments)
    assert sonicmoe == [SonicActivation.GEGLU]
