"""The maths of plain weights inside vLLM: its modular kernels and its layer with cupymoe's experts, against float64."""

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation as VllmActivation
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, biased_moe_quant_config
from vllm.model_executor.layers.fused_moe.prepare_finalize import BatchedPrepareAndFinalize
from vllm.platforms.cpu import CpuPlatform

from cupymoe import MoEActivation, reference
from cupymoe.integrations.vllm import served, unquantized
from cupymoe.integrations.vllm.experts import CupymoeBatchedExperts
from tests.helpers import max_error, oracle, random_biases, random_experts
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import (
    E,
    H,
    K,
    N,
    kernel_of,
    layer_output,
    model_layer,
    moe_config,
    new_method,
    parallel,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered, world = vllm_layers.vllm_config, vllm_layers.registered, vllm_layers.world


class TestKernel:
    """vLLM's modular kernel with our experts in it."""

    @pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
    def test_computes_the_experts(self, registered, ids_dtype):
        case = random_experts()
        assert max_error(run(kernel_of(moe_config()), case, ids_dtype=ids_dtype), oracle(case)) < 1e-5

    @pytest.mark.parametrize("name", ["GELU", "GELU_TANH", "SILU", "SWIGLUOAI", "SWIGLUSTEP", "RELU2_NO_MUL"])
    def test_an_activation_is_the_member_of_that_name(self, registered, name, monkeypatch):
        monkeypatch.setattr(CpuPlatform, "is_cuda_alike", lambda self: True)  # ungated ones exist there alone
        ours, theirs = MoEActivation[name], VllmActivation[name]
        case = random_experts(activation=ours)
        output = run(kernel_of(moe_config(activation=theirs)), case, theirs)
        assert max_error(output, oracle(case, ours)) < 1e-5

    def test_gelu_is_not_gelu_tanh(self, registered):
        case = random_experts()
        outputs = [
            run(kernel_of(moe_config(activation=activation)), case, activation)
            for activation in (VllmActivation.GELU, VllmActivation.GELU_TANH)
        ]
        assert 1e-5 < max_error(outputs[0], outputs[1].double()) < 1e-2

    def test_a_limit_that_the_model_sets_is_obeyed(self, registered):
        case = random_experts(activation=MoEActivation.SILU)
        config = moe_config(activation=VllmActivation.SILU, swiglu_limit=0.5)
        output = run(kernel_of(config), case, VllmActivation.SILU)
        assert max_error(output, oracle(case, MoEActivation.SILU.with_parameters(limit=0.5))) < 1e-5

    def test_biases_are_added(self, registered):
        case = random_experts()
        biases = random_biases(case)
        quant_config = biased_moe_quant_config(biases["gate_up_bias"], biases["down_bias"])
        output = run(kernel_of(moe_config(has_bias=True), quant_config), case)
        assert max_error(output, oracle(case, **biases)) < 1e-5

    def test_a_padded_pair_contributes_nothing(self, registered):
        case = random_experts()
        case.top_k_index[3], case.top_k_index[5, 1] = -1, -1
        output = run(kernel_of(moe_config()), case)
        assert not output[3].any()
        assert max_error(output, oracle(case)) < 1e-5

    def test_ranks_with_an_expert_map_sum_to_the_whole(self, registered):
        """Global ids, an uneven split, and a padded token."""
        case = random_experts()
        case.top_k_index[3] = -1
        total = torch.zeros(case.hidden_states.shape, dtype=torch.float64)
        for here in ([0, 3], [1, 2, 4, 5]):
            expert_map = torch.full((E,), -1, dtype=torch.int32)
            expert_map[here] = torch.arange(len(here), dtype=torch.int32)
            part = case._replace(gate_up_proj=case.gate_up_proj[here], down_proj=case.down_proj[here])
            kernel = kernel_of(moe_config(num_local_experts=len(here)))
            total += run(kernel, part, expert_map=expert_map, global_num_experts=E)
        assert max_error(total, oracle(case)) < 1e-5

    def test_ranks_with_slices_of_the_intermediate_size_sum_to_the_whole(self, registered):
        case = random_experts()
        gate, up = case.gate_up_proj.chunk(2, dim=1)
        total = torch.zeros(case.hidden_states.shape, dtype=torch.float64)
        for rows in (slice(0, 8), slice(8, 24)):
            w1 = torch.cat((gate[:, rows], up[:, rows]), 1)
            w2 = case.down_proj[:, :, rows].contiguous()
            kernel = kernel_of(moe_config(intermediate_size=w2.shape[2]))
            total += run(kernel, case._replace(gate_up_proj=w1, down_proj=w2))
        assert max_error(total, oracle(case)) < 1e-5

    def test_router_weights_on_the_input_are_not_applied_twice(self, registered):
        case = random_experts(top_k=1)
        case.top_k_weights.fill_(0.5)
        output = run(
            kernel_of(moe_config(experts_per_token=1)),
            case._replace(hidden_states=case.hidden_states.clone()),
            apply_router_weight_on_input=True,
        )
        halved = case._replace(hidden_states=case.hidden_states * 0.5, top_k_weights=torch.ones(16, 1))
        assert max_error(output, oracle(halved)) < 1e-5

    def test_rows_that_eplb_has_moved_are_found_by_their_ids(self, registered):
        case = random_experts()
        kernel = kernel_of(moe_config())
        before = run(kernel, case)
        order = torch.tensor([2, 0, 1, 5, 3, 4])
        case.gate_up_proj.copy_(case.gate_up_proj[order].clone())
        case.down_proj.copy_(case.down_proj[order].clone())
        moved = torch.argsort(order)[case.top_k_index]
        torch.testing.assert_close(run(kernel, case._replace(top_k_index=moved)), before)

    def test_no_tokens(self, registered):
        assert run(kernel_of(moe_config()), random_experts(num_tokens=0)).shape == (0, H)


class TestBatched:
    """Tokens in rows by expert, as DeepEP's low-latency kernels and NIXL leave them."""

    def config(self, **changes):
        ranks = parallel(all2all_backend="deepep_low_latency", use_ep=True, dp_size=2)
        return moe_config(moe_parallel_config=ranks, **changes)

    def test_is_taken_where_vllm_asks_for_it(self, registered):
        config = self.config()
        assert config.moe_parallel_config.use_batched_activation_format
        method = new_method(config)
        assert method.cupymoe_refusal is None
        assert method.experts_cls is CupymoeBatchedExperts

    def test_computes_the_experts(self, registered):
        case = random_experts()
        experts = CupymoeBatchedExperts(
            self.config(), FUSED_MOE_UNQUANTIZED_CONFIG, max_num_tokens=16, num_dispatchers=1
        )
        kernel = modular_kernel.FusedMoEKernel(BatchedPrepareAndFinalize(16, E, 1, 0), experts)
        assert max_error(run(kernel, case), oracle(case)) < 1e-5

    def test_is_refused_with_biases(self, registered):
        experts = CupymoeBatchedExperts
        assert "without biases" in served.refusal(self.config(has_bias=True), experts)

    def test_is_refused_where_batches_must_not_change_bits(self, registered, monkeypatch):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
        assert "batch invariance" in served.refusal(self.config(), CupymoeBatchedExperts)


class TestLayer:
    """vLLM's own layer, from router logits to the output, as Gemma 4's model code makes it."""

    def test_computes_the_experts_of_its_routing(self, registered, world):
        case = random_experts()
        logits = torch.randn(16, E)
        weights, index = reference.route(logits, K)
        layer = model_layer("model.layers.0.moe", num_experts=E, top_k=K, hidden_size=H, intermediate_size=N)
        experts = layer.routed_experts
        assert type(experts.quant_method) is unquantized.CupymoeMoEMethod
        experts.w13_weight.data.copy_(case.gate_up_proj)
        experts.w2_weight.data.copy_(case.down_proj)
        experts.quant_method.process_weights_after_loading(experts)
        output = layer_output(layer, case.hidden_states, logits)
        assert max_error(output, oracle(case._replace(top_k_index=index, top_k_weights=weights))) < 1e-5
