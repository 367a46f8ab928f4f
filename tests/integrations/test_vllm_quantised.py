"""Quantised experts inside vLLM: its configs and layers, loaded by its own loader and computed by cupymoe, on a CPU.

A layer is vLLM's ``RoutedExperts``, which needs no accelerator. Checkpoints are those of the tests of
``cupymoe.checkpoint``: written number by number, with the weights that they stand for in float64.
"""

import importlib
import pickle
import pkgutil
import weakref
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

# It names vLLM's platform, before anything asks.
pytest.importorskip("tests.integrations.vllm_layers", reason="vLLM is not installed")
import vllm
from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation as VllmActivation
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.prepare_finalize import BatchedPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import fp8 as vllm_fp8
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors as vllm_compressed_tensors
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe
from vllm.model_executor.model_loader import reload

from cupymoe import MoEActivation, reference
from cupymoe.integrations import vllm as plugin
from cupymoe.integrations.vllm import experts as vllm_experts
from cupymoe.integrations.vllm import quantized, served, stored, warming
from cupymoe.kernels import jit
from tests.checkpoint.quantised import stored as written
from tests.helpers import random_routing, relative_error
from tests.integrations import vllm_layers
from tests.integrations.vllm_layers import (
    METHOD,
    applied,
    customised_configs,
    layer_output,
    model_layer,
    parallel,
    run,
    unregister,
    use_workspace_on_cuda,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own
vllm_config, registered, world = vllm_layers.vllm_config, vllm_layers.registered, vllm_layers.world
E, H, I, K = 4, 256, 128, 2  # experts, hidden and intermediate size, experts of a token  # noqa: E741
NAME = "model.layers.0.mlp.experts"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def compressed(format, weights, activations=None):
    """A config.json's quantization_config, of compressed-tensors."""
    group = {"targets": ["Linear"], "format": format, "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": [],
        "config_groups": {"group_0": group},
    }


def int4(group_size, symmetric=True, **settings):
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": symmetric}
    return compressed("pack-quantized", {**weights, **settings})


def floats(strategy, **activations):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = [128, 128]
    of_tokens = {"num_bits": 8, "type": "float", "strategy": {"channel": "token"}.get(strategy, "tensor")}
    return compressed("float-quantized", weights, {**of_tokens, "dynamic": True, "symmetric": True, **activations})


def fp8(blocks=None, scheme="dynamic"):
    return {"quant_method": "fp8", "activation_scheme": scheme, "weight_block_size": blocks}


class Kind(NamedTuple):
    """Of a checkpoint: its config, who writes one of its weights, and the format that this is in."""

    config: dict
    write: object
    format: str


KINDS = {
    "int4 g32": Kind(int4(32), written.pack_quantized(32), "int4_g32"),
    "int4 g64": Kind(int4(64), written.pack_quantized(64), "int4_g64"),
    "int4 g128": Kind(int4(128), written.pack_quantized(128), "int4_g128"),
    "int4 g32 zero": Kind(int4(32, symmetric=False), written.pack_quantized(32, zeros=True), "int4_g32_zero"),
    "int4 g32 static order": Kind(int4(32, actorder="static"), written.pack_quantized(32), "int4_g32"),
    "int8": Kind(
        compressed("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}),
        written.packed_int8,
        "int8",
    ),
    "ct fp8 channel": Kind(floats("channel"), written.fp8("channel"), "fp8"),
    "ct fp8 tensor": Kind(floats("tensor"), written.fp8("tensor"), "fp8"),
    "ct fp8 tensor static": Kind(
        floats("tensor", dynamic=False), written.fp8("tensor", activation="input_scale"), "fp8"
    ),
    "ct fp8 block": Kind(floats("block"), written.fp8("block"), "fp8_g128"),
    "fp8 tensor": Kind(fp8(), written.fp8("tensor", scalar_shape=()), "fp8"),
    "fp8 tensor static": Kind(
        fp8(scheme="static"), written.fp8("tensor", scalar_shape=(), activation="input_scale"), "fp8"
    ),
    "fp8 block": Kind(fp8([128, 128]), written.fp8("block", scale_name="weight_scale_inv"), "fp8_g128"),
}
OF_INT4 = [name for name, kind in KINDS.items() if kind.format.startswith("int4")]


class Checkpoint(NamedTuple):
    tensors: dict
    """By name, as a layer's part of a file has them."""
    gate_up: torch.Tensor
    """``[E, 2I, H]`` float64"""
    down: torch.Tensor


def checkpoint(kind, seed=0, intermediate=I):
    rng = np.random.default_rng(seed)
    tensors, weights = {}, {"gate_proj": [], "up_proj": [], "down_proj": []}
    for expert in range(E):
        for projection, each in weights.items():
            n, k = (H, intermediate) if projection == "down_proj" else (intermediate, H)
            of_one = KINDS[kind].write(rng, n, k)
            each.append(torch.from_numpy(of_one.weight))
            tensors |= {f"{expert}.{projection}.{name}": tensor for name, tensor in of_one.tensors.items()}
    gate, up, down = (torch.stack(each) for each in weights.values())
    return Checkpoint(tensors, torch.cat((gate, up), dim=1), down)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    """vLLM's choice of a backend of its own, which there is none of on this machine: Marlin, unless set otherwise."""
    chosen = SimpleNamespace(fp8=Fp8MoeBackend.MARLIN)
    replacements = {
        "select_fp8_moe_backend": lambda *_, **__: (chosen.fp8, modular_kernel.FusedMoEExpertsModular),
        "select_wna16_moe_backend": lambda *_, **__: (WNA16MoEBackend.MARLIN, modular_kernel.FusedMoEExpertsModular),
        "check_moe_marlin_supports_config": lambda *_, **__: True,
        "check_moe_marlin_supports_layer": lambda *_, **__: True,
    }
    names = [name for _, name, _ in pkgutil.iter_modules(compressed_tensors_moe.__path__)]
    kinds = [name for name in names if "_wna16" in name or "_w8a8_fp8" in name or name == "compressed_tensors_moe"]
    modules = [importlib.import_module(f"{compressed_tensors_moe.__name__}.{name}") for name in kinds]
    for module in (vllm_fp8, *modules):
        for name, replacement in replacements.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replacement)
    return chosen


@pytest.fixture
def served_here(registered, backend):
    """The plug-in, in a vLLM that would take Marlin."""


def moe_config(**changes):
    sizes = {"num_experts": E, "num_local_experts": E, "num_logical_experts": E, "hidden_dim": H}
    return vllm_layers.moe_config(**{**sizes, "intermediate_size": I, "experts_per_token": K, **changes})


def config_of(settings):
    return quantization.get_quantization_config(settings["quant_method"]).from_config(settings)


def new_layer(settings, placement="linear", **changes):
    """vLLM's layer, with the parameters of a checkpoint in it."""
    moe = moe_config(**changes)
    experts = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=K,
        global_num_experts=moe.num_experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=moe.moe_parallel_config,
        placement_strategy=placement,
        enable_eplb=False,
    )
    with torch.device(moe.device):
        return RoutedExperts(NAME, moe.in_dtype, moe, config_of(settings), experts)


def load(layer, tensors):
    """Give vLLM's loader the tensors by their names in a file."""
    return list(layer.load_weights(iter(tensors.items())))


def loaded(kind, file=None, placement="linear", **changes):
    """A layer that is ready to be called."""
    file = file or checkpoint(kind)
    layer = new_layer(KINDS[kind].config, placement, **changes)
    load(layer, file.tensors)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


class Tokens(NamedTuple):
    hidden_states: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


def random_tokens(count=16, dtype=torch.float32, device="cpu"):
    weights, index = random_routing(count, E, K, "cpu")
    return Tokens(*(each.to(device) for each in (torch.randn(count, H, dtype=dtype), index, weights)))


def called(layer, tokens):
    return applied(layer.quant_method, layer, *tokens)


def truth(file, tokens, activation=MoEActivation.GELU_TANH):
    device = tokens.hidden_states.device
    weights = file.gate_up.to(device), file.down.to(device)
    return reference.experts(tokens.hidden_states.double(), *weights, tokens.index, tokens.weights, activation)


# --- tests ------------------------------------------------------------------------------------------------------------


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
