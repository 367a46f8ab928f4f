"""The maths of quantised experts inside vLLM: over ranks, in single calls and in a model's layer, against float64."""

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation as VllmActivation
from vllm.model_executor.layers.fused_moe.prepare_finalize import BatchedPrepareAndFinalize

from cupymoe import MoEActivation, reference
from cupymoe.integrations.vllm import experts as vllm_experts
from cupymoe.integrations.vllm import quantized, stored, warming
from tests.helpers import relative_error
from tests.integrations import vllm_layers, vllm_quantised
from tests.integrations.vllm_layers import layer_output, model_layer, parallel, run
from tests.integrations.vllm_quantised import (
    KINDS,
    NAME,
    E,
    H,
    I,
    K,
    called,
    checkpoint,
    config_of,
    load,
    loaded,
    moe_config,
    new_layer,
    random_tokens,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered, world = vllm_layers.vllm_config, vllm_layers.registered, vllm_layers.world
backend, served_here = vllm_quantised.backend, vllm_quantised.served_here


class TestParallel:
    @pytest.mark.parametrize("kind", ["int4 g32", "int4 g32 zero", "int8", "ct fp8 channel", "ct fp8 tensor"])
    def test_slices_of_ranks_sum_to_the_whole(self, served_here, kind):
        file, tokens = checkpoint(kind), random_tokens()
        total = 0.0
        for rank in range(2):
            layer = loaded(kind, file, moe_parallel_config=parallel(tp_size=2, tp_rank=rank))
            assert layer.quant_method.weight(layer, "w2").shape == (E, H, I // 2)
            total = total + called(layer, tokens).double()
        assert relative_error(total, truth(file, tokens)) < 1e-6

    def test_blocks_that_ranks_share_out_whole(self, served_here):
        file, tokens = checkpoint("fp8 block", intermediate=256), random_tokens()
        settings = {"intermediate_size": 256}
        ranks = [
            loaded("fp8 block", file, **settings, moe_parallel_config=parallel(tp_size=2, tp_rank=rank))
            for rank in range(2)
        ]
        total = sum(called(layer, tokens).double() for layer in ranks)
        assert relative_error(total, truth(file, tokens)) < 1e-6

    @pytest.mark.parametrize("placement", ["linear", "round_robin"])
    def test_ranks_with_some_of_the_experts_sum_to_the_whole(self, served_here, placement):
        file, tokens = checkpoint("int4 g32"), random_tokens()
        tokens.index[3] = -1
        total = 0.0
        for rank in range(2):
            ranks = parallel(use_ep=True, ep_size=2, ep_rank=rank)
            layer = loaded("int4 g32", file, placement, moe_parallel_config=ranks, num_local_experts=E // 2)
            assert layer.w13_codes.shape[0] == E // 2
            total = total + called(layer, tokens).double()
        assert relative_error(total, truth(file, tokens)) < 1e-6
        assert not total[3].any()

    def test_rows_that_eplb_has_moved_are_found_by_their_ids(self, served_here):
        tokens = random_tokens()
        layer = loaded("int4 g32 zero")
        assert layer.quant_method.supports_eplb
        before = called(layer, tokens)
        order = torch.tensor([2, 0, 3, 1])
        for rows in layer.get_expert_weights():
            rows.copy_(rows[order].clone())
        moved = tokens._replace(index=torch.argsort(order)[tokens.index])
        torch.testing.assert_close(called(layer, moved), before)

    def test_the_batched_format(self, served_here):
        file, tokens = checkpoint("int4 g32"), random_tokens()
        ranks = parallel(all2all_backend="deepep_low_latency", use_ep=True, dp_size=2)
        method = quantized.CupymoeQuantizedMoEMethod(
            moe_config(moe_parallel_config=ranks), stored.Stored(stored.Floats8, "group")
        )
        assert method.experts_cls is vllm_experts.CupymoeBatchedExperts
        layer = loaded("int4 g32", file)
        experts = vllm_experts.CupymoeBatchedExperts(
            method.moe, layer.quant_method.moe_quant_config, max_num_tokens=16, num_dispatchers=1
        )
        kernel = modular_kernel.FusedMoEKernel(BatchedPrepareAndFinalize(16, E, 1, 0), experts)
        weights = [layer.quant_method.weight(layer, projection) for projection in ("w13", "w2")]
        case = tokens.hidden_states, *weights, tokens.index, tokens.weights
        output = run(kernel, case, global_num_experts=E)
        assert relative_error(output, truth(file, tokens)) < 1e-6


class TestCalls:
    def test_router_weights_on_the_input(self, served_here):
        file, tokens = checkpoint("int4 g32"), random_tokens()
        tokens = tokens._replace(index=tokens.index[:, :1], weights=torch.full((16, 1), 0.5))
        layer = loaded("int4 g32", file, experts_per_token=1)
        layer.apply_router_weight_on_input = True
        halved = tokens._replace(hidden_states=tokens.hidden_states * 0.5, weights=torch.ones(16, 1))
        assert relative_error(called(layer, tokens), truth(file, halved)) < 1e-6

    def test_a_limit_that_the_layer_sets_is_obeyed(self, served_here):
        file, tokens = checkpoint("int4 g32"), random_tokens()
        layer = new_layer(KINDS["int4 g32"].config, activation=VllmActivation.SILU)
        layer.swiglu_limit = 0.5
        load(layer, file.tensors)
        layer.quant_method.process_weights_after_loading(layer)
        expected = truth(file, tokens, MoEActivation.SILU.with_parameters(limit=0.5))
        assert relative_error(called(layer, tokens), expected) < 1e-6

    def test_where_batches_must_not_change_bits(self, served_here, monkeypatch):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        layer = loaded("int4 g32")
        assert layer.quant_method.moe_kernel.fused_experts.numerics == "invariant"

    def test_kernels_are_there_for_all_that_is_captured(self, served_here, monkeypatch):
        layer = loaded("int4 g32")
        method, calls = layer.quant_method, []

        def fused_experts(hidden_states, w1, w2, ids, weights, **settings):
            calls.append((len(hidden_states), w1.format.name, ids.max().item()))

        monkeypatch.setattr(vllm_experts, "fused_experts", fused_experts)
        method.cupymoe_captured = [1, 2, 4, 400]
        weights = [method.weight(layer, projection) for projection in ("w13", "w2")]
        warming.warm(method, *weights, None)
        assert {1, 2, 4, 400} <= {count for count, _, _ in calls}
        assert {(format, greatest) for _, format, greatest in calls} == {("int4_g32", -1)}  # no expert is read


def test_a_layer_of_a_model_from_router_logits_to_the_output(served_here, world):
    """As Gemma 4's model code makes it."""
    file, tokens, logits = checkpoint("int4 g32"), random_tokens(), torch.randn(16, E)
    sizes = {"num_experts": E, "top_k": K, "hidden_size": H, "intermediate_size": I}
    layer = model_layer(NAME, **sizes, quant_config=config_of(KINDS["int4 g32"].config))
    experts = layer.routed_experts
    assert type(experts.quant_method) is quantized.CupymoeQuantizedMoEMethod
    load(experts, file.tensors)
    experts.quant_method.process_weights_after_loading(experts)
    output = layer_output(layer, tokens.hidden_states, logits)
    weights, index = reference.route(logits, K)
    assert relative_error(output, truth(file, tokens._replace(index=index, weights=weights))) < 1e-6
