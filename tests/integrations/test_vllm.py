"""cupymoe inside vLLM: its method, its modular kernel and its layer, by the real vLLM, on a CPU."""

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
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, biased_moe_quant_config
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.prepare_finalize import BatchedPrepareAndFinalize
from vllm.platforms.cpu import CpuPlatform

from cupymoe import MoEActivation, reference
from cupymoe.backends.fused import takes_tiles
from cupymoe.integrations import vllm as plugin
from cupymoe.integrations.vllm import experts as vllm_experts
from cupymoe.integrations.vllm import served, unquantized, warming
from cupymoe.integrations.vllm.experts import CupymoeBatchedExperts, CupymoeExperts
from cupymoe.kernels import jit
from cupymoe.kernels.expert_tiles import cut
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from tests.helpers import max_error, oracle, random_biases, random_experts, relative_error
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import (
    METHOD,
    E,
    H,
    K,
    N,
    applied,
    kernel_of,
    layer_of,
    layer_output,
    model_layer,
    moe_config,
    new_method,
    parallel,
    run,
    unregister,
    use_workspace_on_cuda,
)
from tests.invariance import assert_same_bits, computed_alone

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered, world = vllm_layers.vllm_config, vllm_layers.registered, vllm_layers.world

ON_CUDA = {"num_experts": 8, "hidden": 256, "intermediate": 128}  # which the kernels serve


def warm(method, layer):
    warming.warm(method, layer.w13_weight, layer.w2_weight, layer.expert_map)


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


class TestMethod:
    """The weights stay where vLLM has put them, as they are."""

    def test_weights_are_neither_moved_nor_repacked(self, registered):
        case = random_experts()
        method = new_method(moe_config())
        layer = layer_of(case, method)
        addresses = layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()
        copies = case.gate_up_proj.clone(), case.down_proj.clone()
        method.process_weights_after_loading(layer)
        assert (layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()) == addresses
        assert torch.equal(layer.w13_weight, copies[0])
        assert torch.equal(layer.w2_weight, copies[1])

    def test_weights_that_are_updated_in_place_are_computed_with(self, registered):
        case, new = random_experts(), random_experts()
        method = new_method(moe_config())
        layer = layer_of(case, method)
        method.process_weights_after_loading(layer)
        tokens = case.hidden_states, case.top_k_index, case.top_k_weights
        first = applied(method, layer, *tokens)
        layer.w13_weight.data.copy_(new.gate_up_proj)
        layer.w2_weight.data.copy_(new.down_proj)
        second = applied(method, layer, *tokens)
        updated = case._replace(gate_up_proj=new.gate_up_proj, down_proj=new.down_proj)
        assert max_error(second, oracle(updated)) < 1e-5
        assert max_error(first, oracle(updated)) > 0.1

    def test_kernels_are_there_for_all_that_is_captured(self, registered, monkeypatch):
        method = new_method(moe_config())
        layer = layer_of(random_experts(dtype=torch.bfloat16), method)
        method.process_weights_after_loading(layer)
        calls = []

        def experts(hidden_states, w1, w2, ids, weights, **settings):
            calls.append((hidden_states.shape[0], ids.dtype, ids.max().item()))

        monkeypatch.setattr(vllm_experts, "fused_experts", experts)
        method.cupymoe_captured = [1, 2, 4, 400]
        warm(method, layer)
        assert {1, 2, 4, 400} <= {count for count, _, _ in calls}
        assert {(dtype, greatest) for _, dtype, greatest in calls} == {(torch.int32, -1)}  # no expert is read
        assert max(count for count, _, _ in calls if count != 400) <= method.moe.max_num_tokens
        before = len(calls)
        warm(method, layer_of(random_experts(dtype=torch.bfloat16), method))
        assert len(calls) == before  # a second layer of the kind needs no other kernels

    def test_kernels_are_there_for_every_range_of_a_rank_that_has_some_of_the_experts(self, registered, monkeypatch):
        ranks = parallel(use_ep=True, ep_size=4, ep_rank=1)
        settings = {"num_experts": 4 * E, "num_logical_experts": 4 * E, "moe_parallel_config": ranks}
        method = new_method(moe_config(**settings, max_num_tokens=4096))
        layer = layer_of(random_experts(dtype=torch.bfloat16), method, expert_map=torch.arange(4 * E) - E)
        method.process_weights_after_loading(layer)
        counts = []
        monkeypatch.setattr(
            vllm_experts, "fused_experts", lambda hidden_states, *_, **__: counts.append(len(hidden_states))
        )
        monkeypatch.setattr(method, "cupymoe_captured", [])
        warm(method, layer)

        def kernels(num_tokens):
            load = Load.of(num_tokens, K, E, 4 * E)
            return cut(load, N) if takes_tiles(load, H) else regime(load, N)

        assert {*map(kernels, counts)} == {*map(kernels, range(1, 4097))}

    def test_captured_counts_are_those_of_all_ranks_where_they_gather_tokens(self):
        config = types.SimpleNamespace(compilation_config=types.SimpleNamespace(cudagraph_capture_sizes=[1, 8]))
        assert warming.captured_counts(types.SimpleNamespace(dp_size=4), config) == [1, 4, 8, 32]


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


