"""The method of plain weights, which vLLM makes in place of its own by its registry of custom ops."""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from cupymoe.integrations.vllm.experts import experts_class
from cupymoe.integrations.vllm.served import refusal, say
from cupymoe.integrations.vllm.warming import captured_counts, warm


class CupymoeMoEMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """vLLM's method, with cupymoe's experts wherever they serve the layer."""

    def __init__(self, moe: Any) -> None:
        experts = experts_class(moe)
        reason = refusal(moe, experts)
        if reason is None:
            super(UnquantizedFusedMoEMethod, self).__init__(moe)  # whose own would choose a backend of vLLM's
            # Triton's reads the weights as they are loaded, and so do we.
            self.unquantized_backend, self.experts_cls = UnquantizedMoeBackend.TRITON, experts
            self.supports_pre_processed_weights = True
        else:
            super().__init__(moe)
        self.cupymoe_refusal = reason
        self.cupymoe_captured = captured_counts(moe, get_current_vllm_config())

    def create_weights(self, layer: Any, *arguments: Any, **settings: Any) -> None:
        """As vLLM does."""
        super().create_weights(layer, *arguments, **settings)
        say(getattr(layer, "layer_name", "a layer"), self.moe, "", self.cupymoe_refusal)

    def process_weights_after_loading(self, layer: Any) -> None:
        """As vLLM does for Triton, which leaves them where they are; and warm up."""
        super().process_weights_after_loading(layer)
        if self.cupymoe_refusal is None and layer.w13_weight.is_cuda:
            warm(self, layer.w13_weight, layer.w2_weight, layer.expert_map)


def replaced() -> dict[str, type[Any]]:
    """What another plug-in has put in the place of vLLM's method, by its name; nothing, if none has."""
    name = UnquantizedFusedMoEMethod.__name__
    return {name: op_registry_oot[name]} if name in op_registry_oot else {}


def register() -> None:
    """Let vLLM make our method where it would make its own."""
    UnquantizedFusedMoEMethod.register_oot(CupymoeMoEMethod)
