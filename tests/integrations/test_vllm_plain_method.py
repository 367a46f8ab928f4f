"""cupymoe's method of plain weights inside vLLM: weights stay where they are, kernels are compiled before a call."""

import types

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from cupymoe.backends.fused import takes_tiles
from cupymoe.integrations.vllm import experts as vllm_experts
from cupymoe.integrations.vllm import warming
from cupymoe.kernels.expert_tiles import cut
from cupymoe.kernels.load import Load
from cupymoe.kernels.stream_regimes import regime
from tests.helpers import max_error, oracle, random_experts
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import E, H, K, N, applied, layer_of, moe_config, new_method, parallel

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered = vllm_layers.vllm_config, vllm_layers.registered


def warm(method, layer):
    warming.warm(method, layer.w13_weight, layer.w2_weight, layer.expert_map)


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
