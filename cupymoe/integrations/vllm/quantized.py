"""The method of quantised weights, and vLLM's own configs of quantisation with it in them.

A config says which method a layer has. Ours are vLLM's, registered anew under their names, and differ in one thing: the
method of a layer of experts, where cupymoe serves it, is :class:`CupymoeQuantizedMoEMethod`.

Its parameters are those of the checkpoint until vLLM has loaded them. Then it makes codes of them as the kernels read
them, one projection after the other, and lets them go: nothing is kept twice. The codes are parameters of the layer
again, each with one row of memory for an expert, so EPLB moves them as any others. vLLM's reload of weights is refused:
it counts elements to know when a layer is complete, and counts some of these formats' tensors twice.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, make_unquantized_moe_kernel
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.utils import set_weight_attrs

from cupymoe.integrations.vllm.experts import experts_class
from cupymoe.integrations.vllm.served import refusal, say
from cupymoe.integrations.vllm.stored import Stored, stored_by
from cupymoe.integrations.vllm.warming import captured_counts, warm
from cupymoe.weights.quantized import QuantizedWeight

_BUFFERS = ("codes", "scales", "zeros", "row_scales")


class CupymoeQuantizedMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts of 4 or 8 bits beside hidden states of 16, computed by cupymoe.

    Args:
        moe: vLLM's ``FusedMoEConfig``.
        stored: how the checkpoint stores the weights.
    """

    def __init__(self, moe: Any, stored: Stored) -> None:
        super().__init__(moe)
        self.moe_kernel: Any = None  # until weights are there
        self.stored = stored
        self.experts_cls = experts_class(moe)
        config = get_current_vllm_config()
        self.cupymoe_captured = captured_counts(moe, config)
        self.is_dummy = config.load_config.load_format == "dummy"
        self.projections: dict[str, tuple[tuple[int, int], int]] = {}
        """``[n, k]`` and how many lie above each other, of w13 and of w2."""
        self._weights: dict[str, QuantizedWeight] = {}
        self._has_codes = False

    @property
    def supports_eplb(self) -> bool:
        """Each parameter has one row of memory for an expert."""
        return True

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """Parameters for the checkpoint's tensors. Zeros, because vLLM may pad a layer and leave its edges as they
        are."""
        self._has_codes = False
        size = intermediate_size_per_partition
        parts = 2 if self.moe.is_act_and_mul else 1
        self.projections = {"w13": ((size, hidden_size), parts), "w2": ((hidden_size, size), 1)}
        attributes["quant_method"] = self.stored.slicing
        for projection, (shape, parts) in self.projections.items():
            for name, (of_expert, dtype) in self.stored.parameters(shape, parts, params_dtype).items():
                zeros = torch.zeros(num_experts, *of_expert, dtype=dtype)
                parameter = torch.nn.Parameter(zeros, requires_grad=False)
                layer.register_parameter(f"{projection}_{name}", parameter)
                set_weight_attrs(parameter, attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put codes in the place of what was loaded, and warm up. Once more, it does nothing.

        Raises:
            ValueError: a tensor that was loaded holds what it must not.
            RuntimeError: vLLM has given the layer the checkpoint's parameters back, to load its weights anew.
        """
        if self._has_codes:
            self._refuse_reload(layer)
            return
        for projection in self.projections:
            self._take_over(layer, projection)
        self._has_codes = True
        if self.moe_kernel is None:
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            self.moe_kernel = make_unquantized_moe_kernel(
                quant_config=self.moe_quant_config,
                moe_config=self.moe,
                backend=UnquantizedMoeBackend.TRITON,  # no more than a name here
                experts_cls=self.experts_cls,
                routing_tables=layer._expert_routing_tables(),
            )
        if layer.w13_codes.is_cuda:
            warm(self, self.weight(layer, "w13"), self.weight(layer, "w2"), layer.expert_map)

    def _refuse_reload(self, layer: Any) -> None:
        names = [name for name, _ in layer.named_parameters() if name.startswith(("w13_", "w2_"))]
        if {name.partition("_")[2] for name in names} <= {*_BUFFERS}:
            return
        raise RuntimeError(
            f"{getattr(layer, 'layer_name', 'a layer')}: cupymoe has made codes of this layer's quantised weights and "
            "can't load them anew: start vLLM again with the new weights, or with CUPYMOE_VLLM=0"
        )

    def _take_over(self, layer: Any, projection: str) -> None:
        shape, parts = self.projections[projection]
        names = self.stored.parameters(shape, parts, self.moe.in_dtype)
        loaded = {name: getattr(layer, f"{projection}_{name}").data for name in names}
        if self.is_dummy:  # vLLM draws them; of either sign, scales too
            loaded = {name: each.abs() if "scale" in name else each for name, each in loaded.items()}
        try:
            weight = self.stored.read(loaded, shape, parts)
        except ValueError as error:
            raise ValueError(f"{getattr(layer, 'layer_name', 'a layer')}: {projection}, {error}") from None
        for name in names:
            delattr(layer, f"{projection}_{name}")
        for name, buffer in weight.named_buffers():
            layer.register_parameter(f"{projection}_{name}", torch.nn.Parameter(buffer, requires_grad=False))

    def weight(self, layer: Any, projection: str) -> QuantizedWeight:
        """The layer's parameters as a weight, which shares their memory.

        Args:
            layer: whose weights were loaded.
            projection: ``"w13"`` or ``"w2"``.
        """
        codes: torch.Tensor = getattr(layer, f"{projection}_codes")
        known = self._weights.get(projection)
        if known is None or known.codes.data_ptr() != codes.data_ptr():
            known = self._weights[projection] = self._shared(layer, projection)
        return known

    def _shared(self, layer: Any, projection: str) -> QuantizedWeight:
        (n, k), parts = self.projections[projection]
        buffers = {name: getattr(layer, f"{projection}_{name}", None) for name in _BUFFERS}
        scales = buffers["scales"]
        weight = QuantizedWeight(
            self.stored.storage.format,
            (layer.w13_codes.shape[0], parts * n, k),
            scale_dtype=None if scales is None else scales.dtype,
            device="meta",
        )
        for name, buffer in buffers.items():
            setattr(weight, name, None if buffer is None else buffer.data)
        return weight

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig:
        """That of a layer whose hidden states stay as they are."""
        return FusedMoEQuantConfig.make(
            gemm1_alpha=getattr(layer, "swiglu_alpha", None),
            gemm1_beta=getattr(layer, "swiglu_beta", None),
            gemm1_clamp_limit=getattr(layer, "swiglu_limit", None),
        )

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """As vLLM's methods do it."""
        return self.moe_kernel.apply(  # type: ignore[no-any-return]
            hidden_states=x,
            w1=self.weight(layer, "w13"),
            w2=self.weight(layer, "w2"),
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )


def offloads_weights() -> bool:
    """Whether vLLM keeps some weights on the CPU (``--cpu-offload-gb``, ``--offload-group-size``)."""
    offload = get_current_vllm_config().offload_config
    return bool(offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0)


def method_of(config: Any, theirs: Any, layer: Any, prefix: str) -> Any:
    """The method of a module that one of vLLM's configs of quantisation has made ``theirs`` for.

    Args:
        config: vLLM's, or ours.
        theirs: its method; None, if the module has none.
        layer: the module.
        prefix: its name.

    Returns:
        Ours, if the module is a layer of experts that cupymoe serves; or else theirs.
    """
    if not isinstance(theirs, FusedMoEMethodBase) or isinstance(theirs, UnquantizedFusedMoEMethod):
        return theirs
    moe, stored = layer.moe_config, stored_by(theirs)
    if isinstance(stored, str):
        say(prefix, moe, "", stored)
        return theirs
    if getattr(config, "online_quantization_config", None) is not None:
        reason: str | None = "vLLM is to quantise weights anew (online quantisation)"
    elif offloads_weights():
        reason = "vLLM is to offload weights, which it does by names that are gone when codes are made"
    else:
        reason = stored.cut_reason(moe) or refusal(moe, experts_class(moe), stored.weight_format)
    say(prefix, moe, str(stored), reason)
    return CupymoeQuantizedMoEMethod(moe, stored) if reason is None else theirs


class CupymoeCompressedTensorsConfig(CompressedTensorsConfig):  # type: ignore[misc]
    """vLLM's config of ``compressed-tensors``, with cupymoe's experts wherever they serve a layer."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """See :func:`method_of`."""
        return method_of(self, super().get_quant_method(layer, prefix), layer, prefix)


class CupymoeFp8Config(Fp8Config):  # type: ignore[misc]
    """vLLM's config of ``fp8``, with cupymoe's experts wherever they serve a layer."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """See :func:`method_of`."""
        return method_of(self, super().get_quant_method(layer, prefix), layer, prefix)


_CONFIGS = {"compressed-tensors": CupymoeCompressedTensorsConfig, "fp8": CupymoeFp8Config}
"""By vLLM's names. They are classes of a module, because vLLM sends configs to its processes by pickle."""


def replaced() -> dict[str, type[Any]]:
    """What another plug-in has put in the place of vLLM's configs, by vLLM's name of each."""
    registered: dict[str, type[Any]] = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    return {name: registered[name] for name in _CONFIGS if name in registered}


def register() -> None:
    """Let vLLM make our configs where it would make its own."""
    for name, config in _CONFIGS.items():
        quantization.register_quantization_config(name)(config)
