"""Which quantised layers cupymoe takes inside vLLM, which it refuses, and what the log says of both."""

import pickle
from types import SimpleNamespace

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as vllm_compressed_tensors

from cupymoe.integrations import vllm as plugin
from cupymoe.integrations.vllm import experts as vllm_experts
from cupymoe.integrations.vllm import quantized, served, stored
from tests.helpers import relative_error
from tests.integrations import vllm_layers, vllm_quantised
from tests.integrations.vllm_layers import METHOD, customised_configs, parallel, unregister
from tests.integrations.vllm_quantised import (
    KINDS,
    NAME,
    called,
    checkpoint,
    config_of,
    fp8,
    loaded,
    moe_config,
    new_layer,
    random_tokens,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered, world = vllm_layers.vllm_config, vllm_layers.registered, vllm_layers.world
backend, served_here = vllm_quantised.backend, vllm_quantised.served_here


class TestConfigs:
    """vLLM's own configs of quantisation, registered anew under their names."""

    @pytest.mark.parametrize("kind", ["int4 g32", "fp8 block"])
    def test_vllm_makes_ours_and_knows_them_as_its_own(self, registered, kind):
        config = config_of(KINDS[kind].config)
        assert isinstance(config, (quantized.CupymoeCompressedTensorsConfig, quantized.CupymoeFp8Config))
        assert isinstance(config, (vllm_compressed_tensors.CompressedTensorsConfig, vllm_fp8.Fp8Config))
        assert config.get_name() == KINDS[kind].config["quant_method"]

    def test_a_config_reaches_another_process(self, registered):
        config = config_of(KINDS["int4 g32"].config)
        copy = pickle.loads(pickle.dumps(config))
        assert type(copy) is quantized.CupymoeCompressedTensorsConfig
        assert copy.target_scheme_map == config.target_scheme_map

    def test_what_is_no_layer_of_experts_is_not_touched(self, registered):
        config = config_of(KINDS["int4 g32"].config)
        assert config.get_quant_method(torch.nn.Linear(2, 2), "lm_head") is None

    def test_a_layer_that_is_not_quantised_has_the_method_of_plain_weights(self, served_here):
        layer = new_layer({**KINDS["int4 g32"].config, "ignore": ["re:.*experts.*"]})
        assert type(layer.quant_method).__name__ == "CupymoeMoEMethod"

    def test_another_plug_in_is_not_replaced(self, registered, monkeypatch):
        class Theirs(vllm_fp8.Fp8Config):
            pass

        unregister()
        monkeypatch.setitem(customised_configs, "fp8", Theirs)
        with pytest.raises(RuntimeError, match=r"vLLM's fp8, which another plug-in has replaced by Theirs"):
            plugin.register()
        assert METHOD not in op_registry_oot  # nothing is registered by halves


class Theirs(FusedMoEMethodBase):
    """What is read of a method of vLLM's."""

    create_weights = get_fused_moe_quant_config = None

    def __init__(self, **attributes):
        vars(self).update(attributes)


def method_like(kind, **settings):
    """What vLLM makes for a kind of checkpoint, with other settings of its weights."""
    config = KINDS[kind].config
    if config["quant_method"] == "fp8":
        return type("Fp8MoEMethod", (Theirs,), {})(quant_config=config_of(config), fp8_backend=Fp8MoeBackend.MARLIN)
    weights = {**config["config_groups"]["group_0"]["weights"], **settings}
    args = SimpleNamespace(model_dump=lambda mode: weights)
    return type("CompressedTensorsWNA16MoEMethod", (Theirs,), {})(weight_quant=args)


class TestRefused:
    """A layer that we don't serve is vLLM's, entirely, with a reason in the log."""

    @pytest.fixture
    def said(self, monkeypatch):
        reasons = []
        monkeypatch.setattr(quantized, "say", lambda name, moe, weights, reason: reasons.append(reason))
        return reasons

    @pytest.mark.parametrize(("place", "name"), [("uva", "cpu_offload_gb"), ("prefetch", "offload_group_size")])
    def test_where_weights_are_offloaded(self, served_here, said, monkeypatch, place, name):
        monkeypatch.setattr(getattr(get_current_vllm_config().offload_config, place), name, 8)
        method = method_like("int4 g32")
        layer = SimpleNamespace(moe_config=moe_config())
        assert quantized.method_of(config_of(KINDS["int4 g32"].config), method, layer, NAME) is method
        assert said == ["vLLM is to offload weights, which it does by names that are gone when codes are made"]

    @pytest.mark.parametrize(
        ("kind", "changes", "reason"),
        [
            ("int4 g32", {"moe_backend": "marlin"}, "moe_backend is 'marlin', not 'auto'"),
            ("int4 g32", {"is_lora_enabled": True}, "kernel does not support LoRA"),
            ("int4 g32", {"has_bias": True}, "quantised weights are served without biases"),
            (
                "int4 g128",
                {"intermediate_size": 704},
                "k must be a multiple of int4_g128's groups of 128, got 704 as the intermediate size here",
            ),
            (
                "fp8 block",
                {"moe_parallel_config": parallel(tp_size=2), "intermediate_size": 128},
                "tensor parallelism cuts blocks of 128 rows: the intermediate size here is 64",
            ),
        ],
    )
    def test_by_its_settings(self, served_here, said, kind, changes, reason):
        theirs = config_of(KINDS[kind].config)
        layer = SimpleNamespace(moe_config=moe_config(**changes))
        method = method_like(kind)
        assert quantized.method_of(theirs, method, layer, NAME) is method
        assert said == [reason]

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"actorder": "group"}, "an act-order has no place in a format"),
            ({"strategy": "channel", "group_size": None}, "weights.strategy must be one of ['group'], got 'channel'"),
            ({"num_bits": 8}, "weights.strategy must be one of ['channel'], got 'group'"),
            ({"num_bits": 2}, "weights.num_bits must be one of [4, 8], got 2"),
            ({"group_size": 16}, "weights.group_size must be one of [32, 64, 128], got 16"),
        ],
    )
    def test_by_its_integers(self, settings, reason):
        assert reason in stored.stored_by(method_like("int4 g32", **settings))

    def test_by_its_blocks(self, served_here):
        method = type("Fp8MoEMethod", (Theirs,), {})(quant_config=config_of(fp8([64, 64])))
        assert stored.stored_by(method) == "weight_block_size must be [128, 128], got [64, 64]"

    def test_by_a_method_that_is_not_known(self):
        method = type("CompressedTensorsW4A4Nvfp4MoEMethod", (Theirs,), {})()
        assert stored.stored_by(method) == (
            "vLLM's CompressedTensorsW4A4Nvfp4MoEMethod has weights that it doesn't take over"
        )

    def test_where_vllm_is_to_quantise_anew(self, served_here, said):
        config = config_of(KINDS["int4 g32"].config)
        config.online_quantization_config = object()
        method = method_like("int4 g32")
        assert quantized.method_of(config, method, SimpleNamespace(moe_config=moe_config()), NAME) is method
        assert said == ["vLLM is to quantise weights anew (online quantisation)"]

    def test_by_its_device(self, registered, monkeypatch):
        monkeypatch.undo()
        reason = served.refusal(moe_config(), vllm_experts.CupymoeExperts, "int4_g32,int4_g32")
        assert "fused: it runs on CUDA devices of compute capability 8.0 or newer, not on cpu" in reason

    def test_the_layer_is_vllm_s_entirely(self, served_here):
        layer = new_layer(KINDS["int4 g32"].config, moe_backend="marlin")
        assert type(layer.quant_method).__module__.startswith("vllm.")
        assert "w13_weight_packed" in dict(layer.named_parameters())


