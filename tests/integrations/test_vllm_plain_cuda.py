"""cupymoe's method of plain weights inside vLLM, on a GPU."""

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from cupymoe.kernels import jit
from tests.helpers import oracle, random_experts, relative_error
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import applied, layer_of, moe_config, new_method, use_workspace_on_cuda

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered = vllm_layers.vllm_config, vllm_layers.registered

ON_CUDA = {"num_experts": 8, "hidden": 256, "intermediate": 128}  # which the kernels serve


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
