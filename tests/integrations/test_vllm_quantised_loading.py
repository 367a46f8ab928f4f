"""Quantised experts inside vLLM: parameters of its loader become codes and scales; loading them anew is refused."""

import weakref

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import reload

from cupymoe.integrations.vllm import quantized, stored
from tests.helpers import relative_error
from tests.integrations import vllm_layers, vllm_quantised
from tests.integrations.vllm_layers import unregister
from tests.integrations.vllm_quantised import (
    KINDS,
    NAME,
    OF_INT4,
    E,
    H,
    I,
    called,
    checkpoint,
    load,
    loaded,
    new_layer,
    random_tokens,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered = vllm_layers.vllm_config, vllm_layers.registered
backend, served_here = vllm_quantised.backend, vllm_quantised.served_here


class TestLoading:
    """From vLLM's parameters to codes."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_layer_computes_what_its_checkpoint_says(self, served_here, kind):
        file, tokens = checkpoint(kind), random_tokens()
        layer = loaded(kind, file)
        assert type(layer.quant_method) is quantized.CupymoeQuantizedMoEMethod
        assert layer.quant_method.weight(layer, "w13").format.name == KINDS[kind].format
        assert torch.equal(layer.quant_method.weight(layer, "w13").dequantize(), file.gate_up)
        assert torch.equal(layer.quant_method.weight(layer, "w2").dequantize(), file.down)
        assert relative_error(called(layer, tokens), truth(file, tokens)) < 1e-6

    @pytest.mark.parametrize("kind", ["ct fp8 block", "fp8 block", "ct fp8 channel"])
    def test_gate_and_up_have_blocks_of_their_own(self, served_here, kind):
        """200 rows are two blocks, and 400 four, so the last of gate's two ends where the second of four does not."""
        file = checkpoint(kind, intermediate=200)
        layer = loaded(kind, file, intermediate_size=200)
        assert torch.equal(layer.quant_method.weight(layer, "w13").dequantize(), file.gate_up)
        assert torch.equal(layer.quant_method.weight(layer, "w2").dequantize(), file.down)

    @pytest.mark.parametrize("kind", OF_INT4)
    def test_vllm_dequantises_its_own_parameters_to_the_same_weights(self, registered, backend, monkeypatch, kind):
        file = checkpoint(kind)
        layer = loaded(kind, file)
        unregister()
        theirs = new_layer(KINDS[kind].config)
        load(theirs, file.tensors)
        assert type(theirs.quant_method).__module__.startswith("vllm.")
        for projection in ("w13", "w2"):
            packed, scales = (getattr(theirs, f"{projection}_weight_{name}").data for name in ("packed", "scale"))
            zeros = getattr(theirs, f"{projection}_weight_zero_point", None)
            if not getattr(theirs.w13_weight_packed, "is_transposed", False):  # of 0.33: rows first
                packed, scales = packed.transpose(1, 2), scales.transpose(1, 2)
                zeros = None if zeros is None else zeros.transpose(1, 2)
            weights = int_wna16._unpack_and_dequant_int4_gptq(packed, scales, zeros, True, torch.float64)
            assert torch.equal(layer.quant_method.weight(layer, projection).dequantize(), weights)

    def test_a_file_with_all_experts_in_a_tensor(self, served_here):
        if not hasattr(RoutedExperts, "_orient_fused_weight"):
            pytest.skip(f"vLLM {vllm.__version__} takes such packed weights for transposed ones")
        file, fused = checkpoint("int4 g32 zero"), {}
        for name in ("packed", "scale", "zero_point"):
            gate, up, down = (
                torch.stack([file.tensors[f"{expert}.{projection}.weight_{name}"] for expert in range(E)])
                for projection in ("gate_proj", "up_proj", "down_proj")
            )
            fused |= {f"gate_up_proj_{name}": torch.cat((gate, up), dim=1), f"down_proj_{name}": down}
        layer = loaded("int4 g32 zero", file._replace(tensors=fused))
        assert torch.equal(layer.quant_method.weight(layer, "w13").dequantize(), file.gate_up)
        assert torch.equal(layer.quant_method.weight(layer, "w2").dequantize(), file.down)

    def test_nothing_is_kept_twice(self, served_here):
        layer = new_layer(KINDS["int4 g32"].config)
        load(layer, checkpoint("int4 g32").tensors)
        before = [weakref.ref(each) for each in layer.parameters()]
        storages = [weakref.ref(each.untyped_storage()) for each in layer.parameters()]
        layer.quant_method.process_weights_after_loading(layer)
        assert all(each() is None for each in (*before, *storages))
        assert sorted(name for name, _ in layer.named_parameters()) == [
            "w13_codes",
            "w13_scales",
            "w2_codes",
            "w2_scales",
        ]
        codes, scales = 3 * E * H * I // 2, E * (2 * I * H // 32 + H * 16 // 4) * 4
        assert sum(each.nbytes for each in layer.parameters()) <= codes + scales
        weight = layer.quant_method.weight(layer, "w2")
        assert weight.codes.data_ptr() == layer.w2_codes.data_ptr()

    def test_a_projection_s_parameters_are_gone_before_the_next_one_s_codes_are_made(self, served_here, monkeypatch):
        layer = new_layer(KINDS["int4 g32"].config)
        load(layer, checkpoint("int4 g32").tensors)
        of_w13 = weakref.ref(layer.w13_weight_packed)
        read, seen = stored.Stored.read, []

        def watched(self, loaded, shape, parts):
            seen.append(of_w13() is None)
            return read(self, loaded, shape, parts)

        monkeypatch.setattr(stored.Stored, "read", watched)
        layer.quant_method.process_weights_after_loading(layer)
        assert seen == [False, True]

    def test_a_bad_tensor_is_named(self, served_here):
        file = checkpoint("ct fp8 channel")
        file.tensors["2.up_proj.weight_scale"][5] = float("nan")
        with pytest.raises(ValueError, match=rf"{NAME}: w13, expert 2 of 4 here: weight_scale must be finite"):
            loaded("ct fp8 channel", file)

    @pytest.mark.parametrize("kind", ["ct fp8 channel", "int4 g32"])
    def test_weights_that_vllm_draws_for_a_benchmark_are_taken(self, served_here, monkeypatch, kind):
        monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
        layer = new_layer(KINDS[kind].config)
        layer.w13_weight_scale.data.uniform_(-1e-3, 1e-3)
        layer.quant_method.process_weights_after_loading(layer)
        assert called(layer, random_tokens()).isfinite().all()

    def test_padding_that_no_tensor_fills_is_zero(self, served_here):
        """A hidden size that vLLM rounds up for an exchange of tokens."""
        layer = new_layer(KINDS["int4 g32"].config, hidden_dim=H + 64)
        load(layer, checkpoint("int4 g32").tensors)
        layer.quant_method.process_weights_after_loading(layer)
        assert not layer.quant_method.weight(layer, "w2").dequantize()[:, H:].any()
        assert not layer.quant_method.weight(layer, "w13").dequantize()[:, :, H:].any()


class TestReload:
    """vLLM gives a layer the checkpoint's parameters back and loads them: that is refused, not done by half."""

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_refused_by_name(self, served_here, kind):
        model = torch.nn.Module()
        model.experts = new_layer(KINDS[kind].config)
        reload.record_metadata_for_reloading(model)
        load(model.experts, checkpoint(kind).tensors)
        model.experts.quant_method.process_weights_after_loading(model.experts)
        reload.initialize_layerwise_reload(model)

        def load_anew():
            load(model.experts, checkpoint(kind, seed=1).tensors)
            reload.finalize_layerwise_reload(model, None)

        with pytest.raises(RuntimeError, match="can't load them anew: start vLLM again"):
            load_anew()

    def test_processing_twice_changes_nothing(self, served_here):
        layer, tokens = loaded("int4 g32"), random_tokens()
        first, addresses = called(layer, tokens), [each.data_ptr() for each in layer.parameters()]
        layer.quant_method.process_weights_after_loading(layer)
        assert [each.data_ptr() for each in layer.parameters()] == addresses
        assert torch.equal(called(layer, tokens), first)

    def test_weights_that_are_made_anew_elsewhere_are_computed_with(self, served_here):
        layer, new, tokens = loaded("int4 g32"), checkpoint("int4 g32", seed=1), random_tokens()
        called(layer, tokens)
        old = dict(layer.named_parameters())
        for name in old:
            delattr(layer, name)
        layer.quant_method.create_weights(layer, E, H, I, torch.float32, weight_loader=layer.weight_loader)
        load(layer, new.tensors)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.w13_codes.data_ptr() != old["w13_codes"].data_ptr()
        assert relative_error(called(layer, tokens), truth(new, tokens)) < 1e-6

    def test_without_that_there_is_no_parameter_of_the_name(self, served_here):
        layer = loaded("int4 g32")
        with pytest.raises(AttributeError, match="w13_weight_packed"):
            load(layer, checkpoint("int4 g32").tensors)
