"""Quantised experts inside vLLM, on a GPU."""

from functools import partial

import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
from cupymoe.kernels import jit
from tests.helpers import relative_error
from tests.integrations import vllm_layers, vllm_quantised
from tests.integrations.vllm_layers import use_workspace_on_cuda
from tests.integrations.vllm_quantised import (
    KINDS,
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


@pytest.mark.gpu
class TestOnCuda:
    """The kernels themselves, on codes that were made of what vLLM's loader has put on the GPU."""

    @pytest.fixture(autouse=True)
    def _workspace(self, served_here):
        use_workspace_on_cuda(H)

    loaded = staticmethod(partial(loaded, device="cuda", in_dtype=torch.bfloat16))

    @pytest.mark.parametrize("kind", ["int4 g32", "int4 g128", "int4 g32 zero", "int8", "ct fp8 channel", "fp8 block"])
    @pytest.mark.parametrize("num_tokens", [1, 16, 100, 1000])
    def test_computes_the_experts(self, kind, num_tokens):
        file = checkpoint(kind)
        layer = self.loaded(kind, file)
        assert layer.w13_codes.is_cuda
        tokens = random_tokens(num_tokens, torch.bfloat16, "cuda")
        assert relative_error(called(layer, tokens), truth(file, tokens)) < 0.0042

    def test_old_parameters_leave_the_gpu(self):
        layer = new_layer(KINDS["int4 g32"].config, device="cuda", in_dtype=torch.bfloat16)
        load(layer, checkpoint("int4 g32").tensors)
        before = torch.cuda.memory_allocated()
        layer.quant_method.process_weights_after_loading(layer)
        torch.cuda.synchronize()
        codes = 3 * E * H * I // 2
        assert torch.cuda.memory_allocated() - before < codes // 2

    def test_a_capture_compiles_nothing(self):
        layer, file = (
            new_layer(KINDS["int4 g32"].config, device="cuda", in_dtype=torch.bfloat16),
            checkpoint("int4 g32"),
        )
        load(layer, file.tensors)
        layer.quant_method.cupymoe_captured = [64]
        layer.quant_method.process_weights_after_loading(layer)
        compiled = jit.compiled_variants()
        tokens = random_tokens(64, torch.bfloat16, "cuda")
        arguments = layer, tokens.hidden_states, tokens.weights.float(), tokens.index.int(), None, None
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            output = layer.quant_method.apply(*arguments)
        assert jit.compiled_variants() == compiled
        graph.replay()
        torch.cuda.synchronize()
        assert relative_error(output, truth(file, tokens)) < 0.0042
