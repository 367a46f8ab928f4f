"""vLLM for the tests in it, on a CPU: its platform, config and ranks, the plug-in, and layers as vLLM makes them.

No GPU and no compiled part of vLLM is needed: its Python files are enough, with the few packages that
``vllm_requirements.txt`` beside this file lists. ``.ci/run`` installs both without dependencies into folders that only
these tests see, because vLLM pins a torch and a transformers of its own.

Import this before anything of vLLM: it names vLLM's platform, which vLLM asks for while it is imported. Where vLLM is
not installed, it skips the file that imports it.
"""

import os
import warnings
from dataclasses import replace

import pytest
import torch

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()  # older ones see none where their compiled parts are missing
    from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation as VllmActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FUSED_MOE_UNQUANTIZED_CONFIG,
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
        UnquantizedMoeBackend,
        make_unquantized_moe_kernel,
    )
    from vllm.model_executor.layers.quantization import _CUSTOMIZED_METHOD_TO_QUANT_CONFIG as customised_configs
    from vllm.v1.worker.workspace import current_workspace_manager, init_workspace_manager, reset_workspace_manager

from cupymoe import reference
from cupymoe.integrations import vllm as plugin
from cupymoe.integrations.vllm import quantized, served, warming
from cupymoe.integrations.vllm.experts import CupymoeExperts

METHOD = "UnquantizedFusedMoEMethod"
"""vLLM's method of plain weights, which the plug-in replaces under this name."""
E, H, N, K = 6, 32, 24, 2  # experts, hidden and intermediate size, experts of a token: as random_experts has them


# --- vLLM's process ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def vllm_config(monkeypatch):
    """What vLLM has set wherever it makes a layer; it holds for every test of a file that has this fixture."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # raises where there is no accelerator
    init_workspace_manager(torch.device("cpu"))
    with set_current_vllm_config(VllmConfig()):
        yield
    reset_workspace_manager()


def unregister():
    """As a process is in which vLLM has called no plug-in."""
    plugin._register.cache_clear()
    op_registry_oot.pop(METHOD, None)
    for name in quantized._CONFIGS:
        customised_configs.pop(name, None)


@pytest.fixture
def registered(monkeypatch):
    """The plug-in as a process has it that vLLM has started on a GPU; the slow reference counts as fast here."""
    monkeypatch.setenv(served.ENVIRONMENT, "1")
    monkeypatch.setattr(served, "slow_reason", lambda *of_layer: None)
    for once in (served._said, warming._warmed):
        once.clear()
    unregister()
    plugin.register()
    yield
    monkeypatch.undo()
    unregister()


@pytest.fixture
def world(tmp_path):
    """One rank."""
    from vllm.distributed import parallel_state

    parallel_state.init_distributed_environment(1, 0, f"file://{tmp_path}/store", 0, "gloo")
    parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


def use_workspace_on_cuda(hidden):
    """Of 1024 tokens: as large as it will be, before a graph holds its address."""
    reset_workspace_manager()
    init_workspace_manager(torch.device("cuda"))
    current_workspace_manager().get_simultaneous(((1024 * hidden,), torch.bfloat16), ((0,), torch.bfloat16))


# --- what vLLM says of a layer, and calls -----------------------------------------------------------------------------


def moe_config(**changes):
    settings = {
        "num_experts": E,
        "experts_per_token": K,
        "hidden_dim": H,
        "intermediate_size": N,
        "num_local_experts": E,
        "num_logical_experts": E,
        "activation": VllmActivation.GELU_TANH,
        "device": "cpu",
        "routing_method": RoutingMethodType.Renormalize,
        "moe_parallel_config": FusedMoEParallelConfig.make_no_parallel(),
        "in_dtype": torch.float32,
    }
    return FusedMoEConfig(**{**settings, **changes})


def parallel(**changes):
    return replace(FusedMoEParallelConfig.make_no_parallel(), **changes)


def applied(method, layer, hidden_states, index, weights):
    """A method's output, with weights in float32 and ids in int32 as vLLM's routers have them."""
    with torch.inference_mode():
        return method.apply(layer, hidden_states, weights.float(), index.int(), None, None)


def model_layer(name, **settings):
    """vLLM's own layer, from router logits to the output, as Gemma 4's model code makes it."""
    layers = pytest.importorskip("vllm.model_executor.layers.fused_moe.layer")
    if not hasattr(layers, "FusedMoEFactory"):
        pytest.skip(f"vLLM {vllm.__version__} makes its layers on an accelerator alone")

    def routing(hidden_states, gating_output, topk, renormalize):
        weights, index = reference.route(gating_output, topk)
        return weights, index.int()

    return layers.FusedMoEFactory(
        params_dtype=torch.float32,
        custom_routing_function=routing,
        activation="gelu_tanh",
        prefix=name,
        **settings,
    )


def layer_output(layer, hidden_states, logits):
    with torch.inference_mode(), set_forward_context(None, get_current_vllm_config()):
        return layer(hidden_states, logits)


# --- plain weights ----------------------------------------------------------------------------------------------------


def kernel_of(config, quant_config=FUSED_MOE_UNQUANTIZED_CONFIG):
    """vLLM's modular kernel with our experts in it."""
    return make_unquantized_moe_kernel(quant_config, config, UnquantizedMoeBackend.TRITON, CupymoeExperts)


def run(kernel, case, activation=VllmActivation.GELU_TANH, **settings):
    hidden_states, w1, w2, ids, weights = case
    ids = ids.to(settings.pop("ids_dtype", torch.int32))
    settings = {"global_num_experts": E, "expert_map": None, "apply_router_weight_on_input": False, **settings}
    with torch.inference_mode():
        return kernel.apply(
            hidden_states=hidden_states,
            w1=w1,
            w2=w2,
            topk_ids=ids,
            topk_weights=weights.float(),
            activation=activation,
            **settings,
        )


def new_method(config):
    return unquantized_fused_moe_method.UnquantizedFusedMoEMethod(config)


def layer_of(case, method, **attributes):
    """What a method reads of vLLM's RoutedExperts."""
    layer = torch.nn.Module()
    layer.w13_weight, layer.w2_weight = (torch.nn.Parameter(weight, requires_grad=False) for weight in case[1:3])
    settings = {
        "layer_name": "model.layers.0.moe",
        "moe_config": method.moe,
        "activation": VllmActivation.GELU_TANH,
        "apply_router_weight_on_input": False,
        "global_num_experts": E,
        "expert_map": None,
        "_expert_routing_tables": lambda: None,
    }
    for name, value in {**settings, **attributes}.items():
        setattr(layer, name, value)
    return layer