@pytest.mark.gpu
class TestOnCuda:
    """The kernels themselves, with what vLLM gives them: int32 ids, and the output's memory."""

    @pytest.fixture(autouse=True)
    def _workspace(self, registered):
        use_workspace_on_cuda(256)

    def method_and_layer(self, case):
        config = moe_config(
            num_experts=8,
            hidden_dim=256,
            intermediate_size=128,
            num_local_experts=8,
            num_logical_experts=8,
            device="cuda",
            in_dtype=torch.bfloat16,
        )
        method = new_method(config)
        method.cupymoe_captured = [1, 2, 8, 64, 512]
        layer = layer_of(case, method, global_num_experts=8)
        method.process_weights_after_loading(layer)
        return method, layer

    @pytest.mark.parametrize("num_tokens", [1, 16, 100, 1000])
    def test_computes_the_experts(self, num_tokens):
        case = random_experts(num_tokens, **ON_CUDA, dtype=torch.bfloat16, device="cuda")
        case.top_k_index[0, 0] = -1
        method, layer = self.method_and_layer(case)
        output = applied(method, layer, case.hidden_states, case.top_k_index, case.top_k_weights)
        assert relative_error(output, oracle(case)) < 0.0042

    def test_ranks_with_an_expert_map_sum_to_the_whole(self):
        case = random_experts(64, **ON_CUDA, dtype=torch.bfloat16, device="cuda")
        total = 0.0
        for here in ([0, 5, 6], [1, 2, 3, 4, 7]):
            expert_map = torch.full((8,), -1, dtype=torch.int32, device="cuda")
            expert_map[here] = torch.arange(len(here), dtype=torch.int32, device="cuda")
            part = case._replace(gate_up_proj=case.gate_up_proj[here], down_proj=case.down_proj[here])
            method, layer = self.method_and_layer(part)
            layer.expert_map = expert_map
            output = applied(method, layer, part.hidden_states, part.top_k_index, part.top_k_weights)
            total = total + output.double()
        assert relative_error(total, oracle(case)) < 0.0042

    def test_a_capture_compiles_nothing(self):
        case = random_experts(512, **ON_CUDA, dtype=torch.bfloat16, device="cuda")
        method, layer = self.method_and_layer(case)
        compiled = jit.compiled_variants()
        for num_tokens in method.cupymoe_captured:
            rows = slice(0, num_tokens)
            part = case._replace(
                hidden_states=case.hidden_states[rows],
                top_k_index=case.top_k_index[rows],
                top_k_weights=case.top_k_weights[rows],
            )
            arguments = layer, part.hidden_states, part.top_k_weights.float(), part.top_k_index.int(), None, None
            graph = torch.cuda.CUDAGraph()
            with torch.inference_mode(), torch.cuda.graph(graph):
                output = method.apply(*arguments)
            graph.replay()
            torch.cuda.synchronize()
            assert relative_error(output, oracle(part)) < 0.0042
        assert jit.compiled_variants() == compiled


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
