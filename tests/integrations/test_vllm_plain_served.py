"""Which layers of plain weights cupymoe takes inside vLLM, which it refuses, and what the log says of both."""

import logging
import sys
import types

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe import modular_kernel, unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation as VllmActivation
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from cupymoe.integrations import vllm as plugin
from cupymoe.integrations.vllm import served, unquantized
from cupymoe.integrations.vllm.experts import CupymoeExperts
from tests.helpers import random_experts
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import METHOD, E, H, N, kernel_of, layer_of, moe_config, new_method, run, unregister
from tests.invariance import assert_same_bits, computed_alone

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered = vllm_layers.vllm_config, vllm_layers.registered


class TestRegister:
    def test_vllm_makes_our_method_wherever_it_would_make_its_own(self, registered):
        method = new_method(moe_config())
        assert type(method) is unquantized.CupymoeMoEMethod
        assert method.cupymoe_refusal is None
        assert method.experts_cls is CupymoeExperts
        assert not method.is_monolithic

    def test_a_second_call_changes_nothing(self, registered):
        before = dict(op_registry_oot)
        plugin.register()
        assert op_registry_oot == before

    def test_another_plug_in_is_not_replaced(self, registered, monkeypatch):
        class Theirs:
            pass

        unregister()
        monkeypatch.setitem(op_registry_oot, METHOD, Theirs)
        with pytest.raises(RuntimeError, match=r"replaced by Theirs: let VLLM_PLUGINS name only one of the two"):
            plugin.register()

    def test_a_vllm_that_it_does_not_know_is_refused(self, registered, monkeypatch):
        plugin._register.cache_clear()
        monkeypatch.setattr(plugin, "version", lambda name: "0.11.0")

        monkeypatch.delattr(plugin, "unquantized")
        monkeypatch.setitem(sys.modules, unquantized.__name__, None)
        with pytest.raises(RuntimeError, match=r"0.23 or newer, .* got 0.11.0: import of .*unquantized halted"):
            plugin.register()


class TestRefused:
    """A layer that we don't serve is vLLM's, with a reason."""

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"moe_backend": "triton"}, "moe_backend is 'triton', not 'auto'"),
            ({"is_lora_enabled": True}, "LoRA"),
            ({"activation": VllmActivation.RELU2}, "relu2 only without a gate"),
            ({"activation": VllmActivation.SWIGLUOAI, "swiglu_limit": 10.0}, "the model sets {'limit': 10.0}"),
            ({"activation": VllmActivation.SWIGLUOAI_UNINTERLEAVE}, "needs a swiglu_limit"),
        ],
    )
    def test_by_its_settings(self, registered, changes, reason):
        assert reason in served.refusal(moe_config(**changes), CupymoeExperts)

    def test_by_its_device(self, registered, monkeypatch):
        monkeypatch.undo()
        reason = served.refusal(moe_config(), CupymoeExperts)
        assert "fused: it runs on CUDA devices of compute capability 8.0 or newer, not on cpu" in reason

    @pytest.mark.parametrize("kernels", ["use_fi_nvl_two_sided_kernels", "use_fi_nvl_one_sided_kernels"])
    def test_by_who_exchanges_tokens(self, registered, kernels):
        assert not CupymoeExperts._supports_parallel_config(types.SimpleNamespace(**{kernels: True}))

    def test_by_a_quantisation(self, registered):
        assert not CupymoeExperts._supports_quant_scheme("int4", None)

    def test_where_batches_must_not_change_bits(self, registered, monkeypatch):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        reason = served.refusal(moe_config(), CupymoeExperts)
        assert reason is None
        assert kernel_of(moe_config()).fused_experts.numerics == "invariant"

    def test_a_trainer_s_bits(self, registered, monkeypatch):
        """Experts in a step of transformers' training, and here a token at a time."""
        pytest.importorskip("transformers", minversion="5.17")
        from tests.integrations.test_invariance import experts_of, new_model, trained

        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        cpu = torch.device("cpu")
        model = new_model(cpu)
        for experts, (given, expected) in zip(experts_of(model), trained(model, cpu), strict=True):
            num_experts, hidden_size, intermediate_size = experts.down_proj.shape
            kernel = kernel_of(
                moe_config(
                    num_experts=num_experts,
                    num_local_experts=num_experts,
                    num_logical_experts=num_experts,
                    experts_per_token=given[1].shape[1],
                    hidden_dim=hidden_size,
                    intermediate_size=intermediate_size,
                )
            )

            def layer(states, index, weights, kernel=kernel, experts=experts):
                case = states, experts.gate_up_proj, experts.down_proj, index, weights
                return run(kernel, case, global_num_experts=experts.num_experts)

            assert_same_bits(computed_alone(layer, given), expected, "one by one")

    def test_vllm_chooses_then(self, registered, monkeypatch):
        chosen = UnquantizedMoeBackend.TRITON, modular_kernel.FusedMoEExpertsModular
        monkeypatch.setattr(unquantized_fused_moe_method, "select_unquantized_moe_backend", lambda moe_config: chosen)
        method = new_method(moe_config(moe_backend="triton"))
        assert (method.unquantized_backend, method.experts_cls) == chosen
        assert method.cupymoe_refusal == "moe_backend is 'triton', not 'auto'"

    def test_parameters_that_only_the_layer_knows_are_refused_when_the_weights_are_there(self, registered):
        method = new_method(moe_config(activation=VllmActivation.SWIGLUOAI))
        layer = layer_of(random_experts(), method, swiglu_limit=10.0)
        with pytest.raises(ValueError, match=r"the model sets \{'limit': 10.0\}; set CUPYMOE_VLLM=0"):
            method.process_weights_after_loading(layer)


def test_the_log_says_once_what_is_taken_and_why_the_rest_is_not(registered, monkeypatch):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger(served.LOGGER)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    chosen = UnquantizedMoeBackend.TRITON, modular_kernel.FusedMoEExpertsModular
    monkeypatch.setattr(unquantized_fused_moe_method, "select_unquantized_moe_backend", lambda moe_config: chosen)
    try:
        for name, config in [
            ("layers.0", moe_config()),
            ("layers.1", moe_config()),
            ("layers.2", moe_config(moe_backend="triton")),
            ("layers.3", moe_config(moe_backend="triton")),
        ]:
            layer = torch.nn.Module()
            layer.layer_name = name
            new_method(config).create_weights(layer, E, H, N, torch.float32)
    finally:
        logger.removeHandler(handler)
    assert records == [
        "layers.0, and every layer like it: cupymoe computes 6 of 6 experts, 32 to 24, gelu_tanh, torch.float32",
        "layers.2, and every layer like it: cupymoe does not compute 6 of 6 experts, 32 to 24, gelu_tanh, "
        "torch.float32: moe_backend is 'triton', not 'auto'",
    ]