class TestFp8:
    """vLLM rounds hidden states to FP8 where a card can multiply such; cupymoe doesn't, so it has to be asked for."""

    @pytest.mark.parametrize("kind", ["ct fp8 channel", "fp8 block"])
    def test_is_vllm_s_where_it_would_round_hidden_states(self, served_here, world, backend, kind):
        backend.fp8 = Fp8MoeBackend.TRITON
        layer = new_layer(KINDS[kind].config)
        assert type(layer.quant_method).__module__.startswith("vllm.")
        (message,) = served._said
        assert message.endswith(
            "vLLM's TRITON rounds hidden states to FP8 as well; CUPYMOE_VLLM_FP8=1 has cupymoe compute the layer with "
            "hidden states in 16 bits"
        )

    def test_is_taken_where_the_user_asks_and_the_log_says_so(self, served_here, backend, monkeypatch):
        backend.fp8 = Fp8MoeBackend.TRITON
        monkeypatch.setenv(served.FP8_ENVIRONMENT, "1")
        file, tokens = checkpoint("ct fp8 channel"), random_tokens()
        layer = loaded("ct fp8 channel", file)
        assert relative_error(called(layer, tokens), truth(file, tokens)) < 1e-6
        assert served._said == {
            "cupymoe computes 4 of 4 experts, 256 to 128, gelu_tanh, torch.float32, weights in fp8, hidden states kept "
            "in 16 bits where vLLM rounds them to FP8"
        }

    def test_nothing_is_said_of_it_where_vllm_would_not_round_them_either(self, served_here):
        new_layer(KINDS["ct fp8 channel"].config)
        assert served._said == {"cupymoe computes 4 of 4 experts, 256 to 128, gelu_tanh, torch.float32, weights in fp8"}

    def test_an_unknown_value_is_refused_at_once(self, registered, monkeypatch):
        monkeypatch.setenv(served.FP8_ENVIRONMENT, "yes")
        with pytest.raises(ValueError, match="CUPYMOE_VLLM_FP8 must be 0 or 1, got 'yes'"):
            plugin.register()
